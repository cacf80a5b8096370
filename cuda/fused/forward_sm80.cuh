// Forward kernel (mma.sync, SM 8.0 and later): see DESIGN.md.
//
// Per block: a tile of kRows queries of one head. Q stays in shared memory, K and V stream through kStages buffers of kCols
// columns. Each warp owns 16 * kRowTiles queries and all columns, so the softmax needs no exchange between warps: S = Q K^T
// (accumulators), mask, online softmax in base 2, O += P V with P straight from the accumulators.
#pragma once

#include "matmul_sm80.h"
#include "recompute_sm80.cuh"
#include "tile_sm80.h"

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
  constexpr int kElementBytes = sizeof(typename E::Storage);
  constexpr int kWarpRows = 16 * kRowTiles;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<C>*>(shared_bytes);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, q = lane & 3;
  const Problem& problem = p.problem;

  if (warp == 0) describe_tile<false, kCols>(p, blockIdx.x, shared.tile);
  __syncthreads();
  const Tile& tile = shared.tile;
  if (tile.axis[0].count <= 0 || tile.axis[1].count <= 0 || tile.axis[2].count <= 0) return;

  // Rows.
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

  // Sources.
  const int32_t kv_head = tile.head / (problem.heads / problem.kv_heads);
  const int64_t q_tokens = p.q_tokens, kv_tokens = p.kv_tokens;
  const int key_bytes = problem.dim * kElementBytes, value_bytes = problem.dim_v * kElementBytes;
  const int64_t query_step = int64_t(problem.heads) * key_bytes, out_step = int64_t(problem.heads) * value_bytes;
  const int64_t key_step = int64_t(problem.kv_heads) * key_bytes, value_step = int64_t(problem.kv_heads) * value_bytes;
  const int64_t first_query = tile.batch * q_tokens, first_key = tile.batch * kv_tokens,
                first_extra = tile.batch * problem.num_extra;
  const char* query = static_cast<const char*>(p.forward.query) + first_query * query_step + int64_t(tile.head) * key_bytes;
  const char* key = static_cast<const char*>(p.forward.key) + first_key * key_step + int64_t(kv_head) * key_bytes;
  const char* value = static_cast<const char*>(p.forward.value) + first_key * value_step + int64_t(kv_head) * value_bytes;
  const int window_chunks = (tile.volume + kCols - 1) / kCols;
  const int chunks = window_chunks + (problem.num_extra + kCols - 1) / kCols;
  const typename E::Storage* bias = nullptr;
  if (p.forward.bias != nullptr) {
    const int64_t entries = int64_t(p.axis[0].bias_step) * (2 * p.axis[0].window - 1);
    bias = static_cast<const typename E::Storage*>(p.forward.bias) +
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
      v.base = static_cast<const char*>(p.forward.extra_value) + first_extra * value_step + int64_t(kv_head) * value_bytes;
    }
    copy_rows<kCols, kRowBytes, C::kThreads>(ptx::shared_address(shared.key[stage]), k,
                                             ptx::shared_address(shared.value[stage]), v, tokens);
  };

  copy_rows<C::kRows, kRowBytes, C::kThreads>(
      ptx::shared_address(shared.query), RowSource{query, static_cast<int32_t>(query_step), key_bytes}, shared.row_token);
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

  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::wait_group<kStages - 2>();
    __syncthreads();  // this chunk has arrived; the previous one's buffers and table slot are free
    if (chunk + kStages - 1 < chunks) load_chunk(chunk + kStages - 1);
    ptx::commit_group();
    if (chunk + kStages < chunks) write_columns(chunk + kStages);

    const uint32_t* words = shared.columns.word[chunk % (kStages + 1)];
    const bool is_extra = chunk >= window_chunks;
    const ChunkClass chunk_class = is_extra ? classify_extra<kCols>(words) : classify<kCols>(tile, window, words);
    const uint32_t active = chunk_class.active;
    if (active == 0) continue;
    if (is_extra) {
      // The words of additional keys are 0, those of empty slots above every bound.
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) low[r][0] = low[r][1] = high[r][0] = high[r][1] = 0;
    }
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
              const bool seen = (((w - low[r][i >> 1]) | (high[r][i >> 1] - w)) & tile.guards) == 0;
              const int32_t entry = (i & 1 ? column.y : column.x) - row_bias[r][i >> 1];
              if (seen) s[r][n][i] += E::to_float(bias[entry]) * 1.4426950408889634f;
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
            const bool hidden = (((w - low[r][i >> 1]) | (high[r][i >> 1] - w)) & guards) != 0;
            s[r][n][i] = hidden ? -INFINITY : s[r][n][i];
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
  ptx::wait_group<0>();
  if (chunks == 0) __syncthreads();  // the loop has not waited for the rows, and their buffer becomes the staging area

  // Epilogue.
  char* destination = static_cast<char*>(p.forward.out) + first_query * out_step + int64_t(tile.head) * value_bytes;
  float* lse = p.forward.lse + first_query * problem.heads + tile.head;
  const int32_t* tokens = shared.row_token + warp * kWarpRows;
  uint32_t tainted[kRowTiles][2];
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
      tainted[r][half] = __ballot_sync(0xffffffffu, token >= 0 && check != check);
      if (q == 0 && token >= 0) {
        const float m = row_max[r][half] * scale;
        lse[int64_t(token) * problem.heads] = sum == 0.f ? -INFINITY : m * 0.6931471805599453f + logf(sum);
      }
    }
  }
  store_rows<E, kRowTiles, kRowBytes>(out, query_rows, destination, out_step, value_bytes, tokens);
  // A NaN or an infinity among the columns that a row does not see has met a zero weight in the matrix product: such rows
  // are computed again, one key at a time.
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tainted[r][half] == 0) continue;
      for (int g = 0; g < 8; ++g) {
        if ((tainted[r][half] >> (4 * g) & 15u) != 0) {
          __syncwarp();
          recompute_out<E>(p, tile, warp * kWarpRows + r * 16 + half * 8 + g);
        }
      }
    }
  }
}

}  // namespace jax_na::fused
