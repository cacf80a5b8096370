// From the weights to a tile in shared memory: the gather that neighborhood and inverse share, and their epilogue.
#pragma once

#include "gemm/element.cuh"
#include "gemm/tile.cuh"

namespace jax_na::gemm {

// Where the products of one chunk are summed: in the running sums themselves, or (kPrecise) apart. Tensor cores truncate as
// they accumulate, so over thousands of keys a float32 sum would drift; added chunk by chunk, rounded, it does not.
template <bool kPrecise, int kTiles>
struct Accumulator {
  float (&c)[kTiles][4];
  __device__ __forceinline__ explicit Accumulator(float (&running)[kTiles][4]) : c(running) {}
  __device__ __forceinline__ void add_to(float (&)[kTiles][4]) const {}
};

template <int kTiles>
struct Accumulator<true, kTiles> {
  float c[kTiles][4] = {};
  __device__ __forceinline__ explicit Accumulator(float (&)[kTiles][4]) {}
  __device__ __forceinline__ void add_to(float (&running)[kTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) running[n][i] += c[n][i];
    }
  }
};

// Blocks an SM shall hold. float32: shared memory allows three, whose registers the gather's loads fill.
template <typename T, int kColumns>
constexpr int kMinBlocks = sizeof(T) == 4 || kColumns > 64 ? 3 : 4;

// Sixteen rows of 64 columns: element (r, column) is the weight that query `rows[r]` gives the key of the column, or zero.
// PERF: eight rows (float32: all) are loaded before any is stored, so that sixteen (32) loads a lane are under way. With
// eight rows inverse takes 25 % longer in float32 (H200, 2d-128-w32-d64).
template <typename T>
__device__ __forceinline__ void gather_rows(uint32_t guard, const Row* rows, const LaneKeys<T>& keys, unsigned char* to,
                                            int stride, int lane) {
  constexpr int kBatch = sizeof(T) == 4 ? kWarpRows : 8;
  unsigned char* const to_lane = to + lane * sizeof(T);
#pragma unroll
  for (int first = 0; first < kWarpRows; first += kBatch) {
    Bits<T> value[kBatch][2];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const Row row = rows[first + r];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        value[r][i] = 0;
        if (fields_inside(keys.key[i], row.first, row.last, guard)) {
          value[r][i] = __ldg(reinterpret_cast<const Bits<T>*>(row.base + keys.offset[i]));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<Bits<T>*>(to_lane + (first + r) * stride + 32 * i * sizeof(T)) = value[r][i];
      }
    }
  }
}

// Accumulators of a warp's 16 rows to `out + token * token_stride`, columns [column, column + 8 * kTiles) below `dim`.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(const Params& params, const float (&c)[kTiles][4], T* out, int64_t token_stride,
                                           const int32_t* tokens, int column, int dim, int lane) {
  const int g = lane / 4, q = lane % 4;
  const float scale = params.problem.scale;
  const bool paired = dim % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t token = tokens[g + 8 * half];
    if (token < 0) continue;
    T* const row = out + token * token_stride;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int d = column + n * 8 + 2 * q;
      const Pair<T> pair = make_pair_of<T>(c[n][2 * half] * scale, c[n][2 * half + 1] * scale);
      if (paired && d < dim) {
        *reinterpret_cast<Pair<T>*>(row + d) = pair;
      } else {
        if (d < dim) row[d] = pair.low;
        if (d + 1 < dim) row[d + 1] = pair.high;
      }
    }
  }
}

}  // namespace jax_na::gemm
