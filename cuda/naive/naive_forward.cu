// Direct forward: a warp per (batch, query, head, 128 columns of the output), online softmax in float32.
//
// The lanes take 32 keys of the window at a time: each lane computes the score of its own key, then the warp walks the 32
// keys with the lanes across the output's columns. No tensor cores: the baseline that the tiled kernels are measured
// against.
#include <cuda_runtime.h>

#include <cmath>

#include "families.h"
#include "naive/neighborhood.cuh"

namespace jax_na::naive {
namespace {

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    forward_kernel(const Problem problem, const T* __restrict__ query, const T* __restrict__ key,
                   const T* __restrict__ value, const T* __restrict__ bias, const Shard* __restrict__ halo,
                   T* __restrict__ out, float* __restrict__ lse, int32_t chunks, int64_t units) {
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const bool aligned = rows_aligned<T>(problem.dim);
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, q_tokens, problem.heads, chunks);
    const int32_t kv_head = unit.head / (problem.heads / problem.kv_heads);
    const T* q = Rows<const T>(query, unit.batch, q_tokens, problem.heads, unit.head, problem.dim)[unit.token];
    const Rows<const T> keys(key, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim);
    const Rows<const T> values(value, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim_v);
    const T* table = bias_of(bias, problem, unit.batch, unit.head);
    const Columns columns(unit.chunk, lane, problem.dim_v);
    const Box box = keys_of(problem, halo, unit.token);

    float row_max = -INFINITY, row_sum = 0.0f;
    float sum[kColumnsPerLane] = {};
    for (int32_t base = 0; base < box.volume; base += kWarp) {
      float score = -INFINITY;
      int32_t token = 0;
      if (base + lane < box.volume) {
        const Box::Cell cell = box.cell(base + lane, problem);
        token = cell.token;
        score = problem.scale * dot(q, keys[token], problem.dim, aligned);
        if (table != nullptr) score += to_float(table[cell.bias]);
      }
      const float new_max = fmaxf(row_max, warp_max(score));
      // All scores so far may be -inf (a bias of -inf): then nothing has weight yet.
      const float shift = new_max == -INFINITY ? 0.0f : new_max;
      const float weight = expf(score - shift);
      const float rescale = expf(row_max - shift);
      row_max = new_max;
      row_sum = row_sum * rescale + warp_sum(weight);
#pragma unroll
      for (int i = 0; i < kColumnsPerLane; ++i) sum[i] *= rescale;
      const int32_t count = min(kWarp, box.volume - base);
#pragma unroll 8
      for (int32_t j = 0; j < count; ++j) {
        columns.add(sum, __shfl_sync(kFullMask, weight, j), values[__shfl_sync(kFullMask, token, j)]);
      }
    }
    T* o = Rows<T>(out, unit.batch, q_tokens, problem.heads, unit.head, problem.dim_v)[unit.token];
    columns.store(o, sum, row_sum > 0.0f ? 1.0f / row_sum : (row_sum == 0.0f ? 0.0f : row_sum));
    if (unit.chunk == 0 && lane == 0) {
      *Rows<float>(lse, unit.batch, q_tokens, problem.heads, unit.head, 1)[unit.token] =
          row_sum == 0.0f ? -INFINITY : row_max + logf(row_sum);
    }
  }
}

}  // namespace

Status forward(const Problem& problem, const ForwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  const Status checked = check(problem);
  if (!checked.ok()) return checked;
  return with_dtype(options.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int32_t chunks = chunks_of(problem.dim_v);
    const int64_t units = problem.batch * problem.q_tokens() * problem.heads * chunks;
    if (units == 0) return Status{};
    forward_kernel<T><<<blocks_for(units), kWarp * kWarpsPerBlock, 0, stream>>>(
        problem, static_cast<const T*>(buffers.query), static_cast<const T*>(buffers.key),
        static_cast<const T*>(buffers.value), static_cast<const T*>(buffers.bias), buffers.halo,
        static_cast<T*>(buffers.out), buffers.lse, chunks, units);
    return launch_status("naive::forward_kernel");
  });
}

}  // namespace jax_na::naive
