// The two small kernels around the backward mainloop. Before: lse and delta of every query, zeros for dq, and the window
// rule in tables (the mainloop then has no window arithmetic). After: dq to its own type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backward_params_sm90.h"
#include "geometry.h"

namespace jax_na::hopper {

constexpr int kAroundThreads = 256;
constexpr int kChannelsPerThread = 8;  // one 16-byte access

__device__ __forceinline__ void unpack(float (&out)[8], const uint4& in, const __half*) {
  const __half2* pairs = reinterpret_cast<const __half2*>(&in);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void unpack(float (&out)[8], const uint4& in, const __nv_bfloat16*) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&in);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}

struct PrepareParams {
  const void* out;        // [batch, q tokens, heads, dim]
  const void* grad_out;   // like out
  const float* lse;       // [batch, q tokens, heads]
  const float* grad_lse;  // like lse, or null
  float2* stats;          // [batch, heads, q tokens]: lse * log2(e), delta = sum(out * grad_out) - grad_lse
  float* grad_query_f32;  // [batch, q tokens, heads, dim] to zero, or null
  int64_t num_rows;       // batch * q tokens * heads
  FastDivisor heads, q_tokens;
  uint32_t* tile_counters;  // one per pass, to zero
  // The window tables: blocks from table_block on.
  uint32_t table_block;
  int32_t rank, sharded;
  Axis axis[kMaxRank];
  const Shard* halo;
  int2* queries_of_keys;  // [axis][key token]
  int2* keys_of_queries;  // [axis][query token], or null
};

// The inner ordinals [x, y) that outer token x of axis a needs. Tokens of a halo beyond the ends of the global axis need
// none, but keep both ends non-decreasing along the axis.
template <BackwardPass kPass>
__device__ __forceinline__ int2 interval_of_token(const PrepareParams& params, int a, int32_t x) {
  const Axis& axis = params.axis[a];
  const int first_axis = kMaxRank - params.rank;
  Shard shard{0, 0, axis.q_len};
  if (params.sharded && a >= first_axis) shard = params.halo[a - first_axis];
  constexpr bool kKeysPass = kPass == BackwardPass::kKeys;
  const int32_t outer_offset = kKeysPass ? shard.kv_offset : shard.q_offset;
  int32_t group = (outer_offset + x) % axis.dilation;
  group += group < 0 ? axis.dilation : 0;
  const int32_t i = (outer_offset + x - group) / axis.dilation;  // group coordinate
  const int32_t length = group_length(shard.length, axis.dilation, group);
  const SideAxis inner =
      side_axis(kKeysPass ? shard.q_offset : shard.kv_offset, kKeysPass ? axis.q_len : axis.kv_len, axis.dilation, group);
  if (length == 0) return make_int2(0, 0);
  Interval seen = inner_of_outer<kPass>(axis, length, min(max(i, 0), length - 1));
  if (i < 0) seen.end = seen.begin;
  if (i >= length) seen.begin = seen.end;
  return make_int2(min(max(seen.begin - inner.base, 0), inner.count), min(max(seen.end - inner.base, 0), inner.count));
}

template <BackwardPass kPass>
__device__ __forceinline__ void write_interval(const PrepareParams& params, int2* table, uint32_t row) {
  if (table == nullptr) return;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const uint32_t length = kPass == BackwardPass::kKeys ? params.axis[a].kv_len : params.axis[a].q_len;
    if (row < length) {
      *(table + row) = interval_of_token<kPass>(params, a, row);
      return;
    }
    row -= length;
    table += length;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kAroundThreads) backward_prepare_kernel(const __grid_constant__ PrepareParams params) {
  if (blockIdx.x >= params.table_block) {
    const uint32_t row = (blockIdx.x - params.table_block) * kAroundThreads + threadIdx.x;
    if (row < 2) params.tile_counters[row] = 0;
    write_interval<BackwardPass::kKeys>(params, params.queries_of_keys, row);
    write_interval<BackwardPass::kQueries>(params, params.keys_of_queries, row);
    return;
  }
  constexpr int kLanes = D / kChannelsPerThread;  // per row
  const int64_t at = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x;
  const int64_t row = at / kLanes;
  float sum = 0.0f;
  if (row < params.num_rows) {
    float out[8], grad[8];
    unpack(out, static_cast<const uint4*>(params.out)[at], static_cast<const T*>(nullptr));
    unpack(grad, static_cast<const uint4*>(params.grad_out)[at], static_cast<const T*>(nullptr));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(out[i], grad[i], sum);
    if (params.grad_query_f32 != nullptr) {
      float4* zero = reinterpret_cast<float4*>(params.grad_query_f32) + 2 * at;
      zero[0] = zero[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (row < params.num_rows && threadIdx.x % kLanes == 0) {
    uint32_t rest = uint32_t(row);
    const uint32_t head = params.heads.split(rest);
    const uint32_t token = params.q_tokens.split(rest);
    const float delta = sum - (params.grad_lse != nullptr ? params.grad_lse[row] : 0.0f);
    params.stats[(int64_t(rest) * params.heads.divisor + head) * params.q_tokens.divisor + token] =
        make_float2(params.lse[row] * 1.4426950408889634f, delta);
  }
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// dq = scale * float32 sum, in T.
template <typename T>
__global__ void __launch_bounds__(kAroundThreads)
    backward_convert_kernel(const float* __restrict__ sums, T* __restrict__ grad_query, float scale, int64_t num_chunks) {
  const int64_t at = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x;
  if (at >= num_chunks) return;
  const float4 a = reinterpret_cast<const float4*>(sums)[2 * at], b = reinterpret_cast<const float4*>(sums)[2 * at + 1];
  alignas(16) T out[8] = {from_float<T>(a.x * scale), from_float<T>(a.y * scale), from_float<T>(a.z * scale),
                          from_float<T>(a.w * scale), from_float<T>(b.x * scale), from_float<T>(b.y * scale),
                          from_float<T>(b.z * scale), from_float<T>(b.w * scale)};
  reinterpret_cast<uint4*>(grad_query)[at] = *reinterpret_cast<const uint4*>(out);
}

}  // namespace jax_na::hopper
