// The two small kernels around the backward mainloop. Before: lse and delta of every query, zeros for dq, and the window
// rule in tables (the mainloop then has no window arithmetic). After: dq to its own type, and rows next to a NaN again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../arch/sm90/wgmma.h"
#include "backward_params_sm90.h"
#include "geometry.h"
#include "recompute_sm90.cuh"

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
  uint32_t* counters;  // to zero: kNumCounters
  // The window tables: blocks from table_block on.
  uint32_t table_block;
  int32_t rank, sharded;
  Axis axis[kMaxRank];
  const Shard* halo;
  int2* queries_of_keys;  // [axis][key token]
  int2* keys_of_queries;  // [axis][query token], or null
};

template <BackwardPass kPass>
__device__ __forceinline__ void write_interval(const PrepareParams& params, int2* table, uint32_t row) {
  if (table == nullptr) return;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const uint32_t length = kPass == BackwardPass::kKeys ? params.axis[a].kv_len : params.axis[a].q_len;
    if (row < length) {
      const int halo_row = a - (kMaxRank - params.rank);
      const Shard shard = params.sharded && halo_row >= 0 ? params.halo[halo_row] : Shard{0, 0, params.axis[a].q_len};
      const InnerTokens seen = inner_tokens<kPass>(params.axis[a], shard, row);
      table[row] = make_int2(seen.begin, seen.end);
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
    if (row < kNumCounters) params.counters[row] = 0;
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

// What is left to do after the mainloop. dq = scale * float32 sum, in T, by the blocks before repair_block, if there is a
// sum. Rows with a NaN are computed again: of dq here, of what the mainloop wrote by the blocks that follow, if it found
// one.
struct FinishParams {
  const float* grad_query_f32;  // or null: dq is as the mainloop wrote it
  RowProblem rows;
  const uint32_t* nan_found;
  uint32_t repair_block;
  int64_t num_chunks;  // of eight channels of dq
  int64_t num_query_rows, num_key_rows;
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
  if (params.grad_query_f32 != nullptr) return;
  for (int64_t row = first; row < params.num_query_rows; row += step) {
    if (row_has_nan<T>(rows.grad_query, row, rows.dim)) recompute_grad_query<T>(rows, row);
  }
}

template <typename T>
__global__ void __launch_bounds__(kAroundThreads, 6) backward_finish_kernel(const __grid_constant__ FinishParams params) {
  if (blockIdx.x >= params.repair_block) {
    if (*params.nan_found == 0) return;
    constexpr int kWarps = kAroundThreads / 32;
    repair_rows<T>(params, int64_t(blockIdx.x - params.repair_block) * kWarps + threadIdx.x / 32,
                   int64_t(gridDim.x - params.repair_block) * kWarps);
    return;
  }
  const RowProblem& rows = params.rows;
  const int64_t at = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x;
  uint32_t kept = 0;
  if (at < params.num_chunks) {
    const float4* sums = reinterpret_cast<const float4*>(params.grad_query_f32) + 2 * at;
    const auto pack = [&](float a, float b) {
      const uint32_t pair = sm90::pack_pair<T>(a * rows.scale, b * rows.scale);
      kept = keep_nan<T>(kept, pair);
      return pair;
    };
    const float4 a = sums[0], b = sums[1];
    static_cast<uint4*>(rows.grad_query)[at] = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
  }
  const int lanes = rows.dim / kChannelsPerThread;  // of a row
  for (uint32_t nan = __ballot_sync(~0u, kept_nan<T>(kept)); nan != 0;) {
    const int lane = (__ffs(nan) - 1) / lanes * lanes;
    recompute_grad_query<T>(rows, (at - threadIdx.x % 32 + lane) / lanes);
    nan &= ~(((1u << lanes) - 1) << lane);
  }
}

}  // namespace jax_na::hopper
