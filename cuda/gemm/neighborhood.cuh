// Neighborhood-neighborhood: per_query[q] = scale * sum over slots of weights[q, slot] per_key[key(q, slot)].
//
// Per chunk of 64 keys of the union: each warp gathers the band of its 16 queries into shared memory, zeros elsewhere, and
// multiplies it with the chunk of V. The output stays in registers over the whole union.
#pragma once

#include "gemm/band.cuh"

namespace jax_na::gemm {

template <typename T, bool kPrecise, int kColumns>
struct Neighborhood {
  using M = Tensor<T, kPrecise>;
  static constexpr int kValueStride = kColumns * sizeof(T) + M::kPadTransposed;
  static constexpr int kBandStride = kChunk * sizeof(T) + M::kPad;

  static int shared_bytes() { return 2 * kChunk * kValueStride + kTile * kBandStride; }

  __device__ static void run(const Params& params) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ Block block;
    __shared__ Row rows[kTile];
    __shared__ int32_t q_tokens[kTile];
    __shared__ int32_t k_tokens[2][kChunk];

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Problem& problem = params.problem;
    const Work work(params, blockIdx.x);
    if (!make_query_block(params, work, block)) return;

    if (threadIdx.x < kTile) {
      int32_t r[kMaxRank];
      const int32_t token = row_token(params, block, threadIdx.x, false, r);
      q_tokens[threadIdx.x] = token;
      rows[threadIdx.x] = token < 0 ? empty_row(params) : tile_query_row<T>(params, block, work, token, r, true);
    }
    Column mine0(block, lane), mine1(block, lane + 32), ahead(block, threadIdx.x % kChunk);
    if (threadIdx.x < kChunk) k_tokens[0][threadIdx.x] = column_token(params, block, ahead, true);
    __syncthreads();

    const int kv_head = work.head / (problem.heads / problem.kv_heads), column = work.column_block * kColumns;
    const int32_t q_stride = problem.heads * problem.dim, k_stride = problem.kv_heads * problem.dim;
    const T* value = static_cast<const T*>(params.per_key) + work.batch * problem.kv_tokens() * k_stride +
                     int64_t(kv_head) * problem.dim + column;
    T* out =
        static_cast<T*>(params.per_query) + work.batch * problem.q_tokens() * q_stride + int64_t(work.head) * problem.dim;

    const uint32_t s_value = sm80::shared_address(shared_memory);
    unsigned char* const band = shared_memory + 2 * kChunk * kValueStride + warp * kWarpRows * kBandStride;
    const uint32_t s_band = sm80::shared_address(band);
    const int chunks = (block.columns + kChunk - 1) / kChunk;
    auto load_chunk = [&](int chunk) {
      load_rows<T, kColumns>(s_value + (chunk & 1) * kChunk * kValueStride, kValueStride, value, k_stride * sizeof(T),
                             k_tokens[chunk & 1], problem.dim - column, params.aligned);
      sm80::commit_group();
    };
    load_chunk(0);
    ahead.advance(block);
    if (threadIdx.x < kChunk) k_tokens[1][threadIdx.x] = column_token(params, block, ahead, true);

    float c[kColumns / 8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      LaneKeys<T> keys;
      keys.set(params, 0, mine0.index < block.columns, mine0.x);
      keys.set(params, 1, mine1.index < block.columns, mine1.x);
      gather_rows<T>(params.guard, rows + warp * kWarpRows, keys, band, kBandStride, lane);
      mine0.advance(block);
      mine1.advance(block);
      sm80::wait_group<0>();
      __syncthreads();  // V is here, the other buffer is free, tokens of the next chunk are written; the warp's band is
      if (chunk + 1 < chunks) load_chunk(chunk + 1);
      ahead.advance(block);
      if (threadIdx.x < kChunk) k_tokens[chunk & 1][threadIdx.x] = column_token(params, block, ahead, true);

      const uint32_t v_base = s_value + (chunk & 1) * kChunk * kValueStride;
      Accumulator<kPrecise, kColumns / 8> sum(c);
#pragma unroll
      for (int k = 0; k < kChunk / M::kStep; ++k) {
        uint32_t a[4];
        M::load_a(a, s_band + k * 32, kBandStride, lane);
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          uint32_t b[4];
          M::load_b_transposed(b, v_base + k * M::kStep * kValueStride + n * 16 * sizeof(T), kValueStride, lane);
          M::multiply(sum.c[2 * n], a, b[0], b[1]);
          M::multiply(sum.c[2 * n + 1], a, b[2], b[3]);
        }
      }
      sum.add_to(c);
      __syncwarp();  // the band is read before it is overwritten
    }
    store_rows(params, c, out, q_stride, q_tokens + warp * kWarpRows, column, problem.dim, lane);
  }
};

}  // namespace jax_na::gemm
