// Direct backward, by recomputation from lse. Deterministic: every gradient element is summed by one warp (or block) in a
// fixed order, no atomics.
//
//   delta = sum(out * grad_out) - grad_lse     per query and head                    delta_kernel
//   P = exp(scale q.k + bias - lse),  dS = P (grad_out . v - delta)
//   grad_query = scale sum_keys dS k                                                 grad_query_kernel, over the keys a
//   query sees grad_key = scale sum_queries dS q,  grad_value = sum_queries P grad_out          grad_key_value_kernel, over
//   the queries that see
//                                                                                    a key (inverse window rule) and the
//                                                                                    head group
//   grad_bias[entry] = sum over queries whose window holds query + entry of dS       grad_bias_kernel
//
// Workspace: float[batch * q tokens * heads], delta.
#include <cuda_runtime.h>

#include <cmath>

#include "families.h"
#include "naive/neighborhood.cuh"

namespace jax_na::naive {
namespace {

template <typename T>
struct Tensors {
  const T *query, *key, *value, *bias, *out, *grad_out;
  const float *lse, *grad_lse;
  const Shard* halo;
  float* delta;
};

// P of one (query, key) pair, and dS.
struct Pair {
  float p, ds;
};

template <typename T>
__device__ inline Pair pair(const Problem& problem, const T* q, const T* k, const T* v, const T* grad_out, float bias,
                            float lse, float delta, bool aligned, bool aligned_v) {
  const float score = problem.scale * dot(q, k, problem.dim, aligned) + bias;
  const float p = lse == -INFINITY ? 0.0f : expf(score - lse);
  return {p, p * (dot(grad_out, v, problem.dim_v, aligned_v) - delta)};
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    delta_kernel(const Problem problem, const Tensors<T> in, int64_t rows) {
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; row < rows; row += step) {
    const int64_t offset = row * problem.dim_v;
    float sum = 0.0f;
    for (int32_t d = lane; d < problem.dim_v; d += kWarp) {
      sum = fmaf(to_float(in.out[offset + d]), to_float(in.grad_out[offset + d]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) in.delta[row] = sum - (in.grad_lse != nullptr ? in.grad_lse[row] : 0.0f);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    grad_query_kernel(const Problem problem, const Tensors<T> in, T* __restrict__ grad_query, int32_t chunks,
                      int64_t units) {
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const bool aligned = rows_aligned<T>(problem.dim), aligned_v = rows_aligned<T>(problem.dim_v);
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, q_tokens, problem.heads, chunks);
    const int32_t kv_head = unit.head / (problem.heads / problem.kv_heads);
    const T* q = Rows<const T>(in.query, unit.batch, q_tokens, problem.heads, unit.head, problem.dim)[unit.token];
    const T* grad_out =
        Rows<const T>(in.grad_out, unit.batch, q_tokens, problem.heads, unit.head, problem.dim_v)[unit.token];
    const float lse = *Rows<const float>(in.lse, unit.batch, q_tokens, problem.heads, unit.head, 1)[unit.token];
    const float delta = *Rows<const float>(in.delta, unit.batch, q_tokens, problem.heads, unit.head, 1)[unit.token];
    const Rows<const T> keys(in.key, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim);
    const Rows<const T> values(in.value, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim_v);
    const T* table = bias_of(in.bias, problem, unit.batch, unit.head);
    const Columns columns(unit.chunk, lane, problem.dim);
    const Box box = keys_of(problem, in.halo, unit.token);

    float sum[kColumnsPerLane] = {};
    for (int32_t base = 0; base < box.volume; base += kWarp) {
      float ds = 0.0f;
      int32_t token = 0;
      if (base + lane < box.volume) {
        const Box::Cell cell = box.cell(base + lane, problem);
        token = cell.token;
        const float bias = table != nullptr ? to_float(table[cell.bias]) : 0.0f;
        ds = pair(problem, q, keys[token], values[token], grad_out, bias, lse, delta, aligned, aligned_v).ds;
      }
      const int32_t count = min(kWarp, box.volume - base);
#pragma unroll 8
      for (int32_t j = 0; j < count; ++j) {
        columns.add(sum, __shfl_sync(kFullMask, ds, j), keys[__shfl_sync(kFullMask, token, j)]);
      }
    }
    columns.store(Rows<T>(grad_query, unit.batch, q_tokens, problem.heads, unit.head, problem.dim)[unit.token], sum,
                  problem.scale);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    grad_key_value_kernel(const Problem problem, const Tensors<T> in, T* __restrict__ grad_key, T* __restrict__ grad_value,
                          int32_t chunks, int64_t units) {
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const int32_t group = problem.heads / problem.kv_heads;
  const bool aligned = rows_aligned<T>(problem.dim), aligned_v = rows_aligned<T>(problem.dim_v);
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, kv_tokens, problem.kv_heads, chunks);
    const T* k = Rows<const T>(in.key, unit.batch, kv_tokens, problem.kv_heads, unit.head, problem.dim)[unit.token];
    const T* v = Rows<const T>(in.value, unit.batch, kv_tokens, problem.kv_heads, unit.head, problem.dim_v)[unit.token];
    const Columns columns(unit.chunk, lane, problem.dim), columns_v(unit.chunk, lane, problem.dim_v);
    const Box box = queries_of(problem, in.halo, unit.token);

    float sum_k[kColumnsPerLane] = {}, sum_v[kColumnsPerLane] = {};
    for (int32_t head = unit.head * group; head < (unit.head + 1) * group; ++head) {
      const Rows<const T> queries(in.query, unit.batch, q_tokens, problem.heads, head, problem.dim);
      const Rows<const T> grads_out(in.grad_out, unit.batch, q_tokens, problem.heads, head, problem.dim_v);
      const Rows<const float> lses(in.lse, unit.batch, q_tokens, problem.heads, head, 1);
      const Rows<const float> deltas(in.delta, unit.batch, q_tokens, problem.heads, head, 1);
      const T* table = bias_of(in.bias, problem, unit.batch, head);
      for (int32_t base = 0; base < box.volume; base += kWarp) {
        Pair mine{0.0f, 0.0f};
        int32_t token = 0;
        if (base + lane < box.volume) {
          const Box::Cell cell = box.cell(base + lane, problem);
          token = cell.token;
          const float bias = table != nullptr ? to_float(table[cell.bias]) : 0.0f;
          mine =
              pair(problem, queries[token], k, v, grads_out[token], bias, *lses[token], *deltas[token], aligned, aligned_v);
        }
        const int32_t count = min(kWarp, box.volume - base);
#pragma unroll 4
        for (int32_t j = 0; j < count; ++j) {
          const int32_t t = __shfl_sync(kFullMask, token, j);
          columns.add(sum_k, __shfl_sync(kFullMask, mine.ds, j), queries[t]);
          columns_v.add(sum_v, __shfl_sync(kFullMask, mine.p, j), grads_out[t]);
        }
      }
    }
    columns.store(Rows<T>(grad_key, unit.batch, kv_tokens, problem.kv_heads, unit.head, problem.dim)[unit.token], sum_k,
                  problem.scale);
    columns_v.store(Rows<T>(grad_value, unit.batch, kv_tokens, problem.kv_heads, unit.head, problem.dim_v)[unit.token],
                    sum_v, 1.0f);
  }
}

// A block per (bias batch, head, entry): over every query that has the key at this relative position in its window.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    grad_bias_kernel(const Problem problem, const Tensors<T> in, T* __restrict__ grad_bias, int64_t num_entries,
                     int64_t units) {
  __shared__ float partial[kWarpsPerBlock];
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const int64_t batch_per_bias = problem.batch / problem.bias_batch;
  const int32_t group = problem.heads / problem.kv_heads;
  const bool aligned = rows_aligned<T>(problem.dim), aligned_v = rows_aligned<T>(problem.dim_v);
  for (int64_t index = blockIdx.x; index < units; index += gridDim.x) {
    const int64_t entry = index % num_entries;
    const int32_t head = static_cast<int32_t>(index / num_entries % problem.heads);
    const int64_t first_batch = index / num_entries / problem.heads * batch_per_bias;
    int32_t relative[kMaxRank];  // index into the table, per axis
    int64_t rest = entry;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int32_t size = 2 * problem.axis[a].window - 1;
      relative[a] = static_cast<int32_t>(rest % size);
      rest /= size;
    }
    const float bias = to_float(in.bias[index]);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < batch_per_bias * q_tokens; i += blockDim.x) {
      const int64_t batch = first_batch + i / q_tokens, token = i % q_tokens;
      const Box box = keys_of(problem, in.halo, token);
      int64_t key_token = 0;
      bool seen = true;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t t = relative[a] - box.axis[a].bias_first;
        seen &= t >= 0 && t < box.axis[a].count;
        key_token = key_token * box.len[a] + box.axis[a].first + int64_t(t) * box.axis[a].step;
      }
      if (!seen) continue;
      const int64_t row = (batch * q_tokens + token) * problem.heads + head;
      sum += pair(problem, in.query + row * problem.dim,
                  Rows<const T>(in.key, batch, kv_tokens, problem.kv_heads, head / group, problem.dim)[key_token],
                  Rows<const T>(in.value, batch, kv_tokens, problem.kv_heads, head / group, problem.dim_v)[key_token],
                  in.grad_out + row * problem.dim_v, bias, in.lse[row], in.delta[row], aligned, aligned_v)
                 .ds;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      for (float part : partial) total += part;
      grad_bias[index] = from_float<T>(total);
    }
    __syncthreads();
  }
}

}  // namespace

