// The window rule for tokens as they lie in memory, in both directions: which tokens of the other side a query, or a key,
// has to do with on one axis. Host and device.
#pragma once

#include "../common/problem.h"
#include "../common/window.h"
#include "geometry.h"

namespace jax_na::hopper {

// The local tokens of one dilation group on one axis, of one side: token first + j * dilation has group coordinate base +
// j.
struct SideAxis {
  int32_t first;
  int32_t base;
  int32_t count;
};

// `group` is the global dilation group; offset (of the shard, may be negative) and length (of this side) count local
// tokens.
JAX_NA_HOST_DEVICE SideAxis side_axis(int32_t offset, int32_t length, int32_t dilation, int32_t group) {
  if (dilation == 1) return {0, offset, length};
  int32_t first = (group - offset) % dilation;
  first += first < 0 ? dilation : 0;
  return {first, (offset + first - group) / dilation, first < length ? (length - first + dilation - 1) / dilation : 0};
}

enum class Side { kQueries, kKeys };

// Tokens of the other side: first + j * dilation, j in [begin, end).
struct TokenWindow {
  int32_t first, begin, end;
};

// Of token x of side kSide on one axis: the keys that a query sees, or the queries that see a key. Tokens of a halo beyond
// the ends of the global axis are seen by none, but both ends never decrease along the axis.
template <Side kSide>
JAX_NA_HOST_DEVICE TokenWindow token_window(const Axis& axis, const Shard& shard, int32_t x) {
  constexpr bool kOfQuery = kSide == Side::kQueries;
  const int32_t offset = kOfQuery ? shard.q_offset : shard.kv_offset;
  int32_t group = (offset + x) % axis.dilation;
  group += group < 0 ? axis.dilation : 0;
  const int32_t i = (offset + x - group) / axis.dilation;  // group coordinate
  const int32_t length = group_length(shard.length, axis.dilation, group);
  const SideAxis other =
      side_axis(kOfQuery ? shard.kv_offset : shard.q_offset, kOfQuery ? axis.kv_len : axis.q_len, axis.dilation, group);
  if (length == 0) return {other.first, 0, 0};
  const int32_t inside = i < 0 ? 0 : i < length ? i : length - 1;
  Interval seen = kOfQuery ? keys_of_query(axis, length, inside) : queries_of_key(axis, length, inside);
  if (i < 0) seen.end = seen.begin;
  if (i >= length) seen.begin = seen.end;
  const auto clamp = [&other](int32_t coordinate) {
    const int32_t ordinal = coordinate - other.base;
    return ordinal < 0 ? 0 : ordinal < other.count ? ordinal : other.count;
  };
  return {other.first, clamp(seen.begin), clamp(seen.end)};
}

}  // namespace jax_na::hopper
