// What the direct kernels share: the box of tokens that a token interacts with, element access, warp reductions, the work
// loop.
//
// A query sees a box of keys (one interval per axis, in the coordinates of its dilation group), and a key is seen by a box
// of queries: the inverse. Both are a Box here, so forward, dq and dk/dv walk the same way. Source of the rule:
// common/window.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "call.h"
#include "problem.h"
#include "window.h"

namespace jax_na::naive {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kColumnsPerLane = 4;                 // a warp accumulates this many rows of 32 columns
constexpr int kColumns = kWarp * kColumnsPerLane;  // per unit of work; wider rows take several units
constexpr int64_t kMaxBlocks = int64_t(1) << 30;
constexpr unsigned kFullMask = 0xffffffffu;

// Positions first, first + step, ... on one axis, in local tokens, and the relative-bias index of each.
struct Run {
  int32_t first, step, count;
  int32_t bias_first, bias_step;
};

struct Box {
  Run axis[kMaxRank];
  int32_t len[kMaxRank];  // local lengths of the axes that the positions index
  int32_t volume;

  struct Cell {
    int32_t token;
    int64_t bias;  // entry of the [2 window - 1, ...] table
  };

  __device__ Cell cell(int32_t index, const Problem& problem) const {
    int32_t t[kMaxRank];
    t[2] = index % axis[2].count;
    index /= axis[2].count;
    t[1] = index % axis[1].count;
    t[0] = index / axis[1].count;
    Cell result{0, 0};
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      JAX_NA_DEVICE_ASSERT(t[a] < axis[a].count && axis[a].first + t[a] * axis[a].step < len[a]);
      result.token = result.token * len[a] + axis[a].first + t[a] * axis[a].step;
      result.bias = result.bias * (2 * problem.axis[a].window - 1) + axis[a].bias_first + t[a] * axis[a].bias_step;
    }
    return result;
  }
};

__device__ inline Shard shard_of(const Problem& problem, const Shard* halo, int axis) {
  const int row = axis - (kMaxRank - problem.rank);
  if (problem.sharded && row >= 0) return halo[row];
  return Shard{0, 0, problem.axis[axis].q_len};
}

// The part of a run that lies in the local tensor.
__device__ inline Run clip(Run run, int32_t len) {
  if (run.first < 0) {
    const int32_t skipped = (-run.first + run.step - 1) / run.step;
    run.first += skipped * run.step;
    run.bias_first += skipped * run.bias_step;
    run.count -= skipped;
  }
  const int32_t fits = run.first < len ? (len - run.first - 1) / run.step + 1 : 0;
  run.count = max(min(run.count, fits), 0);
  return run;
}

// Keys that the local query `token` sees.
__device__ inline Box keys_of(const Problem& problem, const Shard* halo, int64_t token) {
  Box box;
  box.volume = 1;
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const Axis& axis = problem.axis[a];
    const Shard shard = shard_of(problem, halo, a);
    const int32_t position = shard.q_offset + static_cast<int32_t>(token % axis.q_len);
    token /= axis.q_len;
    const int32_t group = position % axis.dilation, i = position / axis.dilation;
    const int32_t length = group_length(shard.length, axis.dilation, group);
    const Interval seen = keys_of_query(i, length, axis.window, axis.stride, axis.causal);
    const Run run{seen.begin * axis.dilation + group - shard.kv_offset, axis.dilation, seen.end - seen.begin,
                  seen.begin - i + axis.window - 1, 1};
    box.axis[a] = clip(run, axis.kv_len);
    box.len[a] = axis.kv_len;
    box.volume *= box.axis[a].count;
  }
  return box;
}

// Queries that see the local key `token`.
__device__ inline Box queries_of(const Problem& problem, const Shard* halo, int64_t token) {
  Box box;
  box.volume = 1;
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const Axis& axis = problem.axis[a];
    const Shard shard = shard_of(problem, halo, a);
    const int32_t position = shard.kv_offset + static_cast<int32_t>(token % axis.kv_len);
    token /= axis.kv_len;
    Run run{0, 1, 0, 0, 0};  // the halo beyond the ends of the global axis is seen by nobody
    if (position >= 0 && position < shard.length) {
      const int32_t group = position % axis.dilation, j = position / axis.dilation;
      const int32_t length = group_length(shard.length, axis.dilation, group);
      const Interval seen_by = queries_of_key(j, length, axis.window, axis.stride, axis.causal);
      run = clip(Run{seen_by.begin * axis.dilation + group - shard.q_offset, axis.dilation, seen_by.end - seen_by.begin,
                     j - seen_by.begin + axis.window - 1, -1},
                 axis.q_len);
    }
    box.axis[a] = run;
    box.len[a] = axis.q_len;
    box.volume *= run.count;
  }
  return box;
}

