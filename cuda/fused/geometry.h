// Where the tokens of a dilation group lie: from group coordinates (what the window rule speaks) to local tokens (what
// lies in memory).
//
// A tile works inside one dilation group. Local residue r in [0, dilation) names the group by its first local query
// token; without sharding it is the group number. Group coordinate c lies at local key token kv_first + (c - kv_base) *
// dilation, local ordinal j of a query at token q_first + j * dilation, coordinate q_base + j. Host and device.
#pragma once

#include <cstdint>

#include "../common/problem.h"
#include "../common/window.h"

namespace jax_na {

// Division by a run-time constant: 0 <= n < 2^31, 1 <= divisor < 2^31.
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t value) : divisor(value) {
    if (value == 1) return;  // multiplier 0 marks it
    uint32_t log2 = 0;
    while ((uint64_t(1) << log2) < value) ++log2;
    shift = log2 - 1;
    multiplier = uint32_t(((uint64_t(1) << (31 + log2)) + value - 1) / value);
  }

  JAX_NA_HOST_DEVICE uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return multiplier == 0 ? n : __umulhi(n, multiplier) >> shift;
#else
    return multiplier == 0 ? n : uint32_t((uint64_t(n) * multiplier) >> 32) >> shift;
#endif
  }

  // n becomes the quotient, the remainder is returned.
  JAX_NA_HOST_DEVICE uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n);
    const uint32_t remainder = n - quotient * divisor;
    n = quotient;
    return remainder;
  }
};

// The same by the division instruction, where no constant was prepared.
struct PlainDivisor {
  uint32_t divisor;

  JAX_NA_HOST_DEVICE uint32_t divide(uint32_t n) const { return n / divisor; }

  JAX_NA_HOST_DEVICE uint32_t split(uint32_t& n) const {
    const uint32_t remainder = n % divisor;
    n /= divisor;
    return remainder;
  }
};

// One axis of one dilation group.
struct GroupAxis {
  int32_t length;    // tokens of the group on the global axis: windows clamp here
  int32_t q_first;   // first local query token
  int32_t q_base;    // its group coordinate
  int32_t q_count;   // local query tokens of the group (may be 0)
  int32_t kv_first;  // first local key token
  int32_t kv_base;   // its group coordinate
};

// by_dilation: a FastDivisor or PlainDivisor of axis.dilation.
template <typename Divisor>
JAX_NA_HOST_DEVICE GroupAxis group_axis(const Axis& axis, const Shard& shard, int32_t residue, Divisor by_dilation) {
  if (axis.dilation == 1) {
    return {shard.length, 0, shard.q_offset, axis.q_len, 0, shard.kv_offset};
  }
  const int32_t d = axis.dilation;
  // A halo may begin before the global axis: counted from a multiple of d further left.
  const int32_t lift = shard.kv_offset < 0 ? by_dilation.divide(d - 1 - shard.kv_offset) : 0;
  uint32_t base = shard.q_offset + residue, kv_base = shard.kv_offset + lift * d, length = shard.length;
  const int32_t group = by_dilation.split(base);
  const int32_t kv_group = by_dilation.split(kv_base);
  const int32_t longer_groups = by_dilation.split(length);
  const bool next = group < kv_group;  // the group's first key token comes after the shard's next multiple of d
  GroupAxis result;
  result.length = length + (group < longer_groups ? 1 : 0);
  result.q_first = residue;
  result.q_base = base;
  result.q_count = residue < axis.q_len ? by_dilation.divide(axis.q_len - residue + d - 1) : 0;
  result.kv_first = group - kv_group + (next ? d : 0);
  result.kv_base = int32_t(kv_base) - lift + (next ? 1 : 0);
  return result;
}

JAX_NA_HOST_DEVICE Interval keys_of_query(const Axis& axis, int32_t length, int32_t i) {
  return keys_of_query(i, length, axis.window, axis.stride, axis.causal != 0);
}

JAX_NA_HOST_DEVICE Interval queries_of_key(const Axis& axis, int32_t length, int32_t i) {
  return queries_of_key(i, length, axis.window, axis.stride, axis.causal != 0);
}

}  // namespace jax_na
