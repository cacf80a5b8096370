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

#include "matmul_sm80.h"
#include "recompute_sm80.cuh"
#include "tile_sm80.h"

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

// Adds the grad scores of one chunk, [rows of the tile][kCols] in shared memory, to this block's partial bias gradient.
// Each entry belongs to one thread and rows are added in order.
template <int kCols, int kThreads>
__device__ __noinline__ void accumulate_bias(const Params& p, const Tile& tile, const float* scores, int chunk) {
  const AxisTile &t0 = tile.axis[0], &t1 = tile.axis[1], &t2 = tile.axis[2];
  float* partial = p.bias_partial + int64_t(blockIdx.x) * p.bias_entries;
  const int e1 = t1.extent, e2 = t2.extent;
  const int first = chunk * kCols, last = min(first + kCols, tile.volume) - 1;
  const int first0 = first / (e1 * e2), last0 = last / (e1 * e2);
  for (int entry = threadIdx.x; entry < p.bias_entries; entry += kThreads) {
    const int w2 = 2 * p.axis[2].window - 1, w1 = 2 * p.axis[1].window - 1;
    // Column coordinate = row coordinate + offset.
    const int off2 = entry % w2 - (p.axis[2].window - 1) + t2.first - t2.begin;
    const int off1 = entry / w2 % w1 - (p.axis[1].window - 1) + t1.first - t1.begin;
    const int off0 = entry / w2 / w1 - (p.axis[0].window - 1) + t0.first - t0.begin;
    float sum = 0.f;
    for (int r0 = max(0, first0 - off0); r0 < min(t0.count, last0 + 1 - off0); ++r0) {
      for (int r1 = max(0, -off1); r1 < min(t1.count, e1 - off1); ++r1) {
        const int column = ((r0 + off0) * e1 + r1 + off1) * e2 + off2 - first;
        const float* line = scores + (r0 * p.axis[1].box + r1) * p.axis[2].box * kCols + column;
        const int begin = max(max(0, -off2), -column), end = min(min(t2.count, e2 - off2), kCols - column);
        for (int r2 = begin; r2 < end; ++r2) sum += line[r2 * (kCols + 1)];
      }
    }
    partial[entry] += sum;
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

    WarpWindow window;
    uint32_t low[kRowTiles][2], high[kRowTiles][2];
    int32_t row_bias[kRowTiles][2];
    {
      const int row = warp * kWarpRows + lane % kWarpRows;
      const Row mine = describe_row<false>(p, tile, row);
      shared.row_token[row] = mine.token;
      window.gather(tile, mine, lane < kWarpRows);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int from = r * 16 + half * 8 + (lane >> 2);
          low[r][half] = __shfl_sync(0xffffffffu, mine.low, from);
          high[r][half] = __shfl_sync(0xffffffffu, mine.high, from);
          row_bias[r][half] = __shfl_sync(0xffffffffu, mine.bias, from);
        }
      }
    }
    __syncthreads();

    const int32_t kv_head = tile.head / (problem.heads / problem.kv_heads);
    const int64_t q_tokens = p.q_tokens, kv_tokens = p.kv_tokens;
    const int key_bytes = problem.dim * kElementBytes, value_bytes = problem.dim_v * kElementBytes;
    const int64_t query_step = int64_t(problem.heads) * key_bytes, out_step = int64_t(problem.heads) * value_bytes;
    const int64_t key_step = int64_t(problem.kv_heads) * key_bytes, value_step = int64_t(problem.kv_heads) * value_bytes;
    const int64_t first_query = tile.batch * q_tokens, first_key = tile.batch * kv_tokens,
                  first_extra = tile.batch * problem.num_extra;
    const char* query =
        static_cast<const char*>(p.forward.query) + first_query * query_step + int64_t(tile.head) * key_bytes;
    const char* grad_out =
        static_cast<const char*>(p.backward.grad_out) + first_query * out_step + int64_t(tile.head) * value_bytes;
    const char* out = static_cast<const char*>(p.forward.out) + first_query * out_step + int64_t(tile.head) * value_bytes;
    const char* key = static_cast<const char*>(p.forward.key) + first_key * key_step + int64_t(kv_head) * key_bytes;
    const char* value = static_cast<const char*>(p.forward.value) + first_key * value_step + int64_t(kv_head) * value_bytes;
    const int window_chunks = (tile.volume + kCols - 1) / kCols;
    const int chunks = window_chunks + (problem.num_extra + kCols - 1) / kCols;
    const T* bias = nullptr;
    if (p.forward.bias != nullptr) {
      const int64_t entries = int64_t(p.axis[0].bias_step) * (2 * p.axis[0].window - 1);
      bias = static_cast<const T*>(p.forward.bias) +
             (tile.batch / (problem.batch / problem.bias_batch) * problem.heads + tile.head) * entries;
    }

    ColumnWriter<kCols, kStages + 1> writer;
    writer.restart(tile, thread, 0);
    const auto write_columns = [&](int chunk) {
      if (chunk < window_chunks) {
        writer.template write<false>(p, tile, shared.columns, thread, bias != nullptr);
      } else {
        writer.write_extra(tile, shared.columns, thread, (chunk - window_chunks) * kCols, problem.num_extra);
      }
    };
    const auto load_chunk = [&](int chunk) {
      const int stage = chunk % kStages;
      const int32_t* tokens = shared.columns.token[chunk % (kStages + 1)];
      RowSource k{key, static_cast<int32_t>(key_step), key_bytes}, v{value, static_cast<int32_t>(value_step), value_bytes};
      if (chunk >= window_chunks) {
        k.base = static_cast<const char*>(p.forward.extra_key) + first_extra * key_step + int64_t(kv_head) * key_bytes;
        v.base =
            static_cast<const char*>(p.forward.extra_value) + first_extra * value_step + int64_t(kv_head) * value_bytes;
      }
      copy_rows<kCols, kRowBytes, C::kThreads>(ptx::shared_address(shared.key[stage]), k,
                                               ptx::shared_address(shared.value[stage]), v, tokens);
    };

    copy_rows<C::kRows, kRowBytes, C::kThreads>(
        ptx::shared_address(shared.query), RowSource{query, static_cast<int32_t>(query_step), key_bytes},
        ptx::shared_address(shared.grad_out), RowSource{grad_out, static_cast<int32_t>(out_step), value_bytes},
        shared.row_token);
