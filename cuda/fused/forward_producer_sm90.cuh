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

// One warp per ring. Its lanes share the work on a query tile, an axis of a consumer each; lane 0 moves the data.
template <typename Config, typename Storage>
__device__ __forceinline__ void produce(const ForwardParams& params, Storage& smem, int ring) {
  using namespace sm90;
  constexpr int kRingConsumers = Config::kRingConsumers;
  constexpr int kRowElements = Config::kRowElements;
  auto& record = smem.record;
  const int lane = threadIdx.x % 32;
  const uint32_t num_queries =
      params.unit[0] * params.unit[1] * params.unit[2] * (params.grid[0] * params.grid[1] * params.grid[2]);
  const uint32_t q_bytes = num_queries * Config::kDim * 2;
  const uint32_t kv_bytes = params.kv_volume * Config::kDim * 2;
  // Columns past the box need a mask, or, of a few, apply_tail.
  const uint32_t possible = params.kv_volume >= Config::kShortestFullBox ? 0xFFFFFFFFu : 0x55555555u;

  // This lane's axis, and its consumer (-1: the whole tile).
  const int axis = lane % 4 < kMaxRank ? lane % 4 : 0;
  const int consumer = lane / 4 - 1;
  const Axis own_axis = params.axis[axis];
  const Shard own_shard = shard_of_axis(params, axis);
  const int32_t own_unit = params.unit[axis], own_extent = params.unit[axis] * params.grid[axis];
  const int32_t own_shift = consumer < 0 || params.grid[axis] == 1 ? 0 : consumer * own_unit;  // wgmma: one axis is split

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> kv_at;
  const int step = gridDim.x * Config::kRings;
  for (int index = blockIdx.x * Config::kRings + ring; index < params.num_items; index += step) {
    const ItemPlace place = item_place(params, index, axis);
    const int32_t head = place.head, batch = place.batch;
    const GroupAxis own_group = group_axis(own_axis, own_shard, place.residue, params.groups[axis]);
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
    if (lane < kMaxRank) {
      item.group[lane] = own_group;
      item.first[lane] = own_first;
      item.batch = batch;
      item.head = head;
    } else if (lane % 4 < kMaxRank && consumer >= 0 && consumer < kRingConsumers) {
      record.range[ring][axis][consumer] = own_range;
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
    if (lane != 0) {
      q_at.advance();
      continue;
    }

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

    // Queries.
    uint64_t* const q_full = &record.q_full[ring][q_at.slot];
    mbarrier_arrive_expect_tx(q_full, q_bytes);
#pragma unroll
    for (int w = 0; w < kRingConsumers; ++w) {
      int32_t x[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t ordinal = item.first[a] + (params.grid[a] == 1 ? 0 : w * params.unit[a]);
        x[a] = item.group[a].q_first + ordinal * params.axis[a].dilation;
      }
      const MapCoords m = map_coords(params.q_layout, head * Config::kDim, x, batch);
      const uint32_t q_smem = smem_address(smem.q[Config::kSharing == Sharing::kPrivate ? ring : w][q_at.slot]);
#pragma unroll
      for (int b = 0; b < Config::kBlocks; ++b) {
        tma_load_5d(q_smem + b * Config::kM * Config::kRowBytes, &params.q_map, q_full, m.c[0] + b * kRowElements, m.c[1],
                    m.c[2], m.c[3], m.c[4]);
      }
    }
    q_at.advance();

    // Keys and values.
    const int32_t kv_head = params.heads_per_kv.divide(head);
    const MapCoords m = map_coords(params.kv_layout, kv_head * Config::kDim, key, batch);
    const auto classes_on = [&](int a, int32_t begin) {  // of one axis; over the axes they AND
      const int32_t end = begin + params.kv_box[a];
      uint32_t classes = 0;
#pragma unroll
      for (int w = 0; w < kRingConsumers; ++w) {
        const WindowRange range = record.range[ring][a][w];
        classes |= range.classes(begin, end) << (2 * w);
      }
      return classes;
    };
    int32_t begin_0 = begin[0], c3 = m.c[3];
    for (int t0 = 0; t0 < num_tiles[0]; ++t0) {
      const uint32_t classes_0 = classes_on(0, begin_0) & possible;
      int32_t begin_1 = begin[1], c2 = m.c[2];
      for (int t1 = 0; t1 < num_tiles[1]; ++t1) {
        const uint32_t classes_1 = classes_on(1, begin_1) & classes_0;
        int32_t begin_2 = begin[2], c1 = m.c[1];
        for (int t2 = 0; t2 < num_tiles[2]; ++t2) {
          const uint32_t classes = classes_on(2, begin_2) & classes_1;
          mbarrier_wait(&record.k_empty[ring][kv_at.slot], kv_at.parity ^ 1);
          record.tile[ring][kv_at.slot] = {{begin_0, begin_1, begin_2}, classes};
          mbarrier_arrive_expect_tx(&record.k_full[ring][kv_at.slot], kv_bytes);
          const uint32_t k_smem = smem_address(smem.k[ring][kv_at.slot]);
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            tma_load_5d(k_smem + b * Config::kN * Config::kRowBytes, &params.k_map, &record.k_full[ring][kv_at.slot],
                        m.c[0] + b * kRowElements, c1, c2, c3, m.c[4]);
          }
          mbarrier_wait(&record.v_empty[ring][kv_at.slot], kv_at.parity ^ 1);
          mbarrier_arrive_expect_tx(&record.v_full[ring][kv_at.slot], kv_bytes);
          const uint32_t v_smem = smem_address(smem.v[ring][kv_at.slot]);
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            tma_load_5d(v_smem + b * 16 * Config::kSteps * Config::kRowBytes, &params.v_map,
                        &record.v_full[ring][kv_at.slot], m.c[0] + b * kRowElements, c1, c2, c3, m.c[4]);
          }
          kv_at.advance();
          begin_2 += params.kv_box[2];
          c1 += params.kv_map_step[2];
        }
        begin_1 += params.kv_box[1];
        c2 += params.kv_map_step[1];
      }
      begin_0 += params.kv_box[0];
      c3 += params.kv_map_step[0];
    }
  }
  mbarrier_wait(&record.q_empty[ring][q_at.slot], q_at.parity ^ 1);
  if (lane == 0) {
    record.item[ring][q_at.slot].num_tiles = -1;
    if constexpr (Config::kMaskProduct) mbarrier_arrive(&smem.mask_product.item_full[q_at.slot]);
    mbarrier_arrive(&record.q_full[ring][q_at.slot]);
  }
}

}  // namespace jax_na::hopper
