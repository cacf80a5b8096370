// The producer of the Hopper backward mainloop: one warp that claims key tiles, describes them and their query boxes, and
// loads both (TMA; cp.async for what belongs to single queries).
#pragma once

#include "../arch/sm90/copy_async.h"
#include "../arch/sm90/tma.h"
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
  tile.boxes = plan.query_box_divisor.divide(tile.range + plan.query_box - 1);
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

// Walks the boxes of a tile: query heads of the group outermost, then axis 0, 1, 2.
struct BoxWalk {
  int32_t box[kMaxRank] = {0, 0, 0};
  int32_t head = 0;
  __device__ __forceinline__ void next(const TileAxis (&axis)[kMaxRank]) {
    if (++box[2] < axis[2].boxes) return;
    box[2] = 0;
    if (++box[1] < axis[1].boxes) return;
    box[1] = 0;
    if (++box[0] < axis[0].boxes) return;
    box[0] = 0;
    ++head;
  }
};

template <class C>
__device__ __forceinline__ void load_tile(const CUtensorMap* map, const MapCoords& at, uint8_t* target, uint64_t* barrier,
                                          int32_t block_bytes) {
#pragma unroll
  for (int block = 0; block < C::kChannelBlocks; ++block) {
    sm90::tma_load_5d(sm90::smem_address(target) + block * block_bytes, map, barrier, at.c[0] + block * C::kBlockChannels,
                      at.c[1], at.c[2], at.c[3], at.c[4]);
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

template <class C>
struct Producer {
  static constexpr int kRowsPerLane = C::kQueries / 32;

  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int lane;
  // Of the columns this lane loads lse and delta for. Columns beyond the box are beyond every `last` on axis 0.
  int2 column[kRowsPerLane];
  sm90::RingPosition<C::kStages> ring;
  sm90::RingPosition<C::kKeyStages> key_ring;
  sm90::RingPosition<C::kTileStages> tile_ring;

  __device__ __forceinline__ Producer(const BackwardParams& p, BackwardShared<C>& s)
      : params(p), shared(s), lane(threadIdx.x % 32) {
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) column[i] = query_row(params, lane + 32 * i);
  }

  __device__ __forceinline__ void load_keys(const TileIndex& index, const GroupTokens (&keys)[kMaxRank]) const {
    int32_t token[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      token[a] = keys[a].first + index.tile[a] * params.axis[a].key_box * params.axis[a].dilation;
    }
    const MapCoords at = map_coords(params.key_layout, index.head * C::kDim, token, index.batch);
    uint64_t* barrier = &shared.key_full[key_ring.slot];
    sm90::mbarrier_arrive_expect_tx(barrier, 2 * params.key_volume * C::kDim * sizeof(typename C::T));
    load_tile<C>(&params.key, at, shared.key[key_ring.slot], barrier, C::kKeyBlockBytes);
    load_tile<C>(&params.value, at, shared.value[key_ring.slot], barrier, C::kKeyBlockBytes);
  }

  __device__ __forceinline__ void load_box(const TileIndex& index, const BoxWalk& walk) {
    const int32_t head = index.head * params.group_heads + walk.head;
    int32_t ordinal[kMaxRank], at_token[kMaxRank], token = 0;
    uint32_t last = 0;
    bool full = params.key_volume == C::kKeys;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const BackwardAxis& plan = params.axis[a];
      const TileAxis& tile = shared.axis[a];
      const int32_t origin = walk.box[a] * plan.query_box;
      ordinal[a] = tile.query_begin + origin;
      at_token[a] = tile.query_first + ordinal[a] * plan.dilation;
      token += at_token[a] * plan.query_token_stride;
      last |= (min(tile.range - origin, plan.query_box) - 1) << (20 - 10 * a);
      full &= ordinal[a] >= tile.full_begin && ordinal[a] + plan.query_box <= tile.full_end;
    }
    const int64_t stats_row = (int64_t(index.batch) * params.heads + head) * params.q_tokens + token;
    sm90::mbarrier_wait(&shared.empty[ring.slot], ring.parity ^ 1);
    uint64_t* barrier = &shared.full[ring.slot];
    if (lane == 0) {
      BoxRecord& record = shared.box[ring.slot];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) record.origin[a] = ordinal[a];
      record.full = full;
      record.last = last;
      record.dq_offset = ((index.batch * params.q_tokens + token) * params.heads + head) * C::kDim;
      record.stats_row = stats_row;
      const MapCoords at = map_coords(params.query_layout, head * C::kDim, at_token, index.batch);
      sm90::mbarrier_arrive_expect_tx(barrier, 2 * params.query_volume * C::kDim * sizeof(typename C::T));
      load_tile<C>(&params.query, at, shared.query[ring.slot], barrier, C::kQueryBlockBytes);
      load_tile<C>(&params.grad_out, at, shared.grad_out[ring.slot], barrier, C::kQueryBlockBytes);
    }
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const bool valid = not_beyond(column[i].x, last);
      const int64_t at = stats_row + (valid ? column[i].y : 0);
      sm90::copy_async_or_zero<8>(&shared.stats[ring.slot][lane + 32 * i], params.stats + at, valid);
      if (params.dq == DqOutput::kFixedSum) {
        sm90::copy_async_or_zero<4>(&shared.grad_norm[ring.slot][lane + 32 * i], params.grad_norms + at, valid);
      }
    }
    sm90::copy_async_arrive(barrier);
    ring.advance();
  }

  // On lane 0.
  __device__ __forceinline__ uint32_t claim_tile() const { return lane == 0 ? atomicAdd(params.tile_counter, 1u) : 0; }

  __device__ __forceinline__ void run() {
    uint32_t claimed = claim_tile();
#pragma unroll 1
    for (;;) {
      const uint32_t linear = __shfl_sync(~0u, claimed, 0);
      TileRecord<C>& record = shared.tile[tile_ring.slot];
      sm90::mbarrier_wait(&shared.tile_empty[tile_ring.slot], tile_ring.parity ^ 1);
      if (linear >= params.num_tiles) {
        record.boxes = kNoTile;
        sm90::mbarrier_arrive(&shared.tile_full[tile_ring.slot]);
        break;
      }
      claimed = claim_tile();  // the next one: the answer takes a while
      const TileIndex index(params, linear);
      GroupTokens keys[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) keys[a] = group_tokens<false>(params, index, a);
      if (lane < kMaxRank) shared.axis[lane] = tile_axis(params, index, lane);
#pragma unroll
      for (int i = 0; i < C::kKeys / 32; ++i) fill_row(params, record, index, keys, lane + 32 * i);
      __syncwarp();
      const int32_t boxes = shared.axis[0].boxes * shared.axis[1].boxes * shared.axis[2].boxes * params.group_heads;
      if (boxes == 0) {
        write_zeros(params, record, index.batch, index.head);
        __syncwarp();
        continue;
      }
      if (lane == 0) {
        record.boxes = boxes;
        record.head = index.head;
        record.batch = index.batch;
      }
      sm90::mbarrier_arrive(&shared.tile_full[tile_ring.slot]);
      tile_ring.advance();
      sm90::mbarrier_wait(&shared.key_empty[key_ring.slot], key_ring.parity ^ 1);
      if (lane == 0) load_keys(index, keys);
      key_ring.advance();
      BoxWalk walk;
#pragma unroll 1
      for (int32_t it = 0; it < boxes; ++it) {
        load_box(index, walk);
        walk.next(shared.axis);
      }
      __syncwarp();  // every lane has read shared.axis
    }
    sm90::copy_async_wait_all();
  }
};

}  // namespace jax_na::hopper
