// Inverse-neighborhood: per_key[k] = scale * sum over the (q, slot) with key(q, slot) = k of weights[q, slot] per_query[q].
//
// The tile is made of keys, the union of the queries whose windows reach it (queries_of_key). Per chunk of 64 queries the
// band is gathered as [query, key], lanes across the keys of the tile, and read transposed by the tensor cores. All query
// heads that share a key head are summed in one block, in order: the result is deterministic.
#pragma once

#include "gemm/band.cuh"

namespace jax_na::gemm {

template <typename T, bool kPrecise, int kColumns>
struct Inverse {
  using M = Tensor<T, kPrecise>;
  static constexpr int kQueryStride = kColumns * sizeof(T) + M::kPadTransposed;
  static constexpr int kBandStride = kTile * sizeof(T) + M::kPadTransposed;

  static int shared_bytes() { return 2 * kChunk * kQueryStride + kChunk * kBandStride; }

  __device__ static void run(const Params& params) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ Block block;
    __shared__ Row rows[2][kChunk];
    __shared__ int32_t q_tokens[2][kChunk];
    __shared__ int32_t k_tokens[kTile];

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Problem& problem = params.problem;
    const Work work(params, blockIdx.x);
    if (!make_key_block(params, work, block)) return;
    LaneKeys<T> keys;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int32_t r[kMaxRank];
      const int32_t token = row_token(params, block, lane + 32 * i, true, r);
      if (warp == 0) k_tokens[lane + 32 * i] = token;
      keys.set(params, i, token >= 0, r);
    }
    __syncthreads();

    const int group = problem.heads / problem.kv_heads, column = work.column_block * kColumns;
    const int32_t q_stride = problem.heads * problem.dim, k_stride = problem.kv_heads * problem.dim;
    const T* source = static_cast<const T*>(params.per_query) + work.batch * problem.q_tokens() * q_stride +
                      int64_t(work.head) * group * problem.dim + column;
    T* out =
        static_cast<T*>(params.per_key) + work.batch * problem.kv_tokens() * k_stride + int64_t(work.head) * problem.dim;

    const uint32_t s_query = sm80::shared_address(shared_memory);
    unsigned char* const band = shared_memory + 2 * kChunk * kQueryStride;
    const uint32_t s_band = sm80::shared_address(band);

    // A stage is one chunk of queries of one head. `describe` writes the rows of the stage that `ahead` stands at.
    const int chunks = (block.columns + kChunk - 1) / kChunk, stages = chunks * group;
    Column ahead(block, threadIdx.x % kChunk);
    int ahead_head = 0;
    auto describe = [&](int buffer) {
      if (threadIdx.x < kChunk) {
        const int32_t token = ahead_head < group ? column_token(params, block, ahead, false) : -1;
        q_tokens[buffer][threadIdx.x] = token;
        rows[buffer][threadIdx.x] =
            token < 0 ? empty_row(params)
                      : union_query_row<T>(params, block, ahead, work.batch, token, work.head * group + ahead_head);
      }
      ahead.advance(block);
      if (ahead.index - int(threadIdx.x % kChunk) >= chunks * kChunk) {
        ahead = Column(block, threadIdx.x % kChunk);
        ++ahead_head;
      }
    };
    auto load_stage = [&](int stage) {
      load_rows<T, kColumns>(s_query + (stage & 1) * kChunk * kQueryStride, kQueryStride,
                             source + int64_t(stage / chunks) * problem.dim, q_stride * sizeof(T), q_tokens[stage & 1],
                             problem.dim - column, params.aligned);
      sm80::commit_group();
    };
    float c[kColumns / 8][4] = {};
    if (stages > 0) {
      describe(0);
      __syncthreads();
      load_stage(0);
      describe(1);
    }
    for (int stage = 0; stage < stages; ++stage) {
      gather_rows<T>(params.guard, rows[stage & 1] + warp * kWarpRows, keys, band + warp * kWarpRows * kBandStride,
                     kBandStride, lane);
      sm80::wait_group<0>();
      __syncthreads();  // the band and the queries are here; rows of the next stage are written
      if (stage + 1 < stages) load_stage(stage + 1);
      describe(stage & 1);
      const uint32_t q_base = s_query + (stage & 1) * kChunk * kQueryStride;
      const uint32_t a_base = s_band + warp * kWarpRows * sizeof(T);
      Accumulator<kPrecise, kColumns / 8> sum(c);
#pragma unroll
      for (int k = 0; k < kChunk / M::kStep; ++k) {
        uint32_t a[4];
        M::load_a_transposed(a, a_base + k * M::kStep * kBandStride, kBandStride, lane);
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          uint32_t b[4];
          M::load_b_transposed(b, q_base + k * M::kStep * kQueryStride + n * 16 * sizeof(T), kQueryStride, lane);
          M::multiply(sum.c[2 * n], a, b[0], b[1]);
          M::multiply(sum.c[2 * n + 1], a, b[2], b[3]);
        }
      }
      sum.add_to(c);
      __syncthreads();  // the band is read before it is overwritten; the rows of the next stage are visible
    }
    store_rows(params, c, out, k_stride, k_tokens + warp * kWarpRows, column, problem.dim, lane);
  }
};

}  // namespace jax_na::gemm
