// The producer of a Hopper forward kernel, one warp per ring of tiles: decides which tiles there are, loads them, says how
// each consumer has to treat them.
#pragma once

#include "../arch/sm90/tma.h"
#include "forward_shared_sm90.h"

namespace jax_na::hopper {

// Where the query tile that comes as number so many lies on one axis.
struct ItemPlace {
  int32_t tile, residue;  // of the axis
  int32_t head, batch;
};

// Of an item, spatial tiles vary fastest, then dilation groups, heads, batch.
__device__ __forceinline__ ItemPlace item_place(const ForwardParams& params, uint32_t number, int axis) {
  ItemPlace place{};
  uint32_t n = params.schedule.item(number);
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int32_t t = params.tiles[a].split(n);
    place.tile = a == axis ? t : place.tile;
  }
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int32_t r = params.groups[a].split(n);
    place.residue = a == axis ? r : place.residue;
  }
  place.head = params.head_groups.split(n) * params.item_heads;
  place.batch = n;
  return place;
}

__device__ __forceinline__ Shard shard_of_axis(const ForwardParams& params, int axis) {
  const int halo_row = axis - (kMaxRank - params.rank);
  return params.halo != nullptr && halo_row >= 0 ? params.halo[halo_row] : params.shard[axis];
}

__device__ __forceinline__ WindowRange window_range(const Axis& axis, const GroupAxis& group, int32_t first,
                                                    int32_t count) {
  const int32_t last = min(first + count, group.q_count) - 1;
  const Interval low = keys_of_query(axis, group.length, group.q_base + first);
  const Interval high = keys_of_query(axis, group.length, group.q_base + last);
  return {{low.begin, high.end}, {high.begin, low.end}};
}