Status backward(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  const Status checked = check(problem);
  if (!checked.ok()) return checked;
  const int64_t rows = problem.batch * problem.q_tokens() * problem.heads;
  if (buffers.forward.workspace_bytes < rows * int64_t(sizeof(float))) {
    return Status::error("workspace of " + std::to_string(buffers.forward.workspace_bytes) + " bytes, " +
                         std::to_string(rows * int64_t(sizeof(float))) + " needed");
  }
  return with_dtype(options.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const ForwardBuffers& given = buffers.forward;
    const Tensors<T> in{static_cast<const T*>(given.query),
                        static_cast<const T*>(given.key),
                        static_cast<const T*>(given.value),
                        static_cast<const T*>(given.bias),
                        static_cast<const T*>(given.out),
                        static_cast<const T*>(buffers.grad_out),
                        given.lse,
                        buffers.grad_lse,
                        given.halo,
                        static_cast<float*>(given.workspace)};
    constexpr int kThreads = kWarp * kWarpsPerBlock;
    if (rows > 0) {
      delta_kernel<T><<<blocks_for(rows), kThreads, 0, stream>>>(problem, in, rows);
      Status status = launch_status("naive::delta_kernel");
      if (!status.ok()) return status;
      const int32_t chunks = chunks_of(problem.dim);
      grad_query_kernel<T><<<blocks_for(rows * chunks), kThreads, 0, stream>>>(
          problem, in, static_cast<T*>(buffers.grad_query), chunks, rows * chunks);
      status = launch_status("naive::grad_query_kernel");
      if (!status.ok()) return status;
    }
    const int32_t chunks = chunks_of(problem.dim > problem.dim_v ? problem.dim : problem.dim_v);
    const int64_t units = problem.batch * problem.kv_tokens() * problem.kv_heads * chunks;
    if (units > 0) {
      grad_key_value_kernel<T><<<blocks_for(units), kThreads, 0, stream>>>(
          problem, in, static_cast<T*>(buffers.grad_key), static_cast<T*>(buffers.grad_value), chunks, units);
      const Status status = launch_status("naive::grad_key_value_kernel");
      if (!status.ok()) return status;
    }
    if (buffers.grad_bias != nullptr) {
      int64_t num_entries = 1;
      for (const Axis& axis : problem.axis) num_entries *= 2 * axis.window - 1;
      const int64_t bias_units = problem.bias_batch * problem.heads * num_entries;
      grad_bias_kernel<T>
          <<<static_cast<unsigned>(bias_units < kMaxBlocks ? bias_units : kMaxBlocks), kThreads, 0, stream>>>(
              problem, in, static_cast<T*>(buffers.grad_bias), num_entries, bias_units);
      return launch_status("naive::grad_bias_kernel");
    }
    return Status{};
  });
}

}  // namespace jax_na::naive
