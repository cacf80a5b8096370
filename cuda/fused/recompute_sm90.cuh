// One row, one token at a time, in float32, by one warp: the way out for rows whose tile holds a NaN or an infinity in a
// token that they do not see. A matrix product multiplies such a token by a zero weight, and 0 * NaN is NaN; here it is
// never read. So a row that comes out with a NaN is computed again from what it sees, unless that is NaN by itself.
//
// Lane l holds elements l, l + 32, ... of a head dimension. Within loops nothing here is inlined: the kernels keep their
// registers. After the loop of a forward kernel all of it has to be, see recompute_nan_rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/call.h"
#include "token_window_sm90.h"

namespace jax_na::hopper {

// What rows are computed from and where they go; pointers as in ForwardBuffers and BackwardBuffers.
struct RowProblem {
  const void *query, *key, *value, *grad_out;
  const float2* stats;  // [batch, heads, q tokens]: lse * log2(e), delta
  void *out, *grad_query, *grad_key, *grad_value;
  Axis axis[kMaxRank];
  const Shard* halo;  // [rank] in device memory, or null
  int32_t rank;
  int32_t heads, kv_heads, dim;
  float scale;
};

inline RowProblem make_row_problem(const Problem& problem, const ForwardBuffers& buffers) {
  RowProblem rows{};
  rows.query = buffers.query;
  rows.key = buffers.key;
  rows.value = buffers.value;
  rows.out = buffers.out;
  for (int a = 0; a < kMaxRank; ++a) rows.axis[a] = problem.axis[a];
  rows.halo = problem.sharded ? buffers.halo : nullptr;
  rows.rank = problem.rank;
  rows.heads = problem.heads;
  rows.kv_heads = problem.kv_heads;
  rows.dim = problem.dim;
  rows.scale = problem.scale;
  return rows;
}

// ---- the test ----
// Running maximum of packed pairs that keeps a NaN; an infinity alone is none. Start with 0.
template <typename T>
__device__ __forceinline__ uint32_t keep_nan(uint32_t kept, uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(kept) : "r"(pair));
  } else {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(kept) : "r"(pair));
  }
  return kept;
}

template <typename T>
__device__ __forceinline__ bool kept_nan(uint32_t kept) {
  constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
  return (kept & 0x7FFF) > kInfinity || (kept >> 16 & 0x7FFF) > kInfinity;
}

// ---- one row ----
// Rows are queries and see keys, or the other way round.
template <Side kSide>
struct RowWindow {
  int64_t batch;
  int32_t token, head;
  TokenWindow seen[kMaxRank];

  // row: in [batch, axes, heads] of its side.
  __device__ RowWindow(const RowProblem& p, int64_t row)
      : RowWindow(p, row / (kSide == Side::kQueries ? p.heads : p.kv_heads),
                  int32_t(row % (kSide == Side::kQueries ? p.heads : p.kv_heads))) {}

  // row: in [batch, axes] of its side; an Index of 32 bits needs no call for a division.
  template <typename Index>
  __device__ __forceinline__ RowWindow(const RowProblem& p, Index row, int32_t head) : head(head) {
    constexpr bool kQueryRows = kSide == Side::kQueries;
    token = 0;
    Index stride = 1;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const Axis& axis = p.axis[a];
      const int32_t length = kQueryRows ? axis.q_len : axis.kv_len;
      const int32_t x = int32_t(row % length);
      row /= length;
      token += int32_t(x * stride);
      stride *= length;
      const int halo_row = a - (kMaxRank - p.rank);
      const Shard shard = p.halo != nullptr && halo_row >= 0 ? p.halo[halo_row] : Shard{0, 0, axis.q_len};
      seen[a] = token_window<kSide>(axis, shard, x);
    }
    batch = row;
  }

  // visit(token of the other side) until it returns false.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const RowProblem& p, Visit visit) const {
    constexpr bool kQueryRows = kSide == Side::kQueries;
    const int32_t length1 = kQueryRows ? p.axis[1].kv_len : p.axis[1].q_len;
    const int32_t length2 = kQueryRows ? p.axis[2].kv_len : p.axis[2].q_len;
    for (int32_t i = seen[0].begin; i < seen[0].end; ++i) {
      for (int32_t j = seen[1].begin; j < seen[1].end; ++j) {
        for (int32_t k = seen[2].begin; k < seen[2].end; ++k) {
          const int32_t x0 = seen[0].first + i * p.axis[0].dilation, x1 = seen[1].first + j * p.axis[1].dilation;
          if (!visit((x0 * length1 + x1) * length2 + seen[2].first + k * p.axis[2].dilation)) return;
        }
      }
    }
  }
};

// A lane's elements of a vector.
template <int kElements>
struct LaneVector {
  float x[kElements] = {};

  template <typename T>
  __device__ static LaneVector load(const void* tensor, int64_t row, int32_t dim) {
    LaneVector v;
    for (int i = 0; i < kElements; ++i) {
      const int at = threadIdx.x % 32 + 32 * i;
      if (at < dim) v.x[i] = float(static_cast<const T*>(tensor)[row * dim + at]);
    }
    return v;
  }

  template <typename T>
  __device__ void store(void* tensor, int64_t row, int32_t dim, float factor) const {
    for (int i = 0; i < kElements; ++i) {
      const int at = threadIdx.x % 32 + 32 * i;
      if (at < dim) static_cast<T*>(tensor)[row * dim + at] = T(x[i] * factor);
    }
  }

  __device__ void add(float weight, const LaneVector& other) {
    for (int i = 0; i < kElements; ++i) x[i] = fmaf(weight, other.x[i], x[i]);
  }

  __device__ float dot(const LaneVector& other) const {
    float sum = 0.0f;
    for (int i = 0; i < kElements; ++i) sum = fmaf(x[i], other.x[i], sum);
    for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    return sum;
  }

