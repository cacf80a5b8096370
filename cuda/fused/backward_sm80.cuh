// Backward kernels (mma.sync, SM 8.0 and later): see DESIGN.md.
//
// Two kernels, each the owner of what it writes, so no atomics and the same bits in every run:
//   grad_query_kernel      a tile of queries, keys stream: S = Q K^T, dP = dO V^T, dS = P (dP - delta), dQ += dS K. Also
//   computes
//                          delta = rowsum(dO O) - grad_lse for the second kernel, and the gradient of the bias.
//   grad_key_value_kernel  a tile of keys, the queries that see them stream: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO,
//                          dK += dS^T Q, with P^T and dS^T straight from the accumulators. Runs over all query heads of its
//                          key head.
#pragma once

#include "stream_sm80.cuh"

namespace jax_na::fused {

// kParts of grad_key_value_kernel: which gradients its accumulators hold.
constexpr int kPartValue = 1, kPartKey = 2;

template <class E_, int kDim_, int kRowTiles_, int kCols_, int kStages_, int kWarps_, int kMinBlocks_, bool kSkips_,
          int kParts_ = 3>
struct BackwardConfig {
  using E = E_;
  static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kCols = kCols_, kStages = kStages_, kWarps = kWarps_;
  static constexpr int kMinBlocks = kMinBlocks_, kParts = kParts_;
  static constexpr bool kSkips = kSkips_;  // leaves out columns that no row of a warp sees
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * 16 * kRowTiles;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(typename E::Storage));
};

template <class C>
struct GradQueryShared {
  static constexpr int kScoreBytes = C::kRows * C::kCols * 4;
  // Grad scores for the bias gradient lie where the values were, if these are large enough.
  static constexpr bool kScoresOverValue = kScoreBytes <= C::kCols * C::kRowBytes;
  char query[C::kRows * C::kRowBytes];  // later the staging area of grad_query
  char grad_out[C::kRows * C::kRowBytes];
  char key[C::kStages][C::kCols * C::kRowBytes];
  char value[C::kStages][C::kCols * C::kRowBytes];
  ColumnTable<C::kCols, C::kStages + 1> columns;
  int32_t row_token[C::kRows];
  float2 stats[C::kRows];
  Tile tile;
  alignas(16) char scores[kScoresOverValue ? 16 : kScoreBytes];  // last: not allocated without a bias gradient
};

