// What the host hands to one launch of the Hopper backward mainloop (backward_mainloop_sm90.cuh).
//
// The mainloop has an outer tile, held by the CTA from start to end, and an inner loop over boxes of the other side:
//   pass kKeys:    outer = keys    (K, V),  inner = queries (Q, dO):  dk, dv in registers, dq added to a float32 workspace
//   pass kQueries: outer = queries (Q, dO), inner = keys    (K, V):   dq in registers; nothing is shared between CTAs
// Both sides are boxes of one dilation group: at most kOuter (kInner) tokens, run-time shape, innermost axis fastest.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/problem.h"
#include "../common/window.h"
#include "geometry.h"
#include "token_map_sm90.h"

namespace jax_na::hopper {

enum class BackwardPass { kKeys, kQueries };

// What pass kKeys does with dq: nothing; add to the float32 workspace; write it, because one tile holds every key of a
// dilation group.
enum class DqOutput : int32_t { kNone, kSum, kFinal };

// The first words of the workspace, zero at the start: tiles handed out per pass; is there a NaN in what was written?
enum Counter { kKeyTiles, kQueryTiles, kNanFound, kNumCounters };

constexpr int kMaxPrefixRows = 136;  // sum over the axes of inner_box + 1, at most 128 + 1 + 2 + 2

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

// Group coordinates of the inner side that tokens [first, last] of the outer side need. Both interval ends never decrease
// along the axis, so this is exact.
template <BackwardPass kPass>
JAX_NA_HOST_DEVICE Interval inner_of_outer(const Axis& axis, int32_t length, int32_t i) {
  if constexpr (kPass == BackwardPass::kKeys) {
    return queries_of_key(i, length, axis.window, axis.stride, axis.causal != 0);
  } else {
    return keys_of_query(i, length, axis.window, axis.stride, axis.causal != 0);
  }
}

// The inner tokens that an outer token needs: first + j * dilation, j in [begin, end).
struct InnerTokens {
  int32_t first, begin, end;
};

// Of outer token x on one axis. Tokens of a halo beyond the ends of the global axis need none, but keep both ends
// non-decreasing along the axis.
template <BackwardPass kPass>
JAX_NA_HOST_DEVICE InnerTokens inner_tokens(const Axis& axis, const Shard& shard, int32_t x) {
  constexpr bool kKeysPass = kPass == BackwardPass::kKeys;
  const int32_t outer_offset = kKeysPass ? shard.kv_offset : shard.q_offset;
  int32_t group = (outer_offset + x) % axis.dilation;
  group += group < 0 ? axis.dilation : 0;
  const int32_t i = (outer_offset + x - group) / axis.dilation;  // group coordinate
  const int32_t length = group_length(shard.length, axis.dilation, group);
  const SideAxis inner =
      side_axis(kKeysPass ? shard.q_offset : shard.kv_offset, kKeysPass ? axis.q_len : axis.kv_len, axis.dilation, group);
  if (length == 0) return {inner.first, 0, 0};
  Interval seen = inner_of_outer<kPass>(axis, length, i < 0 ? 0 : i < length ? i : length - 1);
  if (i < 0) seen.end = seen.begin;
  if (i >= length) seen.begin = seen.end;
  const auto clamp = [&inner](int32_t coordinate) {
    const int32_t ordinal = coordinate - inner.base;
    return ordinal < 0 ? 0 : ordinal < inner.count ? ordinal : inner.count;
  };
  return {inner.first, clamp(seen.begin), clamp(seen.end)};
}

struct BackwardAxis {
  int32_t dilation;
  int32_t outer_length, inner_length;  // tokens
  int32_t outer_box, inner_box;
  int32_t prefix_row;          // first row of this axis in BackwardParams::prefix
  int32_t table_row;           // first row of this axis in BackwardParams::intervals
  int32_t outer_token_stride;  // tokens of memory between neighbours of the axis
  int32_t inner_token_stride;
  FastDivisor inner_box_divisor;
  FastDivisor tiles;   // outer tiles of the longest group
  FastDivisor groups;  // dilation
};

struct BackwardParams {
  CUtensorMap outer0;  // K, or Q in pass kQueries
  CUtensorMap outer1;  // V, or dO
  CUtensorMap inner0;  // Q, or K
  CUtensorMap inner1;  // dO, or V
  TokenLayout outer_layout;
  TokenLayout inner_layout;
  BackwardAxis axis[kMaxRank];
  FastDivisor outer_heads;
  FastDivisor outer_box1, outer_box2, inner_box1, inner_box2;
  uint32_t num_tiles;
  uint32_t* tile_counter;  // zero at launch
  int32_t outer_volume, inner_volume;
  int32_t rank;
  int32_t sharded;
  int32_t heads;
  int32_t group_heads;  // query heads per key/value head
  int64_t q_tokens;     // per batch entry
  int64_t outer_tokens;
  DqOutput dq;  // pass kKeys
  float scale;
  float scale_log2;       // scale * log2(e)
  const Shard* halo;      // [rank], read only if sharded
  const int2* intervals;  // [axis][outer token]: the inner ordinals it needs (backward_around_sm90.cuh)
  const float2* stats;    // [batch, heads, q tokens]: lse * log2(e), delta
  void* grad_query;       // [batch, q tokens, heads, dim]
  float* grad_query_f32;  // [batch, q tokens, heads, dim], not yet scaled
  void* grad_outer0;      // dk, or dq in pass kQueries
  void* grad_outer1;      // dv
  uint32_t* nan_found;    // set where a NaN is written: backward_finish_kernel then looks for its rows
  // prefix[prefix_row + t][q], bit 2 j + e: column 8 j + 2 q + e of an inner box has a coordinate below t on that axis. The
  // columns of lanes with lane % 4 == q that lie in the interval [lo, hi) are therefore prefix[hi] & ~prefix[lo].
  uint4 prefix[kMaxPrefixRows];
};

static_assert(sizeof(BackwardParams) <= 4096, "kernel parameters");

}  // namespace jax_na::hopper
