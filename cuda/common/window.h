// The window rule of neighborhood attention on one axis, and its inverse: written once for host and device.
//
// All positions are *group coordinates*: dilation d splits an axis of length L into d groups; token x belongs to group x %
// d at coordinate x / d, and a query sees only keys of its own group. A group's length is group_length(L, d, g).
// Invariants: 1 <= stride <= window <= length. Both functions return an interval because begin and end of a query's window
// never decrease along the axis. tests/test_window_rule.py holds this file equal to jax_na/_window.py, exhaustively.
// Source: NATTEN's definition of (generalized, strided) neighborhood attention, arXiv 2204.07143, 2209.15001, 2504.16922.
#pragma once

#include <cstdint>

#include "macros.h"

namespace jax_na {

struct Interval {
  int32_t begin;
  int32_t end;  // exclusive
};

JAX_NA_HOST_DEVICE int32_t group_length(int32_t length, int32_t dilation, int32_t group) {
  return length / dilation + (group < length % dilation ? 1 : 0);
}

// Group coordinates of the keys that query coordinate i sees.
JAX_NA_HOST_DEVICE Interval keys_of_query(int32_t i, int32_t length, int32_t window, int32_t stride, bool causal) {
  const int32_t leader_offset = causal ? stride - 1 : stride / 2;
  int32_t center = (stride == 1 ? i : i / stride * stride) + leader_offset;
  center = center < length ? center : length - 1;
  if (causal) {
    const int32_t begin = center - window + 1;
    return {begin > 0 ? begin : 0, i + 1};
  }
  int32_t begin = center - window / 2;
  begin = begin > 0 ? begin : 0;
  begin = begin < length - window ? begin : length - window;
  return {begin, begin + window};
}

// Group coordinates of the queries whose window holds key coordinate j: the exact inverse of keys_of_query.
JAX_NA_HOST_DEVICE Interval queries_of_key(int32_t j, int32_t length, int32_t window, int32_t stride, bool causal) {
  const int32_t leader_offset = causal ? stride - 1 : stride / 2;
  const int32_t left = causal ? window - 1 : window / 2;
  // The window begins at or before j as long as its leader is at most j + left, or the window is stuck at the far edge.
  int32_t end = length;
  const int32_t last_leader = j + left;
  const bool stuck = last_leader >= length - 1 || (!causal && j >= length - window);
  if (!stuck) {
    end = last_leader < leader_offset ? 0 : ((last_leader - leader_offset) / stride + 1) * stride;
    end = end < length ? end : length;
  }
  if (causal) return {j, end};
  // The window ends after j once its leader is at least j - right, or from the first query if j lies in the first window.
  const int32_t first_leader = j - (window - 1 - left) - leader_offset;
  const int32_t begin = j < window || first_leader <= 0 ? 0 : (first_leader + stride - 1) / stride * stride;
  return {begin, end};
}

}  // namespace jax_na
