// The producer of the forward kernels for small windows, one warp: loads tiles, and describes every coordinate of them.
#pragma once

#include "../arch/sm90/tma.h"
#include "forward_describer_sm90.cuh"
#include "forward_small_shared_sm90.h"

namespace jax_na::hopper {

template <typename Config>
__device__ __forceinline__ void produce_small(const ForwardParams& params, const SmallForwardShared& shared) {
  using namespace sm90;
  SmallForwardRecords& smem = *shared.records;
  const SmallForwardParams& small = params.small;
  const int lane = threadIdx.x % 32;
  const int32_t extent[kMaxRank] = {params.unit[0] * params.grid[0], params.unit[1] * params.grid[1],
                                    params.unit[2] * params.grid[2]};
  const int num_coordinates = extent[0] + extent[1] + extent[2];
  const uint32_t row_bytes = Config::kDim * 2 * params.item_heads;
  const uint32_t q_bytes = extent[0] * extent[1] * extent[2] * row_bytes;
  const uint32_t kv_bytes = params.kv[0].volume * row_bytes;

  // The lane's axis.
  const int axis = lane < kMaxRank ? lane : 0;
  const Axis own_axis = params.axis[axis];
  const Shard own_shard = shard_of_axis(params, axis);

  SmallRing q_at, kv_at;
  int32_t last_tile = -1, last_residue = -1;
  int run = 0;  // items before this one, one after another, at the same place but of other heads or batch entries
  bool tables_ready = false;
  const auto await_tables = [&]() {
    if (tables_ready) return;
    __syncwarp();
    named_barrier_sync(kTablesBarrier, blockDim.x);
    tables_ready = true;
  };
  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const ItemPlace place = item_place(params, index, axis);
    const int32_t head = place.head, batch = place.batch;
    const GroupAxis group = group_axis(own_axis, own_shard, place.residue, params.groups[axis]);
    const int32_t own_extent = params.unit[axis] * params.grid[axis];
    const int32_t first = place.tile * own_extent;
    if (__any_sync(~0u, first >= group.q_count)) continue;  // groups differ in length
    run = __all_sync(~0u, place.tile == last_tile && place.residue == last_residue) ? run + 1 : 0;
    last_tile = place.tile;
    last_residue = place.residue;

    // Which keys.
    const Interval keys = window_range(own_axis, group, first, own_extent).any;
    const int32_t own_key = group.kv_first + (keys.begin - group.kv_base) * own_axis.dilation;
    const int32_t own_query = group.q_first + first * own_axis.dilation;
    int32_t num_tiles[kMaxRank], tile_begin[kMaxRank], key[kMaxRank], query[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      tile_begin[a] = __shfl_sync(~0u, keys.begin, a);
      key[a] = __shfl_sync(~0u, own_key, a);
      query[a] = __shfl_sync(~0u, own_query, a);
      num_tiles[a] = (__shfl_sync(~0u, keys.end, a) - tile_begin[a] + params.kv[0].extent[a] - 1) / params.kv[0].extent[a];
    }
    const int32_t item_tiles = num_tiles[0] * num_tiles[1] * num_tiles[2];
    mbarrier_wait(&smem.q_empty[q_at.slot], q_at.parity ^ 1);
    if (lane < kMaxRank) {
      smem.group[lane] = group;
      smem.first[lane] = first;
    }
    if (lane == 0) {
      mbarrier_arrive_expect_tx(&smem.q_full[q_at.slot], q_bytes);
      const MapCoords m = map_coords(params.q_layout, head * Config::kDim, query, batch);
      tma_load_5d(shared.q + q_at.slot * small.q_slot_bytes, &params.q_map, &smem.q_full[q_at.slot], m.c[0], m.c[1], m.c[2],
                  m.c[3], m.c[4]);
      smem.item[q_at.slot] = {item_tiles, head, batch * params.axis[0].q_len * params.axis[1].q_len * params.axis[2].q_len};
    }
    const int32_t kv_head = params.heads_per_kv.divide(head);
    const MapCoords kv_first = map_coords(params.kv_layout, kv_head * Config::kDim, key, batch);
    const auto load_tile = [&](const int32_t (&t)[kMaxRank]) {
      mbarrier_wait(&smem.kv_empty[kv_at.slot], kv_at.parity ^ 1);
      if (lane == 0) {
        const int32_t c1 = kv_first.c[1] + t[2] * params.kv[0].map_step[2];
        const int32_t c2 = kv_first.c[2] + t[1] * params.kv[0].map_step[1];
        const int32_t c3 = kv_first.c[3] + t[0] * params.kv[0].map_step[0];
        const uint32_t slot = kv_at.slot * small.kv_slot_bytes;
        mbarrier_arrive_expect_tx(&smem.k_full[kv_at.slot], kv_bytes);
        tma_load_5d(shared.k + slot, &params.k_map[0], &smem.k_full[kv_at.slot], kv_first.c[0], c1, c2, c3, kv_first.c[4]);
        mbarrier_arrive_expect_tx(&smem.v_full[kv_at.slot], kv_bytes);
        tma_load_5d(shared.v + slot, &params.v_map[0], &smem.v_full[kv_at.slot], kv_first.c[0], c1, c2, c3, kv_first.c[4]);
      }
    };
    int32_t t[kMaxRank] = {0, 0, 0};
    load_tile(t);
    // Items at one place have the same records: as soon as every slot holds the ones of what comes into it, they stay.
    // PERF: records of every item alone take 0.041 ms of 2d-nat-s2, of 0.066 in all (H200).
    const bool kept = run >= small.q_stages && run * item_tiles >= small.stages && small.stages % item_tiles == 0;

    if (!kept) {  // windows and tokens
      await_tables();
      __syncwarp();
      for (int c = lane; c < num_coordinates; c += 32) {
        const TileCoordinate coordinate = smem.coordinate[c];
        const int a = coordinate.axis;
        const GroupAxis g = smem.group[a];
        const int32_t ordinal = smem.first[a] + coordinate.at;
        const int32_t existing = min(ordinal, g.q_count - 1);
        const int32_t stride = (a < 2 ? params.axis[2].q_len : 1) * (a < 1 ? params.axis[1].q_len : 1);
        smem.window[c] = keys_of_query(params.axis[a], g.length, g.q_base + existing);
        smem.axis_token[c] = ordinal < g.q_count ? (g.q_first + ordinal * params.axis[a].dilation) * stride : -1;
      }
      __syncwarp();
      for (int row = lane; row < shared.rows; row += 32) {
        const uint32_t entries = smem.row_entries[row];
        int32_t token = 0;
        bool exists = entries < kNoRow;
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          const int32_t part = smem.axis_token[entry(entries, a)];
          exists = exists && part >= 0;
          token += part;
        }
        shared.token[q_at.slot * shared.rows + row] = exists ? token : -1;
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&smem.q_full[q_at.slot]);

    for (;;) {
      if (!kept) {  // masks of the key tile
        for (int c = lane; c < num_coordinates; c += 32) {
          const TileCoordinate coordinate = smem.coordinate[c];
          const int a = coordinate.axis;
          const int32_t begin = a == 0   ? tile_begin[0] + t[0] * params.kv[0].extent[0]
                                : a == 1 ? tile_begin[1] + t[1] * params.kv[0].extent[1]
                                         : tile_begin[2] + t[2] * params.kv[0].extent[2];
          const int32_t box = params.kv[0].extent[a], keys = params.warp_keys[a];
          const int32_t stride = (a < 2 ? params.kv[0].extent[2] : 1) * (a < 1 ? params.kv[0].extent[1] : 1);
          const int32_t table = a == 0   ? 0
                                : a == 1 ? params.warp_keys[0] + 1
                                         : params.warp_keys[0] + params.warp_keys[1] + 2;
          const int box_first = c - coordinate.at + coordinate.first, box_last = c - coordinate.at + coordinate.last;
          const int32_t low = smem.window[box_first].begin - begin, high = smem.window[box_last].end - begin;
          const bool seen = low < box && high > 0 && smem.axis_token[box_first] >= 0;
          const int32_t from = min(max(low, 0), box - keys);
          const Interval window = smem.window[c];
          const int32_t lo = min(max(window.begin - begin - from, 0), keys),
                        hi = min(max(window.end - begin - from, 0), keys);
          const uint4 below_lo = *reinterpret_cast<const uint4*>(smem.keys.bits[table + lo]);
          const uint4 below_hi = *reinterpret_cast<const uint4*>(smem.keys.bits[table + hi]);
          smem.axis_mask[c] = make_uint4(below_hi.x & ~below_lo.x, below_hi.y & ~below_lo.y, below_hi.z & ~below_lo.z,
                                         below_hi.w & ~below_lo.w);
          smem.axis_first_key[c] = seen ? from * stride : INT32_MIN / 4;
        }
        __syncwarp();
        for (int row = lane; row < shared.rows; row += 32) {
          const uint32_t entries = smem.row_entries[row];
          uint4 mask = smem.axis_mask[entry(entries, 2)];
#pragma unroll
          for (int a = 0; a < kMaxRank - 1; ++a) {
            if (a < kMaxRank - params.rank) continue;
            const uint4 other = smem.axis_mask[entry(entries, a)];
            mask = make_uint4(mask.x & other.x, mask.y & other.y, mask.z & other.z, mask.w & other.w);
          }
          shared.mask[kv_at.slot * shared.rows + row] = mask;
          if (row % 16 == 0) {
            smem.first_key[kv_at.slot][row / 16] = smem.axis_first_key[entry(entries, 0)] +
                                                   smem.axis_first_key[entry(entries, 1)] +
                                                   smem.axis_first_key[entry(entries, 2)];
          }
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&smem.k_full[kv_at.slot]);
      kv_at.advance(small.stages);
      if (++t[2] == num_tiles[2]) {
        t[2] = 0;
        if (++t[1] == num_tiles[1]) {
          t[1] = 0;
          if (++t[0] == num_tiles[0]) break;
        }
      }
      load_tile(t);
    }
    q_at.advance(small.q_stages);
  }
  await_tables();
  mbarrier_wait(&smem.q_empty[q_at.slot], q_at.parity ^ 1);
  if (lane == 0) {
    smem.item[q_at.slot].num_tiles = -1;
    mbarrier_arrive(&smem.q_full[q_at.slot]);
    mbarrier_arrive(&smem.q_full[q_at.slot]);
  }
}

}  // namespace jax_na::hopper