// One warp per ring. Its lanes share the work on a query tile, an axis of a consumer each; lane 0 moves the data. As soon
// as the first key tiles of a query tile fill the ring, the next one begins: its queries then lie in shared memory when the
// consumers come to it.
template <typename Config, typename Storage>
__device__ __forceinline__ void produce(const ForwardParams& params, Storage& smem, int ring) {
  using namespace sm90;
  constexpr int kRingConsumers = Config::kRingConsumers;
  constexpr int kRowElements = Config::kRowElements;
  // Key tiles before the next query tile begins. With one stage of queries it has to wait for the end of this one.
  constexpr int kTilesBeforeNext = Config::kQStages > 1 ? Config::kStages : INT32_MAX;
  auto& record = smem.record;
  const int lane = threadIdx.x % 32;
  if (lane < kMaxRank) record.shard[ring][lane] = shard_of_axis(params, lane);
  __syncwarp();

  // This lane's axis, and its consumer (-1: the whole tile).
  const int axis = lane % 4 < kMaxRank ? lane % 4 : 0;
  const int consumer = lane / 4 - 1;

  RingPosition<Config::kQStages> q_at;
  int index = blockIdx.x * Config::kRings + ring;
  uint32_t next_slot = 0;
  // Describes the next query tile and loads its queries. Number of its key tiles, 0: no more query tiles.
  const auto begin_item = [&]() {
    for (; index < params.num_items; index += gridDim.x * Config::kRings) {
      const Axis own_axis = params.axis[axis];
      const int32_t own_unit = params.unit[axis], own_extent = params.unit[axis] * params.grid[axis];
      const int32_t own_shift = consumer < 0 || params.grid[axis] == 1 ? 0 : consumer * own_unit;  // one axis is split
      const ItemPlace place = item_place(params, index, axis);
      const GroupAxis own_group = group_axis(own_axis, record.shard[ring][axis], place.residue, params.groups[axis]);
      const int32_t own_tile_first = place.tile * own_extent;
      if (__any_sync(~0u, own_tile_first >= own_group.q_count)) continue;  // groups differ in length

      // Which keys: of the tile, and of each consumer.
      const int32_t own_first = own_tile_first + own_shift;
      WindowRange own_range = {{0, 0}, {0, 0}};  // no queries: every tile is outside
      if (own_first < own_group.q_count) {
        own_range = window_range(own_axis, own_group, own_first, consumer < 0 ? own_extent : own_unit);
      }
      const int32_t own_key = own_group.kv_first + (own_range.any.begin - own_group.kv_base) * own_axis.dilation;
      mbarrier_wait(&record.q_empty[ring][q_at.slot], q_at.parity ^ 1);
      ItemInfo& item = record.item[ring][q_at.slot];
      KeyTiles& keys = record.keys[ring][q_at.slot];
      if (lane < kMaxRank) {
        item.group[lane] = own_group;
        item.first[lane] = own_first;
        item.batch = place.batch;
        item.head = place.head;
      } else if (lane % 4 < kMaxRank && consumer >= 0 && consumer < kRingConsumers) {
        record.range[ring][q_at.slot][axis][consumer] = own_range;
        if constexpr (Config::kMaskProduct) smem.mask_product.item[q_at.slot].range[consumer][axis] = own_range;
      }
      int32_t num_tiles[kMaxRank], begin[kMaxRank], key[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        begin[a] = __shfl_sync(~0u, own_range.any.begin, a);
        key[a] = __shfl_sync(~0u, own_key, a);
        num_tiles[a] = (__shfl_sync(~0u, own_range.any.end, a) - begin[a] + params.kv_box[a] - 1) / params.kv_box[a];
      }
      __syncwarp();
      if (lane == 0) {
        item.num_tiles = num_tiles[0] * num_tiles[1] * num_tiles[2];
        if constexpr (Config::kMaskProduct) {
          auto& mask_item = smem.mask_product.item[q_at.slot];
#pragma unroll
          for (int a = 0; a < kMaxRank; ++a) {
            mask_item.begin[a] = begin[a];
            mask_item.tiles[a] = num_tiles[a];
          }
          mbarrier_arrive(&smem.mask_product.item_full[q_at.slot]);
        }
        uint64_t* const q_full = &record.q_full[ring][q_at.slot];
        const uint32_t num_queries =
            params.unit[0] * params.unit[1] * params.unit[2] * (params.grid[0] * params.grid[1] * params.grid[2]);
        mbarrier_arrive_expect_tx(q_full, num_queries * Config::kDim * 2);
#pragma unroll
        for (int w = 0; w < kRingConsumers; ++w) {
          int32_t x[kMaxRank];
#pragma unroll
          for (int a = 0; a < kMaxRank; ++a) {
            const int32_t ordinal = item.first[a] + (params.grid[a] == 1 ? 0 : w * params.unit[a]);
            x[a] = item.group[a].q_first + ordinal * params.axis[a].dilation;
          }
          const MapCoords m = map_coords(params.q_layout, place.head * Config::kDim, x, place.batch);
          const uint32_t q_smem = smem_address(smem.q[Config::kSharing == Sharing::kPrivate ? ring : w][q_at.slot]);
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            tma_load_5d(q_smem + b * Config::kM * Config::kRowBytes, &params.q_map, q_full, m.c[0] + b * kRowElements,
                        m.c[1], m.c[2], m.c[3], m.c[4]);
          }
        }
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          keys.begin[a] = begin[a];
          keys.count[a] = num_tiles[a];
        }
        keys.at = map_coords(params.kv_layout, params.heads_per_kv.divide(place.head) * Config::kDim, key, place.batch);
      }
      __syncwarp();
      next_slot = q_at.slot;
      q_at.advance();
      index += gridDim.x * Config::kRings;
      return num_tiles[0] * num_tiles[1] * num_tiles[2];
    }
    return 0;
  };

  RingPosition<Config::kStages> kv_at;
  uint32_t slot = 0;                     // of the query tile whose keys are loaded
  int32_t number[kMaxRank] = {0, 0, 0};  // lane 0: of its next key tile, along each axis
  uint32_t outer_classes = 0;            // lane 0: of the axes but the last
  const auto load_key_tile = [&]() {
    const KeyTiles& keys = record.keys[ring][slot];
    int32_t begin[kMaxRank];
    MapCoords at = keys.at;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      begin[a] = keys.begin[a] + number[a] * params.kv_box[a];
      at.c[3 - a] += number[a] * params.kv_map_step[a];
    }
    const auto classes_on = [&](int a) {  // of one axis; over the axes they AND
      uint32_t classes = 0;
#pragma unroll
      for (int w = 0; w < kRingConsumers; ++w) {
        const WindowRange range = record.range[ring][slot][a][w];
        classes |= range.classes(begin[a], begin[a] + params.kv_box[a]) << (2 * w);
      }
      return classes;
    };
    if (number[2] == 0) {
      // Columns past the box need a mask, or, of a few, apply_tail.
      outer_classes = params.kv_volume >= Config::kShortestFullBox ? 0xFFFFFFFFu : 0x55555555u;
      outer_classes &= classes_on(0) & classes_on(1);
    }
    const uint32_t classes = classes_on(2) & outer_classes;
    const uint32_t bytes = params.kv_volume * Config::kDim * 2;
    mbarrier_wait(&record.k_empty[ring][kv_at.slot], kv_at.parity ^ 1);
    record.tile[ring][kv_at.slot] = {{begin[0], begin[1], begin[2]}, classes};
    mbarrier_arrive_expect_tx(&record.k_full[ring][kv_at.slot], bytes);
    const uint32_t k_smem = smem_address(smem.k[ring][kv_at.slot]);
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      tma_load_5d(k_smem + b * Config::kN * Config::kRowBytes, &params.k_map, &record.k_full[ring][kv_at.slot],
                  at.c[0] + b * kRowElements, at.c[1], at.c[2], at.c[3], at.c[4]);
    }
    mbarrier_wait(&record.v_empty[ring][kv_at.slot], kv_at.parity ^ 1);
    mbarrier_arrive_expect_tx(&record.v_full[ring][kv_at.slot], bytes);
    const uint32_t v_smem = smem_address(smem.v[ring][kv_at.slot]);
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      tma_load_5d(v_smem + b * 16 * Config::kSteps * Config::kRowBytes, &params.v_map, &record.v_full[ring][kv_at.slot],
                  at.c[0] + b * kRowElements, at.c[1], at.c[2], at.c[3], at.c[4]);
    }
    kv_at.advance();
    bool carry = true;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      number[a] += carry;
      carry = number[a] == keys.count[a];
      if (carry) number[a] = 0;
    }
  };

  // Key tiles: of the next query tile; of this one, still to be loaded; of these, before the next one begins. All lanes
  // count, so that they begin it together.
  int32_t next = 0, left = 0, until_next = 0;
  for (;;) {
    if (until_next == 0) next = begin_item();
    if (left == 0) {
      if (next == 0) break;
      left = next;
      until_next = min(left, kTilesBeforeNext);
      slot = next_slot;
    }
    const int32_t count = until_next > 0 ? until_next : left;
    for (int32_t i = 0; lane == 0 && i < count; ++i) load_key_tile();
    __syncwarp();
    left -= count;
    until_next -= count;
  }
  mbarrier_wait(&record.q_empty[ring][q_at.slot], q_at.parity ^ 1);
  if (lane == 0) {
    record.item[ring][q_at.slot].num_tiles = -1;
    if constexpr (Config::kMaskProduct) mbarrier_arrive(&smem.mask_product.item_full[q_at.slot]);
    mbarrier_arrive(&record.q_full[ring][q_at.slot]);
  }
}

}  // namespace jax_na::hopper