// --- elements --------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// a . b over `dim` elements by one lane. `aligned`: rows are multiples of 16 bytes.
template <typename T>
__device__ inline float dot(const T* a, const T* b, int32_t dim, bool aligned) {
  float sum = 0.0f;
  if (aligned) {
    for (int32_t d = 0; d < dim; d += Vector<T>::kSize) {
      const Vector<T> x = *reinterpret_cast<const Vector<T>*>(a + d);
      const Vector<T> y = *reinterpret_cast<const Vector<T>*>(b + d);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) sum = fmaf(to_float(x.element[e]), to_float(y.element[e]), sum);
    }
  } else {
    for (int32_t d = 0; d < dim; ++d) sum = fmaf(to_float(a[d]), to_float(b[d]), sum);
  }
  return sum;
}

template <typename T>
__device__ inline bool rows_aligned(int32_t dim) {
  return dim % Vector<T>::kSize == 0;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// The columns of a row that this lane accumulates: first + 32 i, i < kColumnsPerLane, as long as they are below `dim`.
struct Columns {
  int32_t first, dim;

  __device__ Columns(int32_t chunk, int32_t lane, int32_t dim) : first(chunk * kColumns + lane), dim(dim) {}

  template <typename T>
  __device__ void add(float (&sum)[kColumnsPerLane], float factor, const T* row) const {
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      const int32_t column = first + i * kWarp;
      if (column < dim) sum[i] = fmaf(factor, to_float(row[column]), sum[i]);
    }
  }

  template <typename T>
  __device__ void store(T* row, const float (&sum)[kColumnsPerLane], float factor) const {
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      const int32_t column = first + i * kWarp;
      if (column < dim) row[column] = from_float<T>(sum[i] * factor);
    }
  }
};

// --- work ------------------------------------------------------------------------------------------------------------

// One unit of work for a warp: token fastest, so that the warps of a block share neighbours.
struct Unit {
  int64_t batch, token;
  int32_t head, chunk;

  __device__ Unit(int64_t index, int64_t tokens, int32_t heads, int32_t chunks) {
    token = index % tokens;
    index /= tokens;
    chunk = static_cast<int32_t>(index % chunks);
    index /= chunks;
    head = static_cast<int32_t>(index % heads);
    batch = index / heads;
  }
};

inline int32_t chunks_of(int32_t dim) { return (dim + kColumns - 1) / kColumns; }

inline unsigned blocks_for(int64_t warps) {
  const int64_t blocks = (warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// The rows of one head of one batch entry of a tensor [batch, tokens, heads, dim]: element `token` is a row.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;

  __device__ Rows(T* tensor, int64_t batch, int64_t tokens, int32_t heads, int32_t head, int32_t dim)
      : first(tensor + (batch * tokens * heads + head) * dim), stride(int64_t(heads) * dim) {}

  __device__ T* operator[](int64_t token) const { return first + token * stride; }
};

template <typename T>
__device__ inline const T* bias_of(const T* bias, const Problem& problem, int64_t batch, int32_t head) {
  if (bias == nullptr) return nullptr;
  int64_t entries = 1;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) entries *= 2 * problem.axis[a].window - 1;
  return bias + ((batch / (problem.batch / problem.bias_batch)) * problem.heads + head) * entries;
}

inline Status launch_status(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(std::string(kernel) + " did not launch: " + cudaGetErrorName(error) + " (" +
                       cudaGetErrorString(error) + ")");
}

inline Status check(const Problem& problem) {
  if (problem.window_volume() >= (int64_t(1) << 31)) {
    return Status::error("a window of " + std::to_string(problem.window_volume()) + " keys: the limit is 2^31 - 1");
  }
  if (problem.q_tokens() >= (int64_t(1) << 31) || problem.kv_tokens() >= (int64_t(1) << 31)) {
    return Status::error("more than 2^31 - 1 tokens in one batch entry");
  }
  if (problem.num_extra > 0) return Status::error("additional keys are composed outside this family");
  return {};
}

// Calls `f` with a null pointer of the element type.
template <typename F>
Status with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kF16: return f(static_cast<__half*>(nullptr));
    case DType::kBF16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kF32: return f(static_cast<float*>(nullptr));
  }
  return Status::error("unknown element type");
}

}  // namespace jax_na::naive
