// Forward kernel (mma.sync, SM 8.0 and later): see DESIGN.md.
//
// Per block: a tile of kRows queries of one head. Q stays in shared memory, K and V stream through kStages buffers of kCols
// columns. Each warp owns 16 * kRowTiles queries and all columns, so the softmax needs no exchange between warps: S = Q K^T
// (accumulators), mask, online softmax in base 2, O += P V with P straight from the accumulators.
#pragma once

#include "stream_sm80.cuh"

namespace jax_na::fused {

template <class E_, int kDim_, int kRowTiles_, int kCols_, int kStages_, int kWarps_, int kMinBlocks_, bool kSkips_>
struct ForwardConfig {
  using E = E_;
  static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kCols = kCols_, kStages = kStages_, kWarps = kWarps_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr bool kSkips = kSkips_;  // leaves out columns that no row of a warp sees
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * 16 * kRowTiles;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(typename E::Storage));
};

template <class C>
struct ForwardShared {
  char query[C::kRows * C::kRowBytes];  // later the staging area of the output
  char key[C::kStages][C::kCols * C::kRowBytes];
  char value[C::kStages][C::kCols * C::kRowBytes];
  ColumnTable<C::kCols, C::kStages + 1> columns;
  int32_t row_token[C::kRows];
  Tile tile;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) forward_kernel(const __grid_constant__ Params p) {
  using E = typename C::E;
  constexpr int kRowTiles = C::kRowTiles, kCols = C::kCols, kStages = C::kStages, kRowBytes = C::kRowBytes;
  constexpr int kWarpRows = 16 * kRowTiles;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<C>*>(shared_bytes);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, q = lane & 3;
  const Problem& problem = p.problem;

  if (warp == 0) describe_tile<false, kCols>(p, blockIdx.x, shared.tile);
  __syncthreads();
  const Tile& tile = shared.tile;
  if (tile.axis[0].count <= 0 || tile.axis[1].count <= 0 || tile.axis[2].count <= 0) return;

  WarpRows<kRowTiles> rows;
  rows.template gather<false>(p, tile, shared.row_token);
  __syncthreads();

  KeyStream<C, ForwardShared<C>> stream(p, tile, shared);
  const auto* const bias = stream.bias;
  copy_rows<C::kRows, kRowBytes, C::kThreads>(ptx::shared_address(shared.query), stream.like_query(p.forward.query),
                                              shared.row_token);
  start<kStages>(stream);

  float out[kRowTiles][C::kDim / 8][4] = {};
  float row_max[kRowTiles][2], row_sum[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[r][half] = -INFINITY;
      row_sum[r][half] = 0.f;
    }
  }
  // With a bias, or a scale that would turn the maximum around, scores are scaled before the softmax instead of inside it.
  const bool scale_first = p.forward.bias != nullptr || p.scale_log2 <= 0.f;
  const float scale = scale_first ? 1.f : p.scale_log2;
  const uint32_t query_rows = ptx::shared_address(shared.query) + warp * kWarpRows * kRowBytes;

  for (int chunk = 0; chunk < stream.chunks; ++chunk) {
    turn_to<kStages>(stream, chunk);
    const uint32_t* words = shared.columns.word[chunk % (kStages + 1)];
    const bool is_extra = chunk >= stream.window_chunks;
    const ChunkClass chunk_class = is_extra ? classify_extra<kCols>(words) : classify<kCols>(tile, rows.window, words);
    const uint32_t active = chunk_class.active;
    if (active == 0) continue;
    if (is_extra) rows.turn_to_extra_keys();
    const auto is_active = [&](int n) { return !C::kSkips || (active >> (n / 2) & 1) != 0; };

    float s[kRowTiles][kCols / 8][4] = {};
    multiply_transposed<E, kRowTiles, kCols, kRowBytes, C::kSkips>(
        s, query_rows, ptx::shared_address(shared.key[chunk % kStages]), active);

    if (scale_first) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[r][n][i] *= p.scale_log2;
        }
      }
      if (bias != nullptr && !is_extra) {
        const int32_t* column_bias = shared.columns.bias[chunk % (kStages + 1)];
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
          const uint2 word = *reinterpret_cast<const uint2*>(words + n * 8 + 2 * q);
          const int2 column = *reinterpret_cast<const int2*>(column_bias + n * 8 + 2 * q);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t w = i & 1 ? word.y : word.x;
              const int32_t entry = (i & 1 ? column.y : column.x) - rows.bias[r][i >> 1];
              if (!rows.hides(r, i, w, tile.guards)) s[r][n][i] += E::to_float(bias[entry]) * 1.4426950408889634f;
            }
          }
        }
      }
    }
    if (chunk_class.edge != 0) {
      const uint32_t guards = tile.guards;
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
        if ((chunk_class.edge >> (n / 2) & 1) == 0) continue;
        if (!is_active(n)) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = -INFINITY;
          continue;
        }
        const uint2 word = *reinterpret_cast<const uint2*>(words + n * 8 + 2 * q);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t w = i & 1 ? word.y : word.x;
            s[r][n][i] = rows.hides(r, i, w, guards) ? -INFINITY : s[r][n][i];
          }
        }
      }
    }

    // Online softmax.
    bool rescale = false;
    float correction[kRowTiles][2], shift[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = row_max[r][half];
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) m = fmaxf(m, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        shift[r][half] = m == -INFINITY ? 0.f : m * scale;
        correction[r][half] =
            m == row_max[r][half] ? 1.f : ptx::exp2_approximate(row_max[r][half] * scale - shift[r][half]);
        rescale = rescale || m != row_max[r][half];
        row_max[r][half] = m;
      }
    }
    if (__any_sync(0xffffffffu, rescale)) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) row_sum[r][half] *= correction[r][half];
#pragma unroll
        for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[r][n][i] *= correction[r][i >> 1];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!is_active(n)) continue;  // its scores are -inf
          s[r][n][i] = ptx::exp2_approximate(fmaf(s[r][n][i], scale, -shift[r][i >> 1]));
          row_sum[r][i >> 1] += s[r][n][i];
        }
      }
    }
    multiply<E, kRowTiles, kCols, kRowBytes, C::kSkips>(out, s, ptx::shared_address(shared.value[chunk % kStages]), active);
  }
  finish(stream);

  // Epilogue.
  float* lse = p.forward.lse + tile.batch * p.q_tokens * problem.heads + tile.head;
  const int32_t* tokens = shared.row_token + warp * kWarpRows;
  TaintedRows<kRowTiles> tainted;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[r][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      float check = 0.f;
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          out[r][n][i] *= inverse;
          check += out[r][n][i];
        }
      }
      const int32_t token = tokens[r * 16 + half * 8 + (lane >> 2)];
      tainted.mark(r, half, check, tokens);
      if (q == 0 && token >= 0) {
        const float m = row_max[r][half] * scale;
        lse[int64_t(token) * problem.heads] = sum == 0.f ? -INFINITY : m * 0.6931471805599453f + logf(sum);
      }
    }
  }
  store_rows<E, kRowTiles, kRowBytes>(out, query_rows, stream.like_out(p.forward.out), tokens);
  tainted.for_each([&](int row) { recompute_out<E>(p, tile, row); });
}

}  // namespace jax_na::fused
