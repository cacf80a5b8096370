// What the producer of a Hopper forward kernel decides: which tiles there are, and how each consumer has to treat them.
#pragma once

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

// Walks over the query tiles of a ring and their key tiles, and writes down what those need that load and multiply them. By
// a warp, whose lanes share the work.
template <typename Config, typename Storage>
class Describer {
 public:
  __device__ __forceinline__ Describer(const ForwardParams& params, Storage& smem, int ring)
      : params_(params), record_(smem.record), ring_(ring), index_(blockIdx.x * Config::kRings + ring) {
    if (lane() < kMaxRank) record_.shard[ring][lane()] = shard_of_axis(params, lane());
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t slot() const { return q_at_.slot; }  // of the query tile described last

  // The next query tile. Number of its key tiles, or -1: no more query tiles.
  __device__ __forceinline__ int32_t next_item() {
    using namespace sm90;
    // This lane's axis, and its consumer (-1: the whole tile).
    const int axis = lane() % 4 < kMaxRank ? lane() % 4 : 0;
    const int consumer = lane() / 4 - 1;
    if (begun_) q_at_.advance();
    begun_ = true;
    for (; index_ < params_.num_items; index_ += gridDim.x * Config::kRings) {
      const Axis own_axis = params_.axis[axis];
      const int32_t own_unit = params_.unit[axis], own_extent = params_.unit[axis] * params_.grid[axis];
      const int32_t own_shift = consumer < 0 || params_.grid[axis] == 1 ? 0 : consumer * own_unit;  // one axis is split
      const ItemPlace place = item_place(params_, index_, axis);
      const GroupAxis own_group = group_axis(own_axis, record_.shard[ring_][axis], place.residue, params_.groups[axis]);
      const int32_t own_tile_first = place.tile * own_extent;
      if (__any_sync(~0u, own_tile_first >= own_group.q_count)) continue;  // groups differ in length

      // Which keys: of the tile, and of each consumer.
      const int32_t own_first = own_tile_first + own_shift;
      WindowRange own_range = {{0, 0}, {0, 0}};  // no queries: every tile is outside
      if (own_first < own_group.q_count) {
        own_range = window_range(own_axis, own_group, own_first, consumer < 0 ? own_extent : own_unit);
      }
      const int32_t own_key = own_group.kv_first + (own_range.any.begin - own_group.kv_base) * own_axis.dilation;
      const AxisTiles own_tiles =
          axis_tiles(own_range.any.end - own_range.any.begin, params_.kv[0].extent[axis],
                     Config::kShapes == 1 ? 0 : params_.kv[1].extent[axis], axis == params_.edge_axis);
      mbarrier_wait(&record_.q_empty[ring_][q_at_.slot], q_at_.parity ^ 1);
      ItemInfo& item = record_.item[ring_][q_at_.slot];
      if (lane() < kMaxRank) {
        item.group[lane()] = own_group;
        item.first[lane()] = own_first;
        item.batch = place.batch;
        item.head = place.head;
      } else if (lane() % 4 < kMaxRank && consumer >= 0 && consumer < Config::kRingConsumers) {
        record_.range[ring_][q_at_.slot][axis][consumer] = own_range;
      }
      int32_t begin[kMaxRank], key[kMaxRank], count[Config::kShapes][kMaxRank], num_tiles = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        begin[a] = __shfl_sync(~0u, own_range.any.begin, a);
        key[a] = __shfl_sync(~0u, own_key, a);
#pragma unroll
        for (int shape = 0; shape < Config::kShapes; ++shape) count[shape][a] = __shfl_sync(~0u, own_tiles.count[shape], a);
      }
#pragma unroll
      for (int shape = 0; shape < Config::kShapes; ++shape)
        num_tiles += count[shape][0] * count[shape][1] * count[shape][2];
      if (lane() == 0) {
        item.num_tiles = num_tiles;
        MapCoords at =
            map_coords(params_.kv_layout, params_.heads_per_kv.divide(place.head) * Config::kDim, key, place.batch);
#pragma unroll
        for (int shape = 0; shape < Config::kShapes; ++shape) {
          KeyTiles& keys = record_.keys[ring_][q_at_.slot][shape];
#pragma unroll
          for (int a = 0; a < kMaxRank; ++a) {
            keys.begin[a] = begin[a];
            keys.count[a] = count[shape][a];
          }
          keys.at = at;
          if (shape + 1 < Config::kShapes) {  // the second shape begins behind the first
#pragma unroll
            for (int a = 0; a < kMaxRank; ++a) {
              const int32_t boxes = a == params_.edge_axis ? count[0][a] : 0;
              begin[a] += boxes * params_.kv[0].extent[a];
              at.c[3 - a] += boxes * params_.kv[0].map_step[a];
            }
          }
        }
      }
      __syncwarp();
      index_ += gridDim.x * Config::kRings;
      return num_tiles;
    }
    mbarrier_wait(&record_.q_empty[ring_][q_at_.slot], q_at_.parity ^ 1);
    if (lane() == 0) record_.item[ring_][q_at_.slot].num_tiles = -1;
    __syncwarp();
    return -1;
  }