// Adds the grad scores of one chunk, [rows of the tile][kCols] in shared memory, to this block's partial bias gradient. An
// entry belongs to an offset (column minus row); one thread adds up its diagonal, rows in order. Only offsets that the
// chunk holds are walked: with large windows they are few among the entries.
template <int kCols, int kThreads>
__device__ __noinline__ void accumulate_bias(const Params& p, const Tile& tile, const float* scores, int chunk) {
  const AxisTile &t0 = tile.axis[0], &t1 = tile.axis[1], &t2 = tile.axis[2];
  const int e1 = t1.extent, e2 = t2.extent, first = chunk * kCols, last = min(first + kCols, tile.volume) - 1;
  // First and last coordinate of the chunk per axis; an inner one takes every value where an outer one changes.
  int from[kMaxRank] = {first / (e1 * e2), 0, 0}, to[kMaxRank] = {last / (e1 * e2), e1 - 1, e2 - 1};
  if (from[0] == to[0]) {
    from[1] = first / e2 - from[0] * e1;
    to[1] = last / e2 - to[0] * e1;
    if (from[1] == to[1]) {
      from[2] = first % e2;
      to[2] = last % e2;
    }
  }
  int entry0[kMaxRank], low[kMaxRank], count[kMaxRank];  // offset of entry 0; offsets to walk
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const AxisTile& t = tile.axis[a];
    const int reach = p.axis[a].window - 1;
    entry0[a] = t.first - t.begin - reach;
    low[a] = max(from[a] - (t.count - 1), entry0[a]);
    count[a] = max(min(to[a], entry0[a] + 2 * reach) - low[a] + 1, 0);
  }
  float* partial = p.bias_partial + int64_t(blockIdx.x) * p.bias_entries;
  for (int i = threadIdx.x; i < count[0] * count[1] * count[2]; i += kThreads) {
    const int line = i / count[2], off2 = low[2] + i - line * count[2];
    const int off0 = low[0] + line / count[1], off1 = low[1] + line % count[1];
    float sum = 0.f;
    for (int r0 = max(0, from[0] - off0); r0 < min(t0.count, to[0] + 1 - off0); ++r0) {
      for (int r1 = max(0, from[1] - off1); r1 < min(t1.count, to[1] + 1 - off1); ++r1) {
        const int column = ((r0 + off0) * e1 + r1 + off1) * e2 + off2 - first;
        const float* line_scores = scores + (r0 * p.axis[1].box + r1) * p.axis[2].box * kCols + column;
        const int begin = max(max(0, -off2), -column), end = min(min(t2.count, e2 - off2), kCols - column);
        for (int r2 = begin; r2 < end; ++r2) sum += line_scores[r2 * (kCols + 1)];
      }
    }
    partial[((off0 - entry0[0]) * (2 * p.axis[1].window - 1) + off1 - entry0[1]) * (2 * p.axis[2].window - 1) + off2 -
            entry0[2]] += sum;
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) grad_query_kernel(const __grid_constant__ Params p) {
  using E = typename C::E;
  using T = typename E::Storage;
  constexpr int kRowTiles = C::kRowTiles, kCols = C::kCols, kStages = C::kStages, kRowBytes = C::kRowBytes;
  constexpr int kElementBytes = sizeof(T), kWarpRows = 16 * kRowTiles;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<GradQueryShared<C>*>(shared_bytes);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, q = lane & 3;
  const Problem& problem = p.problem;
  const bool wants_bias = p.bias_partial != nullptr;
  if (wants_bias) {
    for (int entry = thread; entry < p.bias_entries; entry += C::kThreads) {
      p.bias_partial[int64_t(blockIdx.x) * p.bias_entries + entry] = 0.f;
    }
  }

  // One tile per block, except for the bias gradient: there a block keeps its head and walks tiles, to have fewer partial
  // sums.
  for (uint32_t work = blockIdx.x; work < p.num_work; work += gridDim.x) {
    __syncthreads();
    if (warp == 0) describe_tile<false, kCols>(p, work, shared.tile);
    __syncthreads();
    const Tile& tile = shared.tile;
    if (tile.axis[0].count <= 0 || tile.axis[1].count <= 0 || tile.axis[2].count <= 0) continue;

    WarpRows<kRowTiles> rows;
    rows.template gather<false>(p, tile, shared.row_token);
    __syncthreads();

    KeyStream<C, GradQueryShared<C>> stream(p, tile, shared);
    const T* const bias = stream.bias;
    const auto out = stream.like_out(static_cast<const void*>(p.forward.out));
    const auto grad_out = stream.like_out(p.backward.grad_out);
    copy_rows<C::kRows, kRowBytes, C::kThreads>(ptx::shared_address(shared.query), stream.like_query(p.forward.query),
                                                ptx::shared_address(shared.grad_out), grad_out, shared.row_token);
    start<kStages>(stream);

    // delta, while the copies are under way: kLanes lanes per row. grad_out as the products of dP see it: where dP and
    // delta cancel (a window of one key), so do their rounding errors.
    {
      constexpr int kLanes = kRowBytes / 16 < 32 ? kRowBytes / 16 : 32;
      for (int first = 0; first < kWarpRows; first += 32 / kLanes) {
        const int row = warp * kWarpRows + first + lane / kLanes;
        const int32_t token = shared.row_token[row];
        float sum = 0.f;
        for (int at = lane % kLanes * 16; at < out.row_bytes && token >= 0; at += kLanes * 16) {
          const uint4 a = *reinterpret_cast<const uint4*>(out.base + int64_t(token) * out.step + at);
          const uint4 b = *reinterpret_cast<const uint4*>(grad_out.base + int64_t(token) * out.step + at);
          const T *x = reinterpret_cast<const T*>(&a), *y = reinterpret_cast<const T*>(&b);
#pragma unroll
          for (int i = 0; i < 16 / kElementBytes; ++i) sum += E::to_float(x[i]) * E::operand(y[i]);
        }
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (lane % kLanes == 0) {
          float2 stats = make_float2(0.f, 0.f);
          if (token >= 0) {
            const int64_t at = (tile.batch * p.q_tokens + token) * problem.heads + tile.head;
            stats.x = p.forward.lse[at] * 1.4426950408889634f;
            stats.y = sum - (p.backward.grad_lse != nullptr ? p.backward.grad_lse[at] : 0.f);
            p.stats[at] = stats;
          }
          shared.stats[row] = stats;
        }
      }
      __syncwarp();
    }
    float lse_log2[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 stats = shared.stats[warp * kWarpRows + r * 16 + half * 8 + (lane >> 2)];
        lse_log2[r][half] = stats.x;
        delta[r][half] = stats.y;
      }
    }

    float grad[kRowTiles][C::kDim / 8][4] = {};
    const uint32_t query_rows = ptx::shared_address(shared.query) + warp * kWarpRows * kRowBytes;
    const uint32_t grad_out_rows = ptx::shared_address(shared.grad_out) + warp * kWarpRows * kRowBytes;

    for (int chunk = 0; chunk < stream.chunks; ++chunk) {
      turn_to<kStages>(stream, chunk);
      const int slot = chunk % (kStages + 1), stage = chunk % kStages;
      const uint32_t* words = shared.columns.word[slot];
      const bool is_extra = chunk >= stream.window_chunks;
      const bool adds_bias = wants_bias && !is_extra;
      const ChunkClass chunk_class = is_extra ? classify_extra<kCols>(words) : classify<kCols>(tile, rows.window, words);
      const uint32_t active = chunk_class.active;
      if (active == 0 && !adds_bias) continue;
      if (is_extra) rows.turn_to_extra_keys();

      float s[kRowTiles][kCols / 8][4] = {}, grad_p[kRowTiles][kCols / 8][4] = {};
      multiply_transposed<E, kRowTiles, kCols, kRowBytes, C::kSkips>(s, query_rows, ptx::shared_address(shared.key[stage]),
                                                                     active);
      multiply_transposed<E, kRowTiles, kCols, kRowBytes, C::kSkips>(grad_p, grad_out_rows,
                                                                     ptx::shared_address(shared.value[stage]), active);
      const uint32_t guards = tile.guards;
      const bool has_bias = bias != nullptr && !is_extra;
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
        if (C::kSkips && (active >> (n / 2) & 1) == 0) {
          // Scores are zero already.
        } else if ((chunk_class.edge >> (n / 2) & 1) != 0 || has_bias) {
          const uint2 word = *reinterpret_cast<const uint2*>(words + n * 8 + 2 * q);
          int2 column = make_int2(0, 0);
          if (has_bias) column = *reinterpret_cast<const int2*>(shared.columns.bias[slot] + n * 8 + 2 * q);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t w = i & 1 ? word.y : word.x;
              const int half = i >> 1;
              const bool hidden = rows.hides(r, i, w, guards);
              float shift = lse_log2[r][half];
              if (has_bias && !hidden) {
                shift -= E::to_float(bias[(i & 1 ? column.y : column.x) - rows.bias[r][half]]) * 1.4426950408889634f;
              }
              const float weight = ptx::exp2_approximate(fmaf(s[r][n][i], p.scale_log2, -shift));
              s[r][n][i] = hidden ? 0.f : weight * (grad_p[r][n][i] - delta[r][half]);
            }
          }
        } else {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float weight = ptx::exp2_approximate(fmaf(s[r][n][i], p.scale_log2, -lse_log2[r][i >> 1]));
              s[r][n][i] = weight * (grad_p[r][n][i] - delta[r][i >> 1]);
            }
          }
        }
      }
      if (adds_bias) {
        float* scores =
            reinterpret_cast<float*>(GradQueryShared<C>::kScoresOverValue ? shared.value[stage] : shared.scores);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = warp * kWarpRows + r * 16 + half * 8 + (lane >> 2);
              *reinterpret_cast<float2*>(scores + row * kCols + n * 8 + 2 * q) =
                  make_float2(s[r][n][2 * half], s[r][n][2 * half + 1]);
            }
          }
        }
        __syncthreads();
        accumulate_bias<kCols, C::kThreads>(p, tile, scores, chunk);
      }
      multiply<E, kRowTiles, kCols, kRowBytes, C::kSkips>(grad, s, ptx::shared_address(shared.key[stage]), active);
    }
    finish(stream);

    const int32_t* tokens = shared.row_token + warp * kWarpRows;
    TaintedRows<kRowTiles> tainted;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float check = 0.f;
