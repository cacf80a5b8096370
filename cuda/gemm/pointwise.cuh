// Pointwise-neighborhood: weights[q, slot] = scale * <per_query[q], per_key[key(q, slot)]>.
//
// Per chunk of 64 keys of the union: S = Q K^T on tensor cores, 16 rows a warp; S goes through the warp's corner of shared
// memory and leaves it row by row, lanes across keys, to the slots of that query: runs of consecutive addresses.
#pragma once

#include "gemm/element.cuh"
#include "gemm/tile.cuh"

namespace jax_na::gemm {

// kSlice: elements of the head dimension in shared memory at a time, a bucket of the head dimension; longer ones take
// several.
template <typename T, bool kPrecise, int kSlice>
struct Pointwise {
  using M = Tensor<T, kPrecise>;
  static constexpr int kStride = kSlice * sizeof(T) + M::kPad;
  static constexpr int kScoreStride = kChunk * sizeof(T) + (sizeof(T) == 2 ? 16 : 32);

  static int shared_bytes() { return 3 * kTile * kStride + kTile * kScoreStride; }

  __device__ static void run(const Params& params) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ Block block;
    __shared__ Row rows[kTile];
    __shared__ uint32_t limits[kTile];  // as Row::last, of the last key seen; only if an axis is causal
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
      rows[threadIdx.x] = empty_row(params);
      if (token >= 0) {
        rows[threadIdx.x] = tile_query_row<T>(params, block, work, token, r, false);
        if (params.any_causal) limits[threadIdx.x] = tile_query_row<T>(params, block, work, token, r, true).last;
      }
    }
    // Columns: this lane's two when it writes scores, and the one whose token this thread looks up for the next load.
    Column mine0(block, lane), mine1(block, lane + 32), ahead(block, threadIdx.x % kChunk);
    if (threadIdx.x < kChunk) k_tokens[0][threadIdx.x] = column_token(params, block, ahead, true);
    __syncthreads();

    const int kv_head = work.head / (problem.heads / problem.kv_heads);
    const int32_t q_stride = problem.heads * problem.dim, k_stride = problem.kv_heads * problem.dim;
    const T* query = static_cast<const T*>(params.per_query) + work.batch * problem.q_tokens() * q_stride +
                     int64_t(work.head) * problem.dim;
    const T* key = static_cast<const T*>(params.per_key) + work.batch * problem.kv_tokens() * k_stride +
                   int64_t(kv_head) * problem.dim;
    const int slices = (problem.dim + kSlice - 1) / kSlice;
    const uint32_t s_query = sm80::shared_address(shared_memory);
    const uint32_t s_key = s_query + kTile * kStride;
    unsigned char* const s_scores = shared_memory + 3 * kTile * kStride + warp * kWarpRows * kScoreStride;

    // A stage is one slice of the head dimension of one chunk; the query stays if there is only one slice.
    const int chunks = (block.columns + kChunk - 1) / kChunk, stages = chunks * slices;
    auto load_stage = [&](int stage) {
      const int chunk = stage / slices, d = (stage - chunk * slices) * kSlice;
      load_rows<T, kSlice>(s_key + (stage & 1) * kTile * kStride, kStride, key + d, k_stride * sizeof(T),
                           k_tokens[chunk & 1], problem.dim - d, params.aligned);
      sm80::commit_group();
    };
    load_rows<T, kSlice>(s_query, kStride, query, q_stride * sizeof(T), q_tokens, problem.dim, params.aligned);
    load_stage(0);
    ahead.advance(block);
    if (threadIdx.x < kChunk) k_tokens[1][threadIdx.x] = column_token(params, block, ahead, true);

    for (int chunk = 0; chunk < chunks; ++chunk) {
      float c[kChunk / 8][4] = {};
      for (int slice = 0; slice < slices; ++slice) {
        const int stage = chunk * slices + slice;
        sm80::wait_group<0>();
        __syncthreads();  // the stage is here, the other buffer is free, tokens of the next chunk are written
        if (slices > 1 && stage > 0) {
          load_rows<T, kSlice>(s_query, kStride, query + slice * kSlice, q_stride * sizeof(T), q_tokens,
                               problem.dim - slice * kSlice, params.aligned);
          sm80::commit_group();
          sm80::wait_group<0>();
          __syncthreads();
        }
        if (stage + 1 < stages) load_stage(stage + 1);
        if (slice == slices - 1) {  // every load that needs this chunk's tokens is under way
          ahead.advance(block);
          if (threadIdx.x < kChunk) k_tokens[chunk & 1][threadIdx.x] = column_token(params, block, ahead, true);
        }
        const uint32_t a_base = s_query + warp * kWarpRows * kStride;
        const uint32_t b_base = s_key + (stage & 1) * kTile * kStride;
#pragma unroll
        for (int k = 0; k < kSlice / M::kStep; ++k) {
          uint32_t a[4];
          M::load_a(a, a_base + k * 32, kStride, lane);
#pragma unroll
          for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t b[4];
            M::load_b(b, b_base + n * 16 * kStride + k * 32, kStride, lane);
            M::multiply(c[2 * n], a, b[0], b[1]);
            M::multiply(c[2 * n + 1], a, b[2], b[3]);
          }
        }
      }
      stage_scores(params.problem.scale, c, s_scores, lane);
      LaneKeys<T> keys;
      keys.set(params, 0, mine0.index < block.columns, mine0.x);
      keys.set(params, 1, mine1.index < block.columns, mine1.x);
      if (params.any_causal) {
        scatter_rows<true>(params.guard, s_scores, rows + warp * kWarpRows, limits + warp * kWarpRows, keys, lane);
      } else {
        scatter_rows<false>(params.guard, s_scores, rows + warp * kWarpRows, limits, keys, lane);
      }
      mine0.advance(block);
      mine1.advance(block);
    }
  }

 private:
  // The warp's 16 x 64 scores, from fragments to rows in shared memory.
  __device__ __forceinline__ static void stage_scores(float scale, const float (&c)[kChunk / 8][4], unsigned char* s_scores,
                                                      int lane) {
    unsigned char* const at = s_scores + (lane / 4) * kScoreStride + 2 * (lane % 4) * sizeof(T);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      *reinterpret_cast<Pair<T>*>(at + n * 8 * sizeof(T)) = make_pair_of<T>(c[n][0] * scale, c[n][1] * scale);
      *reinterpret_cast<Pair<T>*>(at + n * 8 * sizeof(T) + 8 * kScoreStride) =
          make_pair_of<T>(c[n][2] * scale, c[n][3] * scale);
    }
    __syncwarp();
  }

  // Each score to its slot. kCausal: slots of the window that the query does not see become zero.
  template <bool kCausal>
  __device__ __forceinline__ static void scatter_rows(uint32_t guard, const unsigned char* s_scores, const Row* rows,
                                                      const uint32_t* limits, const LaneKeys<T>& keys, int lane) {
    const unsigned char* const from = s_scores + lane * sizeof(T);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Row row = rows[r];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Bits<T> value = *reinterpret_cast<const Bits<T>*>(from + r * kScoreStride + 32 * i * sizeof(T));
        if (kCausal && !fields_inside(keys.key[i], row.first, limits[r], guard)) value = 0;
        if (fields_inside(keys.key[i], row.first, row.last, guard)) {
          store_global<T>(row.base + keys.offset[i], value);
        }
      }
    }
  }
};

}  // namespace jax_na::gemm
