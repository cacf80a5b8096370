// The two small kernels around the backward mainloop, bound by memory: head dimension and element type are run-time
// numbers. Before: lse and delta of every query, zeros for dq, and the window rule in tables (the mainloop then has no
// window arithmetic). After: dq to its own type, and rows next to a NaN again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../arch/sm90/wgmma.h"
#include "../common/call.h"
#include "backward_params_sm90.h"
#include "geometry.h"
#include "recompute_sm90.cuh"

namespace jax_na::hopper {

constexpr int kAroundThreads = 256;
constexpr int kChannelsPerThread = 8;  // one 16-byte access

// Rows of head dimension dim = 8 * lanes: lane_shift is log2(lanes).
struct RowShape {
  DType dtype;
  int32_t lane_shift;
};

__device__ __forceinline__ float2 unpack_pair(uint32_t word, DType dtype) {
  if (dtype == DType::kF16) return __half22float2(reinterpret_cast<const __half2&>(word));
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

__device__ __forceinline__ void load_channels(float (&out)[kChannelsPerThread], const void* tensor, int64_t at,
                                              DType dtype) {
  const uint4 words = static_cast<const uint4*>(tensor)[at];
  const float2 pairs[4] = {unpack_pair(words.x, dtype), unpack_pair(words.y, dtype), unpack_pair(words.z, dtype),
                           unpack_pair(words.w, dtype)};
#pragma unroll
  for (int i = 0; i < 4; ++i) out[2 * i] = pairs[i].x, out[2 * i + 1] = pairs[i].y;
}

struct PrepareParams {
  RowShape shape;
  const void* out;        // [batch, q tokens, heads, dim]
  const void* grad_out;   // like out
  const float* lse;       // [batch, q tokens, heads]
  const float* grad_lse;  // like lse, or null
  float2* stats;          // [batch, heads, q tokens]: lse * log2(e), delta = sum(out * grad_out) - grad_lse
  void* grad_query_sums;  // [batch, q tokens, heads, dim], 4 bytes each, to zero, or null
  int64_t num_rows;       // batch * q tokens * heads
  FastDivisor heads, q_tokens;
  // Only of kFixedSum, else grad_norms is null.
  float* grad_norms;  // [batch, heads, q tokens]: Euclidean norm of grad_out
  const void *key, *value;
  int32_t key_tokens, kv_heads;
  Extrema* extrema;            // [batch, kv heads], zero at launch
  FastDivisor extrema_splits;  // blocks that share one entry
  // The window tables: blocks from table_block on, those of extrema behind them.
  uint32_t table_block, extrema_block;
  uint32_t* counters;  // to zero: kNumCounters
  float2* no_stats;    // BackwardParams::no_stats
  int32_t rank, sharded;
  Axis axis[kMaxRank];
  const Shard* halo;
  int2* intervals;  // [axis][key token]
};

__device__ __forceinline__ void write_interval(const PrepareParams& params, uint32_t row) {
  if (row < kNumCounters) params.counters[row] = 0;
  if (row == 0) *params.no_stats = make_float2(kNoLse, 0.0f);
  uint32_t before = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const uint32_t length = params.axis[a].kv_len;
    if (row >= before && row < before + length) {
      const int halo_row = a - (kMaxRank - params.rank);
      const Shard shard = params.sharded && halo_row >= 0 ? params.halo[halo_row] : Shard{0, 0, params.axis[a].q_len};
      const TokenWindow seen = token_window<Side::kKeys>(params.axis[a], shard, row - before);
      params.intervals[row] = make_int2(seen.begin, seen.end);
    }
    before += length;
  }
}

// Sum over the lanes of a row; every lane has it.
__device__ __forceinline__ float row_sum(float x, int32_t lane_shift) {
  for (int distance = 1 << lane_shift >> 1; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// What is not finite does not count: it makes the gradients of those who see it NaN anyway, and must not coarsen the
// others'.
__device__ __forceinline__ void find_extrema(const PrepareParams& params, uint32_t block) {
  const int32_t lane_shift = params.shape.lane_shift;
  const int32_t rows = kAroundThreads >> lane_shift;  // of this block at a time
  uint32_t entry = block;
  const int32_t split = params.extrema_splits.split(entry);
  const uint32_t batch = entry / params.kv_heads, head = entry % params.kv_heads;
  float largest_key = 0.0f, largest_row = 0.0f;
  for (int32_t first = split * rows; first < params.key_tokens; first += rows * params.extrema_splits.divisor) {
    const int32_t token = first + (threadIdx.x >> lane_shift);
    float key[kChannelsPerThread] = {}, value[kChannelsPerThread] = {}, squares = 0.0f;
    if (token < params.key_tokens) {
      const int64_t row = (int64_t(batch) * params.key_tokens + token) * params.kv_heads + head;
      const int64_t at = (row << lane_shift) + (threadIdx.x & ((1 << lane_shift) - 1));
      load_channels(key, params.key, at, params.shape.dtype);
      load_channels(value, params.value, at, params.shape.dtype);
    }
#pragma unroll
    for (int i = 0; i < kChannelsPerThread; ++i) {
      if (isfinite(key[i])) largest_key = fmaxf(largest_key, fabsf(key[i]));
      if (isfinite(value[i])) squares = fmaf(value[i], value[i], squares);
    }
    largest_row = fmaxf(largest_row, row_sum(squares, lane_shift));
  }
  // Magnitudes compare as their bits do.
  const uint32_t of_keys = __reduce_max_sync(~0u, __float_as_uint(largest_key));
  const uint32_t of_rows = __reduce_max_sync(~0u, __float_as_uint(sqrtf(largest_row)));
  if (threadIdx.x % 32 != 0) return;
  atomicMax(reinterpret_cast<uint32_t*>(&params.extrema[entry].key), of_keys);
  atomicMax(reinterpret_cast<uint32_t*>(&params.extrema[entry].value_row), of_rows);
}

static __global__ void __launch_bounds__(kAroundThreads)
    backward_prepare_kernel(const __grid_constant__ PrepareParams params) {
  if (blockIdx.x >= params.extrema_block) return find_extrema(params, blockIdx.x - params.extrema_block);
  if (blockIdx.x >= params.table_block) {
    return write_interval(params, (blockIdx.x - params.table_block) * kAroundThreads + threadIdx.x);
  }
  const int64_t at = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x;
  const int64_t row = at >> params.shape.lane_shift;
  float sum = 0.0f, squares = 0.0f;
  if (row < params.num_rows) {
    float out[kChannelsPerThread], grad[kChannelsPerThread];
    load_channels(out, params.out, at, params.shape.dtype);
    load_channels(grad, params.grad_out, at, params.shape.dtype);
#pragma unroll
    for (int i = 0; i < kChannelsPerThread; ++i) {
      sum = fmaf(out[i], grad[i], sum);
      squares = fmaf(grad[i], grad[i], squares);
    }
    if (params.grad_query_sums != nullptr) {
      float4* zero = static_cast<float4*>(params.grad_query_sums) + 2 * at;
      zero[0] = zero[1] = float4{};
    }
  }
  sum = row_sum(sum, params.shape.lane_shift);
  if (params.grad_norms != nullptr) squares = row_sum(squares, params.shape.lane_shift);
  if (row < params.num_rows && (at & ((1 << params.shape.lane_shift) - 1)) == 0) {
    uint32_t rest = uint32_t(row);
    const uint32_t head = params.heads.split(rest);
    const uint32_t token = params.q_tokens.split(rest);
    const int64_t target = (int64_t(rest) * params.heads.divisor + head) * params.q_tokens.divisor + token;
    const float delta = sum - (params.grad_lse != nullptr ? params.grad_lse[row] : 0.0f);
    params.stats[target] = make_float2(params.lse[row] * 1.4426950408889634f, delta);
    if (params.grad_norms != nullptr) params.grad_norms[target] = sqrtf(squares);
  }
}

// What is left to do after the mainloop. dq = scale * sum, in its own type, by the blocks before repair_block, if there are
// sums. Rows with a NaN are computed again: of dq here, of what the mainloop wrote by the blocks that follow, if it found
// one.
struct FinishParams {
  RowShape shape;
  const void* sums;  // like grad_query, 4 bytes each, or null: dq is as the mainloop wrote it
  RowProblem rows;
  const uint32_t* nan_found;
  uint32_t repair_block;
  int64_t num_chunks;  // of eight channels of dq
  int64_t num_query_rows, num_key_rows;
  // Only of kFixedSum, else grad_norms is null.
  const float* grad_norms;
  const Extrema* extrema;
  FastDivisor heads, q_tokens, group_heads;
};

template <typename T>
__device__ __forceinline__ bool row_has_nan(const void* tensor, int64_t row, int32_t dim) {
  return BackwardVector::load<T>(tensor, row, dim).any_nan();
}

// By a warp: its share of the rows that the mainloop wrote.
template <typename T>
__device__ __noinline__ void repair_rows(const FinishParams& params, int64_t first, int64_t step) {
  const RowProblem& rows = params.rows;
  for (int64_t row = first; row < params.num_key_rows; row += step) {
    if (row_has_nan<T>(rows.grad_key, row, rows.dim) || row_has_nan<T>(rows.grad_value, row, rows.dim)) {
      recompute_grad_key_value<T>(rows, row);
    }
  }
  if (params.sums != nullptr) return;
  for (int64_t row = first; row < params.num_query_rows; row += step) {
    if (row_has_nan<T>(rows.grad_query, row, rows.dim)) recompute_grad_query<T>(rows, row);
  }
}

// The unit of a row's fixed-point sums; NaN if the row has one.
__device__ __forceinline__ float unit_of_row(const FinishParams& params, uint32_t row) {
  const uint32_t head = params.heads.split(row);
  const uint32_t token = params.q_tokens.split(row);
  const int64_t at = (int64_t(row) * params.heads.divisor + head) * params.q_tokens.divisor + token;
  const float norm = params.grad_norms[at];
  if (isnan(norm)) return norm;
  const Extrema extrema = params.extrema[int64_t(row) * params.rows.kv_heads + params.group_heads.divide(head)];
  return power_of_two(fixed_point_exponent(norm, params.rows.stats[at].y, extrema) - 30);
}

template <typename T>
__device__ __forceinline__ void finish_queries(const FinishParams& params) {
  const RowProblem& rows = params.rows;
  const int64_t at = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x;
  uint32_t kept = 0;
  if (at < params.num_chunks) {
    const bool fixed = params.grad_norms != nullptr;
    const float factor = rows.scale * (fixed ? unit_of_row(params, uint32_t(at >> params.shape.lane_shift)) : 1.0f);
    const auto pack = [&](uint32_t even, uint32_t odd) {
      const float2 x =
          fixed ? unpack_fixed(make_uint2(even, odd)) : make_float2(__uint_as_float(even), __uint_as_float(odd));
      const uint32_t pair = sm90::pack_pair<T>(x.x * factor, x.y * factor);
      kept = keep_nan<T>(kept, pair);
      return pair;
    };
    const uint4* sums = static_cast<const uint4*>(params.sums) + 2 * at;
    const uint4 a = sums[0], b = sums[1];
    static_cast<uint4*>(rows.grad_query)[at] = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
  }
  const int lanes = 1 << params.shape.lane_shift;  // of a row
  for (uint32_t nan = __ballot_sync(~0u, kept_nan<T>(kept)); nan != 0;) {
    const int lane = (__ffs(nan) - 1) / lanes * lanes;
    recompute_grad_query<T>(rows, (at - threadIdx.x % 32 + lane) / lanes);
    nan &= ~(((1u << lanes) - 1) << lane);
  }
}

template <typename T>
__device__ __forceinline__ void finish(const FinishParams& params) {
  if (blockIdx.x < params.repair_block) return finish_queries<T>(params);
  if (*params.nan_found == 0) return;
  constexpr int kWarps = kAroundThreads / 32;
  repair_rows<T>(params, int64_t(blockIdx.x - params.repair_block) * kWarps + threadIdx.x / 32,
                 int64_t(gridDim.x - params.repair_block) * kWarps);
}

static __global__ void __launch_bounds__(kAroundThreads, 6)
    backward_finish_kernel(const __grid_constant__ FinishParams params) {
  params.shape.dtype == DType::kF16 ? finish<__half>(params) : finish<__nv_bfloat16>(params);
}

}  // namespace jax_na::hopper
