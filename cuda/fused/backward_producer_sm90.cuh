// The producer of the Hopper backward mainloop: one warp that claims key tiles, describes them and their query boxes, and
// loads both (TMA; cp.async for what belongs to single queries).
#pragma once

#include "../arch/sm90/copy_async.h"
#include "../arch/sm90/tma.h"
#include "backward_tile_sm90.cuh"

namespace jax_na::hopper {

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

template <class C>
struct Producer {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int lane;
  sm90::RingPosition<C::kStages> ring;
  sm90::RingPosition<C::kKeyStages> key_ring;
  sm90::RingPosition<C::kTileStages> tile_ring;

  __device__ __forceinline__ Producer(const BackwardParams& p, BackwardShared<C>& s)
      : params(p), shared(s), lane(threadIdx.x % 32) {}

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

  // The shape that covers the tile's queries with the fewest boxes: these are counted in shared.axis.
  __device__ __forceinline__ int32_t choose_shape() const {
    if (params.num_shapes == 1) return 0;
    uint32_t least = ~0u;
    if (lane < params.num_shapes) {
      uint32_t boxes = 1;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) boxes *= boxes_of_range(shared.axis[a].range, params.shape[lane].box[a]);
      least = boxes * kMostQueryShapes + lane;
    }
    const int32_t shape = __reduce_min_sync(~0u, least) % kMostQueryShapes;
    if (lane < kMaxRank) shared.axis[lane].boxes = boxes_of_range(shared.axis[lane].range, params.shape[shape].box[lane]);
    __syncwarp();
    return shape;
  }

  __device__ __forceinline__ void load_box(const TileIndex& index, const BoxWalk& walk, int32_t shape_index) {
    const QueryShape& shape = params.shape[shape_index];
    const int32_t head = index.head * params.group_heads + walk.head;
    int32_t ordinal[kMaxRank], at_token[kMaxRank], token = 0;
    uint32_t last = 0;
    bool full = params.key_volume == C::kKeys;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const BackwardAxis& plan = params.axis[a];
      const TileAxis& tile = shared.axis[a];
      const int32_t box = shape.box[a].divisor, origin = walk.box[a] * box;
      const int32_t inside = min(tile.range - origin, box);
      ordinal[a] = tile.query_begin + origin;
      at_token[a] = tile.query_first + ordinal[a] * plan.dilation;
      token += at_token[a] * plan.query_token_stride;
      last |= (inside - 1) << (20 - 10 * a);
      full &= ordinal[a] >= tile.full_begin && ordinal[a] + box <= tile.full_end;
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
      if constexpr (C::kHelperThreads > 0) sm90::mbarrier_arrive(&shared.described[ring.slot]);
      const MapCoords at = map_coords(shape.layout, head * C::kDim, at_token, index.batch);
      sm90::mbarrier_arrive_expect_tx(barrier, 2 * shape.volume * C::kDim * sizeof(typename C::T));
      load_tile<C>(&shape.query, at, shared.query[ring.slot], barrier, C::kQueryBlockBytes);
      load_tile<C>(&shape.grad_out, at, shared.grad_out[ring.slot], barrier, C::kQueryBlockBytes);
    }
    if constexpr (C::kHelperThreads == 0) {
      load_stats(params, shared, ring.slot, stats_row, last, shape_index, lane, 32);
      sm90::copy_async_arrive(barrier);
    }
    ring.advance();
  }

  // On lane 0.
  __device__ __forceinline__ uint32_t claim_tile() const { return lane == 0 ? atomicAdd(params.tile_counter, 1u) : 0; }

  __device__ __forceinline__ void run() {
    uint32_t claimed = claim_tile();
    bool started = false;  // the consumers have made the tables
    const auto start = [&] {
      if (!started) sm90::named_barrier_sync(kStartBarrier, C::kStartThreads);
      started = true;
    };
#pragma unroll 1
    for (;;) {
      const uint32_t linear = __shfl_sync(~0u, claimed, 0);
      TileRecord<C>& record = shared.tile[tile_ring.slot];
      sm90::mbarrier_wait(&shared.tile_empty[tile_ring.slot], tile_ring.parity ^ 1);
      if (linear >= params.num_tiles) {
        record.boxes = kNoTile;
        sm90::mbarrier_arrive(&shared.tile_full[tile_ring.slot]);
        start();
        break;
      }
      claimed = claim_tile();  // the next one: the answer takes a while
      const TileIndex index(params, linear);
      GroupTokens keys[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) keys[a] = group_tokens<false>(params, index, a);
      if (lane < kMaxRank) shared.axis[lane] = tile_axis(params, index, lane);
      if constexpr (C::kHelperThreads == 0) fill_rows(params, record, index, keys, lane, 32);
      __syncwarp();
      const int32_t shape = choose_shape();
      const int32_t boxes = shared.axis[0].boxes * shared.axis[1].boxes * shared.axis[2].boxes * params.group_heads;
      if (boxes == 0) {
        if constexpr (C::kHelperThreads > 0) fill_rows(params, record, index, keys, lane, 32);
        __syncwarp();
        write_zeros(params, record, index.batch, index.head);
        __syncwarp();
        continue;
      }
      if (lane == 0) {
        record.boxes = boxes;
        record.shape = shape;
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          record.box[a] = params.shape[shape].box[a].divisor;
          record.prefix_row[a] = params.shape[shape].prefix_row[a];
        }
        record.number = linear;
        record.head = index.head;
        record.batch = index.batch;
      }
      sm90::mbarrier_arrive(&shared.tile_full[tile_ring.slot]);
      tile_ring.advance();
      sm90::mbarrier_wait(&shared.key_empty[key_ring.slot], key_ring.parity ^ 1);
      if (lane == 0) load_keys(index, keys);
      key_ring.advance();
      start();
      BoxWalk walk;
#pragma unroll 1
      for (int32_t it = 0; it < boxes; ++it) {
        load_box(index, walk, shape);
        walk.next(shared.axis);
      }
      __syncwarp();  // every lane has read shared.axis
    }
    sm90::copy_async_wait_all();
  }
};

}  // namespace jax_na::hopper