#pragma unroll
    for (int chunk = 0; chunk < kStages; ++chunk) {
      if (chunk < chunks) write_columns(chunk);
    }
    __syncthreads();
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
      if (chunk < chunks) load_chunk(chunk);
      ptx::commit_group();
    }

    // delta, while the copies are under way: kLanes lanes per row.
    {
      constexpr int kLanes = kRowBytes / 16 < 32 ? kRowBytes / 16 : 32;
      for (int first = 0; first < kWarpRows; first += 32 / kLanes) {
        const int row = warp * kWarpRows + first + lane / kLanes;
        const int32_t token = shared.row_token[row];
        float sum = 0.f;
        for (int at = lane % kLanes * 16; at < value_bytes && token >= 0; at += kLanes * 16) {
          const uint4 a = *reinterpret_cast<const uint4*>(out + token * out_step + at);
          const uint4 b = *reinterpret_cast<const uint4*>(grad_out + token * out_step + at);
          const T *x = reinterpret_cast<const T*>(&a), *y = reinterpret_cast<const T*>(&b);
#pragma unroll
          for (int i = 0; i < 16 / kElementBytes; ++i) sum += E::to_float(x[i]) * E::to_float(y[i]);
        }
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (lane % kLanes == 0) {
          float2 stats = make_float2(0.f, 0.f);
          if (token >= 0) {
            const int64_t at = (first_query + token) * problem.heads + tile.head;
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

    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::wait_group<kStages - 2>();
      __syncthreads();  // this chunk has arrived; the previous one's buffers and table slot are free
      if (chunk + kStages - 1 < chunks) load_chunk(chunk + kStages - 1);
      ptx::commit_group();
      if (chunk + kStages < chunks) write_columns(chunk + kStages);

      const int slot = chunk % (kStages + 1), stage = chunk % kStages;
      const uint32_t* words = shared.columns.word[slot];
      const bool is_extra = chunk >= window_chunks;
      const bool adds_bias = wants_bias && !is_extra;
      const ChunkClass chunk_class = is_extra ? classify_extra<kCols>(words) : classify<kCols>(tile, window, words);
      const uint32_t active = chunk_class.active;
      if (active == 0 && !adds_bias) continue;
      if (is_extra) {
        // The words of additional keys are 0, those of empty slots above every bound.
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) low[r][0] = low[r][1] = high[r][0] = high[r][1] = 0;
      }

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
              const bool hidden = (((w - low[r][half]) | (high[r][half] - w)) & guards) != 0;
              float shift = lse_log2[r][half];
              if (has_bias && !hidden) {
                shift -= E::to_float(bias[(i & 1 ? column.y : column.x) - row_bias[r][half]]) * 1.4426950408889634f;
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
    ptx::wait_group<0>();
    if (chunks == 0) __syncthreads();  // the loop has not waited for the rows, and their buffer becomes the staging area

    const int32_t* tokens = shared.row_token + warp * kWarpRows;
    char* destination =
        static_cast<char*>(p.backward.grad_query) + first_query * query_step + int64_t(tile.head) * key_bytes;
    uint32_t tainted[kRowTiles][2];
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
        tainted[r][half] = __ballot_sync(0xffffffffu, tokens[r * 16 + half * 8 + (lane >> 2)] >= 0 && check != check);
      }
    }
    store_rows<E, kRowTiles, kRowBytes>(grad, query_rows, destination, query_step, key_bytes, tokens);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tainted[r][half] == 0) continue;
        for (int g = 0; g < 8; ++g) {
          if ((tainted[r][half] >> (4 * g) & 15u) != 0) {
            __syncwarp();
            recompute_grad_query<E>(p, tile, warp * kWarpRows + r * 16 + half * 8 + g);
          }
        }
      }
    }
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

  WarpWindow window;
  uint32_t low[kRowTiles][2], high[kRowTiles][2];
  int32_t row_bias[kRowTiles][2];
  {
    const int row = warp * kWarpRows + lane % kWarpRows;
    const Row mine = describe_row<true>(p, tile, row);
    shared.row_token[row] = mine.token;
    window.gather(tile, mine, lane < kWarpRows);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = r * 16 + half * 8 + (lane >> 2);
        low[r][half] = __shfl_sync(0xffffffffu, mine.low, from);
        high[r][half] = __shfl_sync(0xffffffffu, mine.high, from);
        row_bias[r][half] = __shfl_sync(0xffffffffu, mine.bias, from);
      }
    }
  }
  __syncthreads();

  const int32_t heads_per_kv = problem.heads / problem.kv_heads;
  const int32_t first_head = tile.head * heads_per_kv;
  const int64_t q_tokens = p.q_tokens, kv_tokens = p.extra_rows ? problem.num_extra : p.kv_tokens;
  const int key_bytes = problem.dim * kElementBytes, value_bytes = problem.dim_v * kElementBytes;
  const int64_t query_step = int64_t(problem.heads) * key_bytes, out_step = int64_t(problem.heads) * value_bytes;
  const int64_t key_step = int64_t(problem.kv_heads) * key_bytes, value_step = int64_t(problem.kv_heads) * value_bytes;
  const int64_t first_query = tile.batch * q_tokens, first_key = tile.batch * kv_tokens;
  const char* key = static_cast<const char*>(p.extra_rows ? p.forward.extra_key : p.forward.key) + first_key * key_step +
                    int64_t(tile.head) * key_bytes;
  const char* value = static_cast<const char*>(p.extra_rows ? p.forward.extra_value : p.forward.value) +
                      first_key * value_step + int64_t(tile.head) * value_bytes;
  const char* query =
      static_cast<const char*>(p.forward.query) + first_query * query_step + int64_t(first_head) * key_bytes;
  const char* grad_out =
      static_cast<const char*>(p.backward.grad_out) + first_query * out_step + int64_t(first_head) * value_bytes;
  const float2* stats = p.stats + first_query * problem.heads + first_head;
  const T* bias = nullptr;
  int64_t bias_entries = 0;
  if (p.forward.bias != nullptr && !p.extra_rows) {
    bias_entries = int64_t(p.axis[0].bias_step) * (2 * p.axis[0].window - 1);
    bias = static_cast<const T*>(p.forward.bias) +
           (tile.batch / (problem.batch / problem.bias_batch) * problem.heads + first_head) * bias_entries;
  }

  // Chunks of all query heads of this key head, one head after the other; with additional keys, this block's share of them.
  const int chunks_per_head = (tile.volume + kCols - 1) / kCols;
  const int all_chunks = chunks_per_head * heads_per_kv;
  const int share = (all_chunks + p.splits - 1) / p.splits;
  const int begin = p.extra_rows ? min(tile.split * share, all_chunks) : 0;
  const int chunks = p.extra_rows ? min(begin + share, all_chunks) - begin : all_chunks;

  ColumnWriter<kCols, kStages + 1> writer;
  int write_at = chunks_per_head == 0 ? 0 : begin % chunks_per_head;
  writer.restart(tile, thread, write_at);
  const auto write_columns = [&]() {
    if (write_at == chunks_per_head) {
      writer.restart(tile, thread, 0);
      write_at = 0;
    }
    writer.template write<true>(p, tile, shared.columns, thread, bias != nullptr);
    ++write_at;
  };
  int load_at = chunks_per_head == 0 ? 0 : begin % chunks_per_head;
  int load_head = chunks_per_head == 0 ? 0 : begin / chunks_per_head;
  const auto load_chunk = [&](int chunk) {
    if (load_at == chunks_per_head) {
      load_at = 0;
      ++load_head;
    }
    ++load_at;
    const int stage = chunk % kStages;
    const int32_t* tokens = shared.columns.token[chunk % (kStages + 1)];
    const RowSource q_rows{query + int64_t(load_head) * key_bytes, static_cast<int32_t>(query_step), key_bytes};
    const RowSource o_rows{grad_out + int64_t(load_head) * value_bytes, static_cast<int32_t>(out_step), value_bytes};
    copy_rows<kCols, kRowBytes, C::kThreads>(ptx::shared_address(shared.query[stage]), q_rows,
                                             ptx::shared_address(shared.grad_out[stage]), o_rows, tokens);
    if (thread < kCols) {
      const int32_t token = tokens[thread];
      ptx::copy_8(ptx::shared_address(&shared.stats[stage][thread]),
                  stats + (token >= 0 ? int64_t(token) * problem.heads + load_head : 0), token >= 0);
    }
  };

  copy_rows<C::kRows, kRowBytes, C::kThreads>(
      ptx::shared_address(shared.key), RowSource{key, static_cast<int32_t>(key_step), key_bytes},
      ptx::shared_address(shared.value), RowSource{value, static_cast<int32_t>(value_step), value_bytes}, shared.row_token);
