// One neighborhood-attention call, as every kernel family receives it.
//
// Rank-generic by padding: there are always kMaxRank axes; a problem of rank r occupies the last r, the leading ones have
// length 1 and window 1. Token tensors are dense and heads-last: [batch, axis0, axis1, axis2, heads, dim].
// Plain C++ (no CUDA, XLA or nanobind header), so that host tests can include it.
#pragma once

#include <cstdint>

#include "macros.h"

namespace jax_na {

constexpr int kMaxRank = 3;

// Lengths, offsets and positions count tokens of the undilated axis unless a name says `group`.
struct Axis {
  int32_t q_len = 1;   // tokens of this axis in query, out, lse
  int32_t kv_len = 1;  // tokens of this axis in key, value (may exceed q_len when a halo is attached)
  int32_t window = 1;
  int32_t stride = 1;
  int32_t dilation = 1;
  int32_t causal = 0;  // 0 or 1
};

// Where a shard lies in the global tensor, per axis. Three int32 per axis, in this order, are what the `halo` operand of
// the FFI call holds in device memory (rank rows, outermost axis first). A call that is not spatially sharded has {0, 0,
// q_len}, and Problem::sharded is false: then kernels must not read the operand.
struct Shard {
  int32_t q_offset = 0;   // global position of local query token 0
  int32_t kv_offset = 0;  // global position of local key token 0
  int32_t length = 1;     // length of the global axis: windows clamp here
};

struct Problem {
  Axis axis[kMaxRank];
  int32_t rank = 1;
  int32_t sharded = 0;
  int64_t batch = 1;       // every leading dimension collapsed
  int32_t heads = 1;       // of query, out, lse
  int32_t kv_heads = 1;    // of key, value; divides heads; query head h reads key/value head h / (heads / kv_heads)
  int32_t dim = 1;         // of query and key
  int32_t dim_v = 1;       // of value and out
  int64_t bias_batch = 1;  // leading size of bias; batch index b reads bias b / (batch / bias_batch)
  int32_t num_extra = 0;   // additional keys per batch entry
  float scale = 1.0f;      // multiplies q.k before the softmax; the natural-log lse includes it

  JAX_NA_HOST_DEVICE int64_t q_tokens() const { return int64_t(axis[0].q_len) * axis[1].q_len * axis[2].q_len; }
  JAX_NA_HOST_DEVICE int64_t kv_tokens() const { return int64_t(axis[0].kv_len) * axis[1].kv_len * axis[2].kv_len; }
  JAX_NA_HOST_DEVICE int64_t window_volume() const { return int64_t(axis[0].window) * axis[1].window * axis[2].window; }
};

}  // namespace jax_na
