// What the tile plans of every family suppose of a spatially sharded call. Host only, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/problem.h"

namespace jax_na {

// Where the tile plans suppose the queries of a shard to lie among its keys, on one axis and in group coordinates. The host
// does not know a shard's offset. A middle shard is the rule and has the most to do: no window of it is stuck at an edge.
struct PlannedQueries {
  int32_t first;
  int32_t count;
};

inline PlannedQueries planned_queries(const Axis& axis, bool sharded, int32_t length) {
  const int32_t count = sharded ? std::min(length, (axis.q_len + axis.dilation - 1) / axis.dilation) : length;
  const int32_t halo = length - count;
  return {axis.causal ? halo : (halo + 1) / 2, count};
}

}  // namespace jax_na
