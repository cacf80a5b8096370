// Pointwise-neighborhood: weights[q, slot] = scale * <per_query[q], per_key[key(q, slot)]>.
//
// Per chunk of 64 keys of the union: S = Q K^T on tensor cores, 16 rows a warp; S goes through the warp's corner of shared
// memory and leaves it row by row, lanes across keys, to the slots of that query: runs of consecutive addresses.
#pragma once

#include "gemm/element.cuh"
#include "gemm/tile.cuh"

namespace jax_na::gemm {

template <typename T, bool kPrecise>
struct Pointwise {
  using M = Tensor<T, kPrecise>;
  // Elements of the head dimension in shared memory at a time: 256 bytes, so that three tiles fit every GPU.
  static constexpr int kSlice = 256 / sizeof(T);
  static constexpr int kScoreStride = kChunk * sizeof(T) + (sizeof(T) == 2 ? 16 : 32);

  __host__ __device__ static int width(int dim) {
    const int padded = (dim + M::kStep - 1) / M::kStep * M::kStep;
    return padded < kSlice ? padded : kSlice;
  }
  __host__ __device__ static int row_bytes(int dim) { return width(dim) * int(sizeof(T)) + M::kPad; }
  static int shared_bytes(int dim) { return 3 * kTile * row_bytes(dim) + kTile * kScoreStride; }

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
    __shared__ int empty;
    if (threadIdx.x == 0) empty = 0;
    __syncthreads();
    if (threadIdx.x < kMaxRank && !query_tile_axis(params, work, threadIdx.x, &block.axis[threadIdx.x])) empty = 1;
    __syncthreads();
    if (empty) return;
    if (threadIdx.x == 0) set_steps(block);
    __syncthreads();

    if (threadIdx.x < kTile) {
      int32_t r[kMaxRank];
      const int32_t token = row_token(params, block, threadIdx.x, false, r);
      q_tokens[threadIdx.x] = token;
      rows[threadIdx.x] = empty_row(params);
      if (token >= 0) {
        const int64_t base = weights_row(params, work.batch, token, work.head);
        rows[threadIdx.x] = tile_query_row(params, block, r, base, false);
        if (params.any_causal) limits[threadIdx.x] = tile_query_row(params, block, r, base, true).last;
      }
    }
    // Columns: this lane's two when it writes scores, and the one whose token this thread looks up for the next load.
    Column mine0(block, lane), mine1(block, lane + 32), ahead(block, threadIdx.x % kChunk);
    if (threadIdx.x < kChunk) k_tokens[0][threadIdx.x] = column_token(params, block, ahead, true);
    __syncthreads();

    const int kv_head = work.head / (problem.heads / problem.kv_heads);
    const int64_t q_stride = int64_t(problem.heads) * problem.dim, k_stride = int64_t(problem.kv_heads) * problem.dim;
    const T* query = static_cast<const T*>(params.per_query) + work.batch * problem.q_tokens() * q_stride +
                     int64_t(work.head) * problem.dim;
    const T* key = static_cast<const T*>(params.per_key) + work.batch * problem.kv_tokens() * k_stride +
                   int64_t(kv_head) * problem.dim;
    T* weights = static_cast<T*>(params.weights);

    const int stride = row_bytes(problem.dim), slice_width = width(problem.dim);
    const int slices = (problem.dim + kSlice - 1) / kSlice;
    const uint32_t s_query = sm80::shared_address(shared_memory);
    const uint32_t s_key = s_query + kTile * stride;
    unsigned char* const s_scores = shared_memory + 3 * kTile * stride + warp * kWarpRows * kScoreStride;

    // A stage is one slice of the head dimension of one chunk; the query stays if there is only one slice.
    const int chunks = (block.columns + kChunk - 1) / kChunk, stages = chunks * slices;
    auto load_stage = [&](int stage) {
      const int chunk = stage / slices, d = (stage - chunk * slices) * kSlice;
      load_rows(s_key + (stage & 1) * kTile * stride, stride, key + d, k_stride, k_tokens[chunk & 1], slice_width,
                problem.dim - d, params.aligned);
      sm80::commit_group();
    };
    load_rows(s_query, stride, query, q_stride, q_tokens, slice_width, problem.dim, params.aligned);
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
          load_rows(s_query, stride, query + slice * kSlice, q_stride, q_tokens, slice_width, problem.dim - slice * kSlice,
                    params.aligned);
          sm80::commit_group();
          sm80::wait_group<0>();
          __syncthreads();
        }
        if (stage + 1 < stages) load_stage(stage + 1);
        if (slice == slices - 1) {  // every load that needs this chunk's tokens is under way
          ahead.advance(block);
          if (threadIdx.x < kChunk) k_tokens[chunk & 1][threadIdx.x] = column_token(params, block, ahead, true);
        }
        const uint32_t a_base = s_query + warp * kWarpRows * stride;
        const uint32_t b_base = s_key + (stage & 1) * kTile * stride;
        for (int k = 0; k < slice_width * int(sizeof(T)); k += 32) {
          uint32_t a[4];
          M::load_a(a, a_base + k, stride, lane);
#pragma unroll
          for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t b[4];
            M::load_b(b, b_base + n * 16 * stride + k, stride, lane);
            M::multiply(c[2 * n], a, b[0], b[1]);
            M::multiply(c[2 * n + 1], a, b[2], b[3]);
          }
        }
      }
      store_scores(params, block, c, s_scores, rows + warp * kWarpRows, limits + warp * kWarpRows, mine0, mine1, lane,
                   weights);
      mine0.advance(block);
      mine1.advance(block);
    }
  }

 private:
  __device__ __forceinline__ static void store_scores(const Params& params, const Block& block,
                                                      const float (&c)[kChunk / 8][4], unsigned char* s_scores,
                                                      const Row* rows, const uint32_t* limits, const Column& mine0,
                                                      const Column& mine1, int lane, T* weights) {
    const int g = lane / 4, q = lane % 4;
    const float scale = params.problem.scale;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      unsigned char* at = s_scores + g * kScoreStride + (n * 8 + 2 * q) * sizeof(T);
      *reinterpret_cast<Pair<T>*>(at) = make_pair_of<T>(c[n][0] * scale, c[n][1] * scale);
      *reinterpret_cast<Pair<T>*>(at + 8 * kScoreStride) = make_pair_of<T>(c[n][2] * scale, c[n][3] * scale);
    }
    __syncwarp();
    uint32_t key[2];
    int32_t slot[2];
    const Column* column[2] = {&mine0, &mine1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t (&x)[kMaxRank] = column[i]->x;
      const bool exists = column[i]->index < block.columns;
      key[i] = (exists ? pack(params, x[0], x[1], x[2]) : params.nowhere) + params.guard;
      slot[i] = linear(params, x[0], x[1], x[2]);
    }
    Bits<T>* const out = reinterpret_cast<Bits<T>*>(weights);
#pragma unroll 4
    for (int r = 0; r < kWarpRows; ++r) {
      const Row row = rows[r];
      const uint32_t limit = params.any_causal ? limits[r] : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Bits<T> value = *reinterpret_cast<const Bits<T>*>(s_scores + r * kScoreStride + (lane + 32 * i) * sizeof(T));
        if (params.any_causal && !fields_inside(key[i], row.first, limit, params.guard)) value = 0;
        if (fields_inside(key[i], row.first, row.last, params.guard)) out[row.base + slot[i]] = value;
      }
    }
  }
};

}  // namespace jax_na::gemm