  // Over the whole warp.
  __device__ bool any_nan() const {
    bool nan = false;
    for (int i = 0; i < kElements; ++i) nan = nan || isnan(x[i]);
    return __any_sync(~0u, nan);
  }

  // Over the whole warp. Then nothing can change any more.
  __device__ bool all_nan(int32_t dim) const {
    bool nan = true;
    for (int i = 0; i < kElements; ++i) nan = nan && (threadIdx.x % 32 + 32 * i >= dim || isnan(x[i]));
    return __all_sync(~0u, nan);
  }
};

using ForwardVector = LaneVector<8>;
using BackwardVector = LaneVector<4>;  // head dimensions up to 128

constexpr float kLog2E = 1.4426950408889634f;

// out of a query, token of [batch, axes]. lse: [batch, axes, heads], computed again where it is NaN; or null, if it depends
// on no product with a hidden key.
template <typename T>
__device__ __forceinline__ void recompute_out(const RowProblem& p, int32_t query_token, int32_t head, float* lse) {
  const RowWindow<Side::kQueries> window(p, uint32_t(query_token), head);
  const int64_t row = int64_t(query_token) * p.heads + head;
  const int64_t kv_tokens = int64_t(p.axis[0].kv_len) * p.axis[1].kv_len * p.axis[2].kv_len;
  const int32_t kv_head = window.head / (p.heads / p.kv_heads);
  const ForwardVector query = ForwardVector::load<T>(p.query, row, p.dim);
  ForwardVector out;
  float row_max = -INFINITY, sum = 0.0f;
  const bool with_lse = lse != nullptr && isnan(lse[row]);
  window.for_each(p, [&](int32_t token) {
    const int64_t at = (window.batch * kv_tokens + token) * p.kv_heads + kv_head;
    const float score = p.scale * kLog2E * query.dot(ForwardVector::load<T>(p.key, at, p.dim));
    const float next_max = fmaxf(row_max, score), offset = next_max == -INFINITY ? 0.0f : next_max;
    const float correction = exp2f(row_max - offset), weight = exp2f(score - offset);
    row_max = next_max;
    sum = sum * correction + weight;
    for (float& x : out.x) x *= correction;
    out.add(weight, ForwardVector::load<T>(p.value, at, p.dim));
    return !(out.all_nan(p.dim) && (!with_lse || isnan(sum)));
  });
  if (with_lse && threadIdx.x % 32 == 0) lse[row] = row_max / kLog2E + __logf(sum);
  out.store<T>(p.out, row, p.dim, sum == 0.0f ? 0.0f : __fdividef(1.0f, sum));
}

// grad_query of a query. With a NaN of its own, in lse or delta, it is NaN as it stands.
template <typename T>
__device__ __noinline__ void recompute_grad_query(const RowProblem& p, int64_t row) {
  const RowWindow<Side::kQueries> window(p, row);
  const int64_t q_tokens = int64_t(p.axis[0].q_len) * p.axis[1].q_len * p.axis[2].q_len;
  const int64_t kv_tokens = int64_t(p.axis[0].kv_len) * p.axis[1].kv_len * p.axis[2].kv_len;
  const int32_t kv_head = window.head / (p.heads / p.kv_heads);
  const float2 stats = p.stats[(window.batch * p.heads + window.head) * q_tokens + window.token];
  if (isnan(stats.x) || !isfinite(stats.y)) return;
  const BackwardVector query = BackwardVector::load<T>(p.query, row, p.dim),
                       grad_out = BackwardVector::load<T>(p.grad_out, row, p.dim);
  BackwardVector grad;
  window.for_each(p, [&](int32_t token) {
    const int64_t at = (window.batch * kv_tokens + token) * p.kv_heads + kv_head;
    const BackwardVector key = BackwardVector::load<T>(p.key, at, p.dim),
                         value = BackwardVector::load<T>(p.value, at, p.dim);
    const float weight = exp2f(p.scale * kLog2E * query.dot(key) - stats.x);
    grad.add(weight * (grad_out.dot(value) - stats.y), key);
    return true;
  });
  grad.store<T>(p.grad_query, row, p.dim, p.scale);
}

// grad_key and grad_value of a key.
template <typename T>
__device__ __noinline__ void recompute_grad_key_value(const RowProblem& p, int64_t row) {
  const RowWindow<Side::kKeys> window(p, row);
  const int64_t q_tokens = int64_t(p.axis[0].q_len) * p.axis[1].q_len * p.axis[2].q_len;
  const int32_t group = p.heads / p.kv_heads;
  const BackwardVector key = BackwardVector::load<T>(p.key, row, p.dim),
                       value = BackwardVector::load<T>(p.value, row, p.dim);
  BackwardVector grad_key, grad_value;
  for (int32_t head = window.head * group; head < (window.head + 1) * group; ++head) {
    window.for_each(p, [&](int32_t token) {
      const int64_t at = (window.batch * q_tokens + token) * p.heads + head;
      const float2 stats = p.stats[(window.batch * p.heads + head) * q_tokens + token];
      const BackwardVector query = BackwardVector::load<T>(p.query, at, p.dim),
                           grad = BackwardVector::load<T>(p.grad_out, at, p.dim);
      const float weight = exp2f(p.scale * kLog2E * key.dot(query) - stats.x);
      grad_value.add(weight, grad);
      grad_key.add(weight * (value.dot(grad) - stats.y), query);
      return !(grad_key.all_nan(p.dim) && grad_value.all_nan(p.dim));
    });
  }
  grad_key.store<T>(p.grad_key, row, p.dim, p.scale);
  grad_value.store<T>(p.grad_value, row, p.dim, 1.0f);
}

}  // namespace jax_na::hopper