#pragma unroll
  for (int chunk = 0; chunk < kStages; ++chunk) {
    if (chunk < chunks) write_columns();
  }
  __syncthreads();
#pragma unroll
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) load_chunk(chunk);
    ptx::commit_group();
  }

  float grad_key[kRowTiles][kKey ? C::kDim / 8 : 1][4] = {};
  float grad_value[kRowTiles][kValue ? C::kDim / 8 : 1][4] = {};
  const uint32_t key_rows = ptx::shared_address(shared.key) + warp * kWarpRows * kRowBytes;
  const uint32_t value_rows = ptx::shared_address(shared.value) + warp * kWarpRows * kRowBytes;
  int head_chunk = chunks_per_head == 0 ? 0 : begin % chunks_per_head;  // of the chunk at hand, for the bias

  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::wait_group<kStages - 2>();
    __syncthreads();  // this chunk has arrived; the previous one's buffers and table slot are free
    if (chunk + kStages - 1 < chunks) load_chunk(chunk + kStages - 1);
    ptx::commit_group();
    if (chunk + kStages < chunks) write_columns();
    if (head_chunk == chunks_per_head) {
      head_chunk = 0;
      if (bias != nullptr) bias += bias_entries;
    }
    ++head_chunk;

    const int slot = chunk % (kStages + 1), stage = chunk % kStages;
    const uint32_t* words = shared.columns.word[slot];
    const ChunkClass chunk_class = classify<kCols>(tile, window, words);
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
            const int half = i >> 1;
            const bool hidden = (((w - low[r][half]) | (high[r][half] - w)) & guards) != 0;
            float shift = i & 1 ? column_stats.z : column_stats.x;
            if (bias != nullptr && !hidden) {
              shift -= E::to_float(bias[(i & 1 ? column.y : column.x) - row_bias[r][half]]) * 1.4426950408889634f;
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
  ptx::wait_group<0>();
  if (chunks == 0) __syncthreads();  // the loop has not waited for the rows, and their buffer becomes the staging area

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

  uint32_t tainted[kRowTiles][2];
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
      tainted[r][half] = __ballot_sync(0xffffffffu, tokens[r * 16 + half * 8 + (lane >> 2)] >= 0 && check != check);
    }
  }
  if constexpr (kKey) {
    char* destination = static_cast<char*>(p.backward.grad_key) + first_key * key_step + int64_t(tile.head) * key_bytes;
    store_rows<E, kRowTiles, kRowBytes>(grad_key, key_rows, destination, key_step, key_bytes, tokens);
  }
  if constexpr (kValue) {
    char* destination =
        static_cast<char*>(p.backward.grad_value) + first_key * value_step + int64_t(tile.head) * value_bytes;
    store_rows<E, kRowTiles, kRowBytes>(grad_value, value_rows, destination, value_step, value_bytes, tokens);
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tainted[r][half] == 0) continue;
      for (int g = 0; g < 8; ++g) {
        if ((tainted[r][half] >> (4 * g) & 15u) != 0) {
          __syncwarp();
          recompute_grad_key_value<E>(p, tile, warp * kWarpRows + r * 16 + half * 8 + g);
        }
      }
    }
  }
}

}  // namespace jax_na::fused