  // kTileBatch key tiles of the query tile in `slot`, from number `first` on, one for each lane.
  __device__ __forceinline__ void describe_tiles(uint32_t slot, int32_t first, int batch) {
    int32_t number = first + lane();
    int shape = 0;
    if constexpr (Config::kShapes > 1) {
      const int32_t (&count)[kMaxRank] = record_.keys[ring_][slot][0].count;
      const int32_t of_first = count[0] * count[1] * count[2];
      if (number >= of_first) {
        shape = 1;
        number -= of_first;
      }
    }
    const KeyTiles& keys = record_.keys[ring_][slot][shape];
    const KeyBox& box = params_.kv[shape];
    TileLoad load;
    uint32_t classes = box.classes;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int32_t count = a > 0 ? max(keys.count[a], 1) : INT32_MAX, rest = number / count, n = number - rest * count;
      number = rest;
      const int32_t begin = keys.begin[a] + n * box.extent[a];
      load.info.begin[a] = begin;
      load.at[2 - a] = keys.at.c[3 - a] + n * box.map_step[a];
      uint32_t on_axis = 0;  // over the axes the classes AND
#pragma unroll
      for (int w = 0; w < Config::kRingConsumers; ++w)
        on_axis |= record_.range[ring_][slot][a][w].classes(begin, begin + box.extent[a]) << (2 * w);
      classes &= on_axis;
    }
    const int32_t tail = box.volume < Config::kN ? box.volume : 0;
    load.info.classes = (classes & ((1u << kShapeBit) - 1)) | shape << kShapeBit | tail << kTailBit;
    load.element = keys.at.c[0];
    if (lane() < Config::kTileBatch) record_.load[ring_][batch][lane()] = load;
    __syncwarp();
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  const ForwardParams& params_;
  decltype(Storage::record)& record_;
  const int ring_;
  int index_;
  bool begun_ = false;
  sm90::RingPosition<Config::kQStages> q_at_;
};

// By one warp, beside one that loads the tiles (forward_producer_sm90.cuh). hide_keys(slot, last): what the masks of a
// query tile need.
template <typename Config, typename Storage, typename HideKeys>
__device__ __forceinline__ void describe(const ForwardParams& params, Storage& smem, int ring, const HideKeys& hide_keys) {
  using namespace sm90;
  auto& record = smem.record;
  const bool first_lane = threadIdx.x % 32 == 0;
  Describer<Config, Storage> describer(params, smem, ring);
  RingPosition<Config::kBatches> batch_at;
  for (;;) {
    const int32_t num_tiles = describer.next_item();
    if (first_lane) mbarrier_arrive(&record.item_full[ring][describer.slot()]);
    hide_keys(describer.slot(), num_tiles < 0);
    if (num_tiles < 0) return;
    for (int32_t first = 0; first < num_tiles; first += Config::kTileBatch) {
      mbarrier_wait(&record.batch_empty[ring][batch_at.slot], batch_at.parity ^ 1);
      describer.describe_tiles(describer.slot(), first, batch_at.slot);
      if (first_lane) mbarrier_arrive(&record.batch_full[ring][batch_at.slot]);
      batch_at.advance();
    }
  }
}

}  // namespace jax_na::hopper
