// What there is to know about a key tile of the Hopper backward mainloop: where it lies, which queries need it, what its
// rows are.
#pragma once

#include "../arch/sm90/copy_async.h"
#include "backward_shared_sm90.h"

namespace jax_na::hopper {

// Which tile, head and dilation group a number stands for.
struct TileIndex {
  int32_t tile[kMaxRank];
  int32_t group[kMaxRank];
  int32_t head;  // of the keys
  int32_t batch;

  // Tiles of one head and group follow one another: they share what they read in L2.
  __device__ __forceinline__ TileIndex(const BackwardParams& params, uint32_t linear) {
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) tile[a] = params.axis[a].tiles.split(linear);
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) group[a] = params.axis[a].groups.split(linear);
    head = params.kv_heads.split(linear);
    batch = linear;
  }
};

// The tokens of this CTA's dilation group on one axis of one side.
struct GroupTokens {
  int32_t first, count;
};

template <bool kQuerySide>
__device__ __forceinline__ GroupTokens group_tokens(const BackwardParams& params, const TileIndex& index, int a) {
  const int32_t dilation = params.axis[a].dilation;
  const int32_t length = kQuerySide ? params.axis[a].query_length : params.axis[a].key_length;
  if (dilation == 1) return {0, length};
  int32_t first = index.group[a];
  const int first_axis = kMaxRank - params.rank;
  if (params.sharded && a >= first_axis) {
    const Shard& shard = params.halo[a - first_axis];
    const SideAxis side = side_axis(kQuerySide ? shard.q_offset : shard.kv_offset, length, dilation, first);
    return {side.first, side.count};
  }
  return {first, first < length ? int32_t(params.axis[a].groups.divide(length - 1 - first)) + 1 : 0};
}

// How many boxes of a length cover a range.
__device__ __forceinline__ int32_t boxes_of_range(int32_t range, const FastDivisor& box) {
  return box.divide(range + box.divisor - 1);
}

// The queries that the keys of the tile need, from the intervals of its first and last key: both ends never decrease.
__device__ __forceinline__ TileAxis tile_axis(const BackwardParams& params, const TileIndex& index, int a) {
  const BackwardAxis& plan = params.axis[a];
  const GroupTokens keys = group_tokens<false>(params, index, a), queries = group_tokens<true>(params, index, a);
  const int32_t origin = index.tile[a] * plan.key_box;
  const int32_t end = min(origin + plan.key_box, keys.count);
  TileAxis tile{queries.first, 0, 0, 0, 0, -1};
  if (origin >= end) return tile;
  const int2* table = params.intervals + plan.table_row + keys.first;
  const int2 low = table[origin * plan.dilation], high = table[(end - 1) * plan.dilation];
  tile.query_begin = low.x;
  tile.range = high.y - low.x;
  tile.boxes = boxes_of_range(tile.range, params.shape[0].box[a]);
  if (end - origin == plan.key_box) tile.full_begin = high.x, tile.full_end = low.y;
  return tile;
}

// Row `row` of a tile: which queries see it, where it lies.
template <class C>
__device__ __forceinline__ void fill_row(const BackwardParams& params, TileRecord<C>& record, const TileIndex& index,
                                         const GroupTokens (&keys)[kMaxRank], int row) {
  const uint32_t packed = packed_coordinates(row, params.key_box1, params.key_box2);
  bool valid = row < params.key_volume;
  int2 interval[kMaxRank];
  int32_t token = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const BackwardAxis& plan = params.axis[a];
    const int32_t ordinal = index.tile[a] * plan.key_box + coordinate(packed, a);
    const int32_t x = keys[a].first + ordinal * plan.dilation;
    const bool inside = ordinal < keys[a].count;
    valid &= inside;
    interval[a] = inside ? params.intervals[plan.table_row + x] : make_int2(0, 0);
    token += x * plan.key_token_stride;
  }
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) record.interval[a][row] = valid ? interval[a] : make_int2(0, 0);
  record.token[row] = valid ? token : -1;
}

// All rows, by `threads` threads.
template <class C>
__device__ __forceinline__ void fill_rows(const BackwardParams& params, TileRecord<C>& record, const TileIndex& index,
                                          const GroupTokens (&keys)[kMaxRank], int thread, int threads) {
#pragma unroll
  for (int row = thread; row < C::kKeys; row += threads) fill_row(params, record, index, keys, row);
}

// lse and delta of a box' queries, by `threads` threads, each of which then has to copy_async_arrive.
template <class C>
__device__ __forceinline__ void load_stats(const BackwardParams& params, BackwardShared<C>& shared, uint32_t slot,
                                           int64_t stats_row, uint32_t last, int32_t shape, int thread, int threads) {
#pragma unroll
  for (int i = thread; i < C::kQueries; i += threads) {
    // Columns that no box of this shape has are beyond every `last` on axis 0.
    const int2 column = shared.query_row[shape][i];
    const bool valid = not_beyond(column.x, last);
    const int64_t at = stats_row + (valid ? column.y : 0);
    // With one shape, the columns beyond the box are zero in Q and dO for good.
    shared.stats[slot].load(i, valid ? params.stats + at : params.no_stats, valid || params.num_shapes > 1);
    if (params.dq == DqOutput::kFixedSum) {
      sm90::copy_async_or_zero<4>(&shared.grad_norm[slot][i], params.grad_norms + at, valid);
    }
  }
}

// dk and dv of a tile that no query sees (a halo beyond the ends of the axis), by one warp.
template <class C>
__device__ __noinline__ void write_zeros(const BackwardParams& params, const TileRecord<C>& record, int32_t batch,
                                         int32_t head) {
  constexpr int kChunks = C::kDim * sizeof(typename C::T) / sizeof(uint4);
  for (int row = threadIdx.x % 32; row < C::kKeys; row += 32) {
    const int32_t token = record.token[row];
    if (token < 0) continue;
    const int64_t at = ((batch * params.key_tokens + token) * params.kv_heads.divisor + head) * kChunks;
    for (int i = 0; i < kChunks; ++i) {
      static_cast<uint4*>(params.grad_key)[at + i] = static_cast<uint4*>(params.grad_value)[at + i] = uint4{};
    }
  }
}

}  // namespace jax_na::hopper