#pragma unroll
        for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            grad[r][n][i] *= problem.scale;
            check += grad[r][n][i];
          }
        }
        tainted.mark(r, half, check, tokens);
      }
    }
    store_rows<E, kRowTiles, kRowBytes>(grad, query_rows, stream.like_query(p.backward.grad_query), tokens);
    tainted.for_each([&](int row) { recompute_grad_query<E>(p, tile, row); });
  }
}

template <class C>
struct GradKeyValueShared {
  char key[C::kRows * C::kRowBytes];  // later the staging areas of the gradients
  char value[C::kRows * C::kRowBytes];
  char query[C::kStages][C::kCols * C::kRowBytes];
  char grad_out[C::kStages][C::kCols * C::kRowBytes];
  float2 stats[C::kStages][C::kCols];
  ColumnTable<C::kCols, C::kStages + 1> columns;
  int32_t row_token[C::kRows];
  Tile tile;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) grad_key_value_kernel(const __grid_constant__ Params p) {
  using E = typename C::E;
  using T = typename E::Storage;
  constexpr int kRowTiles = C::kRowTiles, kCols = C::kCols, kStages = C::kStages, kRowBytes = C::kRowBytes;
  constexpr int kElementBytes = sizeof(T), kWarpRows = 16 * kRowTiles;
  constexpr bool kValue = (C::kParts & kPartValue) != 0, kKey = (C::kParts & kPartKey) != 0;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<GradKeyValueShared<C>*>(shared_bytes);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, q = lane & 3;
  const Problem& problem = p.problem;

  if (warp == 0) describe_tile<true, kCols>(p, blockIdx.x, shared.tile);
  __syncthreads();
  const Tile& tile = shared.tile;
  if (tile.axis[0].count <= 0 || tile.axis[1].count <= 0 || tile.axis[2].count <= 0) return;

  WarpRows<kRowTiles> rows;
  rows.template gather<true>(p, tile, shared.row_token);
  __syncthreads();

  QueryStream<C, GradKeyValueShared<C>> stream(p, tile, shared);
  const HeadBytes<T> bytes = stream.bytes;
  const int64_t first_key = tile.batch * (p.extra_rows ? problem.num_extra : p.kv_tokens);
  const auto key_head = [&](auto* tensor) { return head_rows(tensor, first_key, tile.head, bytes.key_step, bytes.key); };
  const auto value_head = [&](auto* tensor) {
    return head_rows(tensor, first_key, tile.head, bytes.value_step, bytes.value);
  };
  copy_rows<C::kRows, kRowBytes, C::kThreads>(
      ptx::shared_address(shared.key), key_head(p.extra_rows ? p.forward.extra_key : p.forward.key),
      ptx::shared_address(shared.value), value_head(p.extra_rows ? p.forward.extra_value : p.forward.value),
      shared.row_token);
  const T* bias = p.extra_rows ? nullptr : head_bias<T>(p, tile.batch, tile.head * (problem.heads / problem.kv_heads));
  start<kStages>(stream);

  float grad_key[kRowTiles][kKey ? C::kDim / 8 : 1][4] = {};
  float grad_value[kRowTiles][kValue ? C::kDim / 8 : 1][4] = {};
  const uint32_t key_rows = ptx::shared_address(shared.key) + warp * kWarpRows * kRowBytes;
  const uint32_t value_rows = ptx::shared_address(shared.value) + warp * kWarpRows * kRowBytes;
  int head_chunk = stream.first_chunk;  // of the chunk at hand, for the bias

  for (int chunk = 0; chunk < stream.chunks; ++chunk) {
    turn_to<kStages>(stream, chunk);
    if (head_chunk == stream.chunks_per_head) {
      head_chunk = 0;
      if (bias != nullptr) bias += int64_t(p.axis[0].bias_step) * (2 * p.axis[0].window - 1);
    }
    ++head_chunk;

    const int slot = chunk % (kStages + 1), stage = chunk % kStages;
    const uint32_t* words = shared.columns.word[slot];
    const ChunkClass chunk_class = classify<kCols>(tile, rows.window, words);
    const uint32_t active = chunk_class.active;
    if (active == 0) continue;
    const auto is_active = [&](int n) { return !C::kSkips || (active >> (n / 2) & 1) != 0; };

    float s[kRowTiles][kCols / 8][4] = {};
    multiply_transposed<E, kRowTiles, kCols, kRowBytes, C::kSkips>(s, key_rows, ptx::shared_address(shared.query[stage]),
                                                                   active);
    const uint32_t guards = tile.guards;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
      if (!is_active(n)) continue;
      // {lse, delta} of two neighbouring queries
      const float4 column_stats = *reinterpret_cast<const float4*>(&shared.stats[stage][n * 8 + 2 * q]);
      if ((chunk_class.edge >> (n / 2) & 1) != 0 || bias != nullptr) {
        const uint2 word = *reinterpret_cast<const uint2*>(words + n * 8 + 2 * q);
        int2 column = make_int2(0, 0);
        if (bias != nullptr) column = *reinterpret_cast<const int2*>(shared.columns.bias[slot] + n * 8 + 2 * q);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t w = i & 1 ? word.y : word.x;
            const bool hidden = rows.hides(r, i, w, guards);
            float shift = i & 1 ? column_stats.z : column_stats.x;
            if (bias != nullptr && !hidden) {
              shift -= E::to_float(bias[(i & 1 ? column.y : column.x) - rows.bias[r][i >> 1]]) * 1.4426950408889634f;
            }
            const float weight = ptx::exp2_approximate(fmaf(s[r][n][i], p.scale_log2, -shift));
            s[r][n][i] = hidden ? 0.f : weight;
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[r][n][i] = ptx::exp2_approximate(fmaf(s[r][n][i], p.scale_log2, -(i & 1 ? column_stats.z : column_stats.x)));
          }
        }
      }
    }
    if constexpr (kValue) {
      multiply<E, kRowTiles, kCols, kRowBytes, C::kSkips>(grad_value, s, ptx::shared_address(shared.grad_out[stage]),
                                                          active);
    }
    if constexpr (kKey) {
      float grad_p[kRowTiles][kCols / 8][4] = {};
      multiply_transposed<E, kRowTiles, kCols, kRowBytes, C::kSkips>(grad_p, value_rows,
                                                                     ptx::shared_address(shared.grad_out[stage]), active);
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
        if (!is_active(n)) continue;
        const float4 column_stats = *reinterpret_cast<const float4*>(&shared.stats[stage][n * 8 + 2 * q]);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[r][n][i] *= grad_p[r][n][i] - (i & 1 ? column_stats.w : column_stats.y);
        }
      }
      multiply<E, kRowTiles, kCols, kRowBytes, C::kSkips>(grad_key, s, ptx::shared_address(shared.query[stage]), active);
    }
  }
  finish(stream);

  const int32_t* tokens = shared.row_token + warp * kWarpRows;
  if constexpr (kKey) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_key[r][n][i] *= problem.scale;
      }
    }
  }
  if (p.extra_rows) {
    const int width = problem.dim + problem.dim_v;
    const int64_t rows = problem.batch * problem.num_extra * problem.kv_heads;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t token = tokens[r * 16 + half * 8 + (lane >> 2)];
        if (token < 0) continue;
        float* row = p.extra_partial + (tile.split * rows + (first_key + token) * problem.kv_heads + tile.head) * width;
#pragma unroll
        for (int n = 0; n < C::kDim / 8; ++n) {
          const int at = n * 8 + 2 * q;
          if constexpr (kKey) {
            if (at < problem.dim) {
              *reinterpret_cast<float2*>(row + at) = make_float2(grad_key[r][n][2 * half], grad_key[r][n][2 * half + 1]);
            }
          }
          if constexpr (kValue) {
            if (at < problem.dim_v) {
              *reinterpret_cast<float2*>(row + problem.dim + at) =
                  make_float2(grad_value[r][n][2 * half], grad_value[r][n][2 * half + 1]);
            }
          }
        }
      }
    }
    return;
  }

  TaintedRows<kRowTiles> tainted;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float check = 0.f;
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          if constexpr (kKey) check += grad_key[r][n][i];
          if constexpr (kValue) check += grad_value[r][n][i];
        }
      }
      tainted.mark(r, half, check, tokens);
    }
  }
  if constexpr (kKey) {
    store_rows<E, kRowTiles, kRowBytes>(grad_key, key_rows, key_head(p.backward.grad_key), tokens);
  }
  if constexpr (kValue) {
    store_rows<E, kRowTiles, kRowBytes>(grad_value, value_rows, value_head(p.backward.grad_value), tokens);
  }
  tainted.for_each([&](int row) { recompute_grad_key_value<E>(p, tile, row); });
}

}  // namespace jax_na::fused
