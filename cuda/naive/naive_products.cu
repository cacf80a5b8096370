// Direct kernels of the three unfused products: a warp per row of the result, its lanes across the slots (pointwise) or
// across the columns (neighborhood, inverse). No tensor cores, no shared memory: the baseline of cuda/gemm, and what serves
// where the tiles of cuda/gemm do not. Deterministic.
#include <cuda_runtime.h>

#include "common/product.h"
#include "naive/neighborhood.cuh"

namespace jax_na::naive {
namespace {

constexpr int kThreads = kWarp * kWarpsPerBlock;

// Where the slots of a query's window lie: global start per axis, local key of slot 0, and how many slots are visible.
struct Window {
  int32_t origin[kMaxRank];   // local key token of the window's first key; negative or large if outside a shard
  int32_t visible[kMaxRank];  // keys the query sees
};

__device__ inline Window window_of(const Problem& problem, const Shard* halo, int64_t token) {
  Window window;
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const Axis& axis = problem.axis[a];
    const Shard shard = shard_of(problem, halo, a);
    const int32_t position = shard.q_offset + static_cast<int32_t>(token % axis.q_len);
    token /= axis.q_len;
    const int32_t group = position % axis.dilation, i = position / axis.dilation;
    const int32_t length = group_length(shard.length, axis.dilation, group);
    const Interval seen = keys_of_query(i, length, axis.window, axis.stride, axis.causal);
    window.origin[a] = seen.begin * axis.dilation + group - shard.kv_offset;
    window.visible[a] = seen.end - seen.begin;
  }
  return window;
}

// Local key token in slot `slot`, or -1 if the query does not see one there.
__device__ inline int32_t key_in_slot(const Problem& problem, const Window& window, int32_t slot) {
  int32_t c[kMaxRank];
  c[2] = slot % problem.axis[2].window;
  slot /= problem.axis[2].window;
  c[1] = slot % problem.axis[1].window;
  c[0] = slot / problem.axis[1].window;
  int32_t token = 0;
  bool inside = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t position = window.origin[a] + c[a] * axis.dilation;
    inside = inside && c[a] < window.visible[a] && position >= 0 && position < axis.kv_len;
    token = token * axis.kv_len + position;
  }
  return inside ? token : -1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pointwise_kernel(const Problem problem, const T* __restrict__ query, const T* __restrict__ key, const Shard* halo,
                     T* __restrict__ weights, int32_t volume, int64_t units) {
  const int32_t lane = threadIdx.x % kWarp;
  const bool aligned = rows_aligned<T>(problem.dim);
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, q_tokens, problem.heads, 1);
    const int32_t kv_head = unit.head / (problem.heads / problem.kv_heads);
    const T* q = Rows<const T>(query, unit.batch, q_tokens, problem.heads, unit.head, problem.dim)[unit.token];
    const Rows<const T> keys(key, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim);
    T* row = Rows<T>(weights, unit.batch, q_tokens, problem.heads, unit.head, volume)[unit.token];
    const Window window = window_of(problem, halo, unit.token);
    for (int32_t slot = lane; slot < volume; slot += kWarp) {
      const int32_t token = key_in_slot(problem, window, slot);
      row[slot] = from_float<T>(token < 0 ? 0.0f : problem.scale * dot(q, keys[token], problem.dim, aligned));
    }
  }
}

