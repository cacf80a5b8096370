// One row of a tile, one column at a time, in float32: the way out for rows whose tile holds a NaN or an infinity in a
// column that they do not see. A matrix product multiplies such a column by a zero weight, and 0 * NaN is NaN; here it is
// never read. One warp per row; lane l holds elements l, l + 32, ... of a head dimension of at most 256.
#pragma once

#include "matmul_sm80.h"
#include "tile_sm80.h"

namespace jax_na::fused {

constexpr int kMaxLaneElements = 8;

template <class E>
__device__ __forceinline__ float warp_dot(const typename E::Storage* a, const typename E::Storage* b, int size) {
  float sum = 0.f;
  for (int i = threadIdx.x & 31; i < size; i += 32) sum += E::to_float(a[i]) * E::to_float(b[i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}

// visit(token, bias entry) for every column of the union that the row sees.
template <class Visit>
__device__ __forceinline__ void for_each_seen(const Params& p, const Tile& tile, const Row& row, bool rows_are_keys,
                                              Visit visit) {
  const uint32_t top = tile.none;
  if (row.token < 0 || row.low == top) return;
  int32_t low[kMaxRank], high[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const uint32_t end = a == 0 ? top : 1u << (tile.axis[a - 1].shift - 1);
    const uint32_t field = end - (1u << tile.axis[a].shift);
    low[a] = (row.low & field) >> tile.axis[a].shift;
    high[a] = (row.high & field) >> tile.axis[a].shift;
  }
  const AxisTile &t0 = tile.axis[0], &t1 = tile.axis[1], &t2 = tile.axis[2];
  for (int c0 = low[0]; c0 <= high[0]; ++c0) {
    for (int c1 = low[1]; c1 <= high[1]; ++c1) {
      for (int c2 = low[2]; c2 <= high[2]; ++c2) {
        const int32_t bias = (c0 + t0.begin) * p.axis[0].bias_step + (c1 + t1.begin) * p.axis[1].bias_step +
                             (c2 + t2.begin) * p.axis[2].bias_step;
        visit(t0.col_token + t1.col_token + t2.col_token + c0 * t0.col_step + c1 * t1.col_step + c2 * t2.col_step,
              (rows_are_keys ? -bias : bias) - row.bias);
      }
    }
  }
}

// Pointers to one head's vectors, in elements.
template <class E>
struct HeadView {
  using T = typename E::Storage;
  const T *query, *key, *value, *extra_key, *extra_value, *grad_out, *bias;
  int64_t query_step, key_step, value_step, out_step, first_query_row;

  __device__ HeadView(const Params& p, int64_t batch, int32_t head) {
    const Problem& problem = p.problem;
    const int32_t kv_head = head / (problem.heads / problem.kv_heads);
    query_step = int64_t(problem.heads) * problem.dim;
    out_step = int64_t(problem.heads) * problem.dim_v;
    key_step = int64_t(problem.kv_heads) * problem.dim;
    value_step = int64_t(problem.kv_heads) * problem.dim_v;
    first_query_row = batch * p.q_tokens;
    const int64_t first_key = batch * p.kv_tokens, first_extra = batch * problem.num_extra;
    query = static_cast<const T*>(p.forward.query) + first_query_row * query_step + int64_t(head) * problem.dim;
    grad_out = static_cast<const T*>(p.backward.grad_out) + first_query_row * out_step + int64_t(head) * problem.dim_v;
    key = static_cast<const T*>(p.forward.key) + first_key * key_step + int64_t(kv_head) * problem.dim;
    value = static_cast<const T*>(p.forward.value) + first_key * value_step + int64_t(kv_head) * problem.dim_v;
    extra_key = static_cast<const T*>(p.forward.extra_key) + first_extra * key_step + int64_t(kv_head) * problem.dim;
    extra_value =
        static_cast<const T*>(p.forward.extra_value) + first_extra * value_step + int64_t(kv_head) * problem.dim_v;
    bias = nullptr;
    if (p.forward.bias != nullptr) {
      int64_t entries = 1;
      for (int a = 0; a < kMaxRank; ++a) entries *= 2 * problem.axis[a].window - 1;
      bias = static_cast<const T*>(p.forward.bias) +
             (batch / (problem.batch / problem.bias_batch) * problem.heads + head) * entries;
    }
  }
};

// out and lse of a query.
template <class E>
__device__ __noinline__ void recompute_out(const Params& p, const Tile& tile, int row_in_tile) {
  using T = typename E::Storage;
  const int lane = threadIdx.x & 31;
  const Problem& problem = p.problem;
  const Row row = describe_row<false>(p, tile, row_in_tile);
  const HeadView<E> view(p, tile.batch, tile.head);
  const T* query = view.query + row.token * view.query_step;
  float m = -INFINITY, sum = 0.f, out[kMaxLaneElements] = {};
  const auto add = [&](float score, const T* value) {
    const float m_next = fmaxf(m, score);
    const float shift = m_next == -INFINITY ? 0.f : m_next;
    const float correction = expf(m - shift), weight = expf(score - shift);
    m = m_next;
    sum = sum * correction + weight;
    for (int i = 0; i < kMaxLaneElements; ++i) {
      const int element = lane + 32 * i;
      if (element < problem.dim_v) out[i] = out[i] * correction + weight * E::to_float(value[element]);
    }
  };
  for_each_seen(p, tile, row, false, [&](int32_t token, int32_t entry) {
    float score = p.problem.scale * warp_dot<E>(query, view.key + token * view.key_step, problem.dim);
    if (view.bias != nullptr) score += E::to_float(view.bias[entry]);
    add(score, view.value + token * view.value_step);
  });
  for (int m_extra = 0; m_extra < problem.num_extra; ++m_extra) {
    add(p.problem.scale * warp_dot<E>(query, view.extra_key + m_extra * view.key_step, problem.dim),
        view.extra_value + m_extra * view.value_step);
  }
  T* destination = static_cast<T*>(p.forward.out) + (view.first_query_row + row.token) * view.out_step +
                   int64_t(tile.head) * problem.dim_v;
  for (int i = 0; i < kMaxLaneElements; ++i) {
    const int element = lane + 32 * i;
    if (element < problem.dim_v) destination[element] = E::from_float(sum == 0.f ? 0.f : out[i] / sum);
  }
  if (lane == 0) {
    p.forward.lse[(view.first_query_row + row.token) * problem.heads + tile.head] = sum == 0.f ? -INFINITY : m + logf(sum);
  }
}

// grad_query of a query.
template <class E>
__device__ __noinline__ void recompute_grad_query(const Params& p, const Tile& tile, int row_in_tile) {
  using T = typename E::Storage;
  const int lane = threadIdx.x & 31;
  const Problem& problem = p.problem;
  const Row row = describe_row<false>(p, tile, row_in_tile);
  const HeadView<E> view(p, tile.batch, tile.head);
  const T* query = view.query + row.token * view.query_step;
  const T* grad_out = view.grad_out + row.token * view.out_step;
  const float2 stats = p.stats[(view.first_query_row + row.token) * problem.heads + tile.head];
  float grad[kMaxLaneElements] = {};
  const auto add = [&](float score, const T* key, const T* value) {
    const float weight = exp2f(score * 1.4426950408889634f - stats.x);
    const float grad_score = weight * (warp_dot<E>(grad_out, value, problem.dim_v) - stats.y);
    for (int i = 0; i < kMaxLaneElements; ++i) {
      const int element = lane + 32 * i;
      if (element < problem.dim) grad[i] += grad_score * E::to_float(key[element]);
    }
  };
  for_each_seen(p, tile, row, false, [&](int32_t token, int32_t entry) {
    const T* key = view.key + token * view.key_step;
    float score = problem.scale * warp_dot<E>(query, key, problem.dim);
    if (view.bias != nullptr) score += E::to_float(view.bias[entry]);
    add(score, key, view.value + token * view.value_step);
  });
  for (int m_extra = 0; m_extra < problem.num_extra; ++m_extra) {
    const T* key = view.extra_key + m_extra * view.key_step;
    add(problem.scale * warp_dot<E>(query, key, problem.dim), key, view.extra_value + m_extra * view.value_step);
  }
  T* destination = static_cast<T*>(p.backward.grad_query) + (view.first_query_row + row.token) * view.query_step +
                   int64_t(tile.head) * problem.dim;
  for (int i = 0; i < kMaxLaneElements; ++i) {
    const int element = lane + 32 * i;
    if (element < problem.dim) destination[element] = E::from_float(grad[i] * problem.scale);
  }
}

// grad_key and grad_value of a key of the window.
template <class E>
__device__ __noinline__ void recompute_grad_key_value(const Params& p, const Tile& tile, int row_in_tile) {
  using T = typename E::Storage;
  const int lane = threadIdx.x & 31;
  const Problem& problem = p.problem;
  const Row row = describe_row<true>(p, tile, row_in_tile);
  const int32_t group = problem.heads / problem.kv_heads;
  float grad_key[kMaxLaneElements] = {}, grad_value[kMaxLaneElements] = {};
  for (int32_t head = tile.head * group; head < (tile.head + 1) * group; ++head) {
    const HeadView<E> view(p, tile.batch, head);
    const T* key = view.key + row.token * view.key_step;
    const T* value = view.value + row.token * view.value_step;
    for_each_seen(p, tile, row, true, [&](int32_t token, int32_t entry) {
      const T* query = view.query + token * view.query_step;
      const T* grad_out = view.grad_out + token * view.out_step;
      float score = problem.scale * warp_dot<E>(query, key, problem.dim);
      if (view.bias != nullptr) score += E::to_float(view.bias[entry]);
      const float2 stats = p.stats[(view.first_query_row + token) * problem.heads + head];
      const float weight = exp2f(score * 1.4426950408889634f - stats.x);
      const float grad_score = weight * (warp_dot<E>(grad_out, value, problem.dim_v) - stats.y);
      for (int i = 0; i < kMaxLaneElements; ++i) {
        const int element = lane + 32 * i;
        if (element < problem.dim) grad_key[i] += grad_score * E::to_float(query[element]);
        if (element < problem.dim_v) grad_value[i] += weight * E::to_float(grad_out[element]);
      }
    });
  }
  const int64_t at = (tile.batch * p.kv_tokens + row.token) * problem.kv_heads + tile.head;
  for (int i = 0; i < kMaxLaneElements; ++i) {
    const int element = lane + 32 * i;
    if (element < problem.dim) {
      static_cast<T*>(p.backward.grad_key)[at * problem.dim + element] = E::from_float(grad_key[i] * problem.scale);
    }
    if (element < problem.dim_v) {
      static_cast<T*>(p.backward.grad_value)[at * problem.dim_v + element] = E::from_float(grad_value[i]);
    }
  }
}

}  // namespace jax_na::fused