// Slot of the cell `index` of a query's box of visible keys: they fill the front of the window on each axis.
__device__ inline int32_t slot_of_cell(const Problem& problem, const Box& box, int32_t index) {
  const int32_t c2 = index % box.axis[2].count;
  index /= box.axis[2].count;
  const int32_t c1 = index % box.axis[1].count, c0 = index / box.axis[1].count;
  return (c0 * problem.axis[1].window + c1) * problem.axis[2].window + c2;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    neighborhood_kernel(const Problem problem, const T* __restrict__ weights, const T* __restrict__ key, const Shard* halo,
                        T* __restrict__ out, int32_t volume, int32_t chunks, int64_t units) {
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, q_tokens, problem.heads, chunks);
    const int32_t kv_head = unit.head / (problem.heads / problem.kv_heads);
    const Columns columns(unit.chunk, lane, problem.dim);
    const Box box = keys_of(problem, halo, unit.token);
    const T* p = Rows<const T>(weights, unit.batch, q_tokens, problem.heads, unit.head, volume)[unit.token];
    const Rows<const T> keys(key, unit.batch, kv_tokens, problem.kv_heads, kv_head, problem.dim);
    float sum[kColumnsPerLane] = {};
    for (int32_t base = 0; base < box.volume; base += kWarp) {
      int32_t token = 0;
      float weight = 0.0f;
      if (base + lane < box.volume) {
        token = box.cell(base + lane, problem).token;
        weight = to_float(p[slot_of_cell(problem, box, base + lane)]);
      }
      const int32_t count = min(kWarp, box.volume - base);
#pragma unroll 8
      for (int32_t j = 0; j < count; ++j) {
        columns.add(sum, __shfl_sync(kFullMask, weight, j), keys[__shfl_sync(kFullMask, token, j)]);
      }
    }
    T* row = Rows<T>(out, unit.batch, q_tokens, problem.heads, unit.head, problem.dim)[unit.token];
    columns.store(row, sum, problem.scale);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    inverse_kernel(const Problem problem, const T* __restrict__ weights, const T* __restrict__ query, const Shard* halo,
                   T* __restrict__ out, int32_t volume, int32_t chunks, int64_t units) {
  const int32_t lane = threadIdx.x % kWarp, group = problem.heads / problem.kv_heads;
  const int64_t q_tokens = problem.q_tokens(), kv_tokens = problem.kv_tokens();
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t index = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; index < units; index += step) {
    const Unit unit(index, kv_tokens, problem.kv_heads, chunks);
    const Columns columns(unit.chunk, lane, problem.dim);
    const Box box = queries_of(problem, halo, unit.token);
    float sum[kColumnsPerLane] = {};
    for (int32_t member = 0; member < group; ++member) {
      const int32_t head = unit.head * group + member;
      const Rows<const T> queries(query, unit.batch, q_tokens, problem.heads, head, problem.dim);
      const Rows<const T> rows(weights, unit.batch, q_tokens, problem.heads, head, volume);
      for (int32_t base = 0; base < box.volume; base += kWarp) {
        int32_t token = 0;
        float weight = 0.0f;
        if (base + lane < box.volume) {
          token = box.cell(base + lane, problem).token;
          const Window window = window_of(problem, halo, token);
          int32_t rest = static_cast<int32_t>(unit.token), slot = 0, slots = 1;
#pragma unroll
          for (int a = kMaxRank - 1; a >= 0; --a) {
            const Axis& axis = problem.axis[a];
            slot += slots * ((rest % axis.kv_len - window.origin[a]) / axis.dilation);
            rest /= axis.kv_len;
            slots *= axis.window;
          }
          weight = to_float(rows[token][slot]);
        }
        const int32_t count = min(kWarp, box.volume - base);
#pragma unroll 8
        for (int32_t j = 0; j < count; ++j) {
          columns.add(sum, __shfl_sync(kFullMask, weight, j), queries[__shfl_sync(kFullMask, token, j)]);
        }
      }
    }
    T* row = Rows<T>(out, unit.batch, kv_tokens, problem.kv_heads, unit.head, problem.dim)[unit.token];
    columns.store(row, sum, problem.scale);
  }
}

}  // namespace

Status product(Product pass, const Problem& problem, const ProductBuffers& buffers, const CallOptions& options,
               cudaStream_t stream) {
  const Status checked = check(problem);
  if (!checked.ok()) return checked;
  const int32_t volume = static_cast<int32_t>(problem.window_volume());
  return with_dtype(options.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* const weights = static_cast<T*>(buffers.weights);
    T* const per_query = static_cast<T*>(buffers.per_query);
    T* const per_key = static_cast<T*>(buffers.per_key);
    const int32_t chunks = chunks_of(problem.dim);
    const int64_t queries = problem.batch * problem.q_tokens() * problem.heads;
    if (pass == Product::kPointwise) {
      if (queries == 0) return Status{};
      pointwise_kernel<T><<<blocks_for(queries), kThreads, 0, stream>>>(problem, per_query, per_key, buffers.halo, weights,
                                                                        volume, queries);
      return launch_status("naive::pointwise_kernel");
    }
    if (pass == Product::kNeighborhood) {
      const int64_t units = queries * chunks;
      if (units == 0) return Status{};
      neighborhood_kernel<T><<<blocks_for(units), kThreads, 0, stream>>>(problem, weights, per_key, buffers.halo, per_query,
                                                                         volume, chunks, units);
      return launch_status("naive::neighborhood_kernel");
    }
    const int64_t units = problem.batch * problem.kv_tokens() * problem.kv_heads * chunks;
    if (units == 0) return Status{};
    inverse_kernel<T><<<blocks_for(units), kThreads, 0, stream>>>(problem, weights, per_query, buffers.halo, per_key,
                                                                  volume, chunks, units);
    return launch_status("naive::inverse_kernel");
  });
}

}  // namespace jax_na::naive
