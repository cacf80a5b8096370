// Forward neighborhood attention for Hopper: TMA loads of unpermuted tensors, wgmma, warp specialisation.
//
// One kernel, top to bottom: parameters, what lies in shared memory, the producer (one thread per ring of tiles: decides
// which tiles there are, loads them, says how each consumer has to treat them), the consumers (a warpgroup per 64 queries:
// S = Q K^T, online softmax, O += P V), the epilogue. Everything about the problem is a run-time number; see plan_sm90.h
// for the tile shapes and DESIGN.md for why.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../arch/sm90/barrier.h"
#include "../arch/sm90/tma.h"
#include "../arch/sm90/wgmma.h"
#include "../common/call.h"
#include "geometry.h"
#include "mask_product_sm90.h"
#include "mask_sm90.h"
#include "plan_sm90.h"
#include "recompute_sm90.cuh"
#include "schedule_sm90.h"
#include "token_map_sm90.h"
#include "window_range_sm90.h"

namespace jax_na::hopper {

// ---- parameters ----
// Of the kernels for small windows alone.
struct SmallForwardParams {
  uint32_t column[kWarpColumns];  // the key of a warp's box that stands there, eight bits an axis, or kNoRow
  int32_t boxes, warps;           // consumers of a query tile; consumer warps, one a box or one a box and head
  int32_t stages, q_stages;
  int32_t q_slot_bytes, kv_slot_bytes;
  int32_t ctas;  // of an SM
  int32_t shared_bytes;
};

struct ForwardParams {
  CUtensorMap q_map, k_map,
      v_map;  // q_map: boxes of one warpgroup's queries, or of a tile's (kWarps); k_map, v_map: boxes of one key tile
  TokenLayout q_layout, kv_layout;
  Axis axis[kMaxRank];
  Shard shard[kMaxRank];  // if halo is null
  const Shard* halo;      // device memory, [rank], or null
  int32_t rank;
  int32_t unit[kMaxRank];  // queries of one consumer
  int32_t grid[kMaxRank];  // consumers of a query tile
  int32_t kv_box[kMaxRank];
  int32_t kv_volume;              // of the box
  int32_t kv_map_step[kMaxRank];  // map coordinates from one key tile to the next
  int32_t warp_keys[kMaxRank];    // kWarps kernels: keys of a key tile that a warp multiplies with
  FastDivisor tiles[kMaxRank];    // query tiles per dilation group
  FastDivisor groups[kMaxRank];   // dilation
  FastDivisor heads;
  FastDivisor head_groups;  // heads / item_heads
  FastDivisor heads_per_kv;
  int32_t item_heads;  // heads of a query tile; more than one in the kernels for small windows only
  int32_t num_items;   // batch x heads x groups x tiles
  Schedule schedule;   // of the items
  // Consumers of a shared key tile take turns at the tensor cores, so that the softmax of one runs under the products of
  // another.
  int32_t take_turns;
  float scale;
  void* out;        // [batch, axes, heads, dim]
  float* lse;       // [batch, axes, heads]
  RowProblem rows;  // of the same call
  SmallForwardParams small;
};

template <typename T_, int kDim_, int kN_, int kConsumers_, Sharing kSharing_, int kStages_, int kQStages_,
          int kMaskSlots_ = 0>
struct ForwardConfig {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kN = kN_;  // key columns of a tile
  static constexpr int kSteps =
      (kN + 15) / 16;  // of 16 keys in P V; values have that many rows, probabilities past kN are 0
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries
  static constexpr Sharing kSharing = kSharing_;
  static constexpr bool kShared = kSharing == Sharing::kShared;  // one ring of key tiles for all consumers, or one each
  static constexpr int kStages = kStages_;                       // key tiles in flight per ring
  static constexpr int kQStages = kQStages_;
  // Masks by the tensor cores (mask_product_sm90.h): tiles of a consumer whose masks are kept; 0: masks by selects.
  static constexpr int kMaskSlots = kMaskSlots_;
  static constexpr bool kMaskProduct = kMaskSlots > 0;
  static constexpr int kShortestFullBox = shortest_full_box(kN, kMaskProduct);
  static constexpr int kM = 64;  // queries of a consumer
  static constexpr int kRings = kShared ? 1 : kConsumers;
  static constexpr int kRingConsumers = kShared ? kConsumers : 1;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kMaskProduct ? 216 : kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kMaskProduct ? 72 : kConsumers == 2 ? 40 : 32;
  // Column groups of eight whose exponentials come before the wait for the last product of values: up to D 64 that one is
  // done when the maxima are, and the exponentials run better beside the conversions of the weights.
  static constexpr int kEarlyGroups = kDim <= 64 ? 0 : kN / 16;
  static constexpr int kRowBytes = kDim == 32 ? 64 : 128;  // of a TMA row: the swizzle span
  static constexpr int kRowElements = kRowBytes / 2;
  static constexpr int kBlocks = kDim / kRowElements;  // column blocks of a token
};

// ---- shared memory ----
// What the producer says about a key tile.
struct TileInfo {
  int32_t begin[kMaxRank];  // group coordinates
  uint32_t classes;         // kInside, kFull of consumer w in bits 2w, 2w + 1
};

// What the producer says about a query tile.
struct ItemInfo {
  GroupAxis group[kMaxRank];
  int32_t first[kMaxRank];  // query of the tile, local ordinal in the group
  int32_t batch;
  int32_t head;
  int32_t num_tiles;  // of keys; < 0: no more items
};

// One query of a tile.
struct RowInfo {
  Interval keys[kMaxRank];  // its window
  int32_t token;            // in [batch, axes], or -1: no such query
  int32_t head;
};

// What producer and consumers tell each other. kRows: queries of a ring's tile; kRowSlots: tiles whose rows are kept.
template <int kRings, int kConsumers, int kRows, int kRowSlots, int kStages, int kQStages>
struct ProducerStorage {
  alignas(16) RowInfo row[kRings][kRowSlots][kRows];
  alignas(16) TileInfo tile[kRings][kStages];
  alignas(16) WindowRange range[kRings][kMaxRank][kConsumers];
  uint32_t row_offset[kRows];  // of a row from `first`, eight bits an axis, or kNoRow: not a row of the box
  ItemInfo item[kRings][kQStages];
  alignas(8) uint64_t q_full[kRings][kQStages], q_empty[kRings][kQStages];
  uint64_t k_full[kRings][kStages], k_empty[kRings][kStages];
  uint64_t v_full[kRings][kStages], v_empty[kRings][kStages];

  // By one thread. arrivals: consumer warps of a ring; mask_warps: warps that read `item` to write masks.
  __device__ __forceinline__ void init_barriers(int arrivals, int mask_warps = 0) {
    for (int r = 0; r < kRings; ++r) {
      for (int i = 0; i < kQStages; ++i) {
        sm90::mbarrier_init(&q_full[r][i], 1);
        sm90::mbarrier_init(&q_empty[r][i], arrivals + mask_warps);
      }
      for (int i = 0; i < kStages; ++i) {
        sm90::mbarrier_init(&k_full[r][i], 1);
        sm90::mbarrier_init(&k_empty[r][i], arrivals);
        sm90::mbarrier_init(&v_full[r][i], 1);
        sm90::mbarrier_init(&v_empty[r][i], arrivals);
      }
    }
    sm90::fence_barrier_init();
  }

  // By all threads. unit: queries of a consumer, at most rows_per_consumer; grid: of consumers.
  __device__ __forceinline__ void build_row_offsets(const int32_t (&unit)[kMaxRank], const int32_t (&grid)[kMaxRank],
                                                    int rows_per_consumer, int thread, int num_threads) {
    for (int row = thread; row < kRows; row += num_threads) {
      const int w = row / rows_per_consumer, n = row % rows_per_consumer;
      const int at[kMaxRank] = {n / (unit[2] * unit[1]), n / unit[2] % unit[1], n % unit[2]};
      const int of[kMaxRank] = {w / (grid[2] * grid[1]), w / grid[2] % grid[1], w % grid[2]};
      uint32_t packed = at[0] >= unit[0] || of[0] >= grid[0] ? 1u << 24 : 0;
      for (int a = 0; a < kMaxRank; ++a) packed |= uint32_t(packed == 1u << 24 ? 0 : of[a] * unit[a] + at[a]) << (8 * a);
      row_offset[row] = packed;
    }
  }
};

// Three numbers of eight bits, and a bit that says there are none.
constexpr uint32_t kNoRow = 1u << 24;
__device__ __forceinline__ int entry(uint32_t packed, int a) { return packed >> (8 * a) & 255; }

// Row `row` of the query tile: its window and its token.
__device__ __forceinline__ RowInfo describe_row(const ForwardParams& params, const ItemInfo& item, uint32_t row_offset) {
  RowInfo row;
  bool exists = row_offset < kNoRow;
  int32_t token = item.batch;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const GroupAxis group = item.group[a];
    int32_t ordinal = item.first[a] + entry(row_offset, a);
    exists = exists && ordinal < group.q_count;
    ordinal = min(ordinal, group.q_count - 1);
    row.keys[a] = keys_of_query(params.axis[a], group.length, group.q_base + ordinal);
    token = token * params.axis[a].q_len + group.q_first + ordinal * params.axis[a].dilation;
  }
  row.token = exists ? token : -1;
  row.head = item.head;
  return row;
}

template <typename Config>
struct ForwardStorage {
  using T = typename Config::T;
  static constexpr int kRings = Config::kRings;
  alignas(1024) T q[Config::kConsumers][Config::kQStages][Config::kM * Config::kDim];
  alignas(1024) T k[kRings][Config::kStages][Config::kN * Config::kDim];
  alignas(1024) T v[kRings][Config::kStages][16 * Config::kSteps * Config::kDim];
  alignas(16) ProducerStorage<kRings, Config::kRingConsumers, Config::kRingConsumers * Config::kM, 2, Config::kStages,
                              Config::kQStages> record;
  struct None {};
  alignas(16) std::conditional_t<Config::kMaskProduct, None, ColumnMask<Config::kN>> mask;
  ProductMask<Config::kN, Config::kRingConsumers, Config::kMaskSlots, Config::kQStages> mask_product;
};

// ---- producer ----
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

// ---- consumers ----
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// S (64 x kN) = Q (64 x kDim) K^T, with a mask + A B^T, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_qk(float (&s)[Config::kN / 2], uint64_t q, uint64_t k, uint64_t a, uint64_t b) {
  constexpr int kStepsPerBlock = Config::kRowElements / 16;
  q = sm90::descriptor_uniform(q);
  k = sm90::descriptor_uniform(k);
  sm90::pin_registers(s);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kDim / 16; ++i) {
    const int block = i / kStepsPerBlock, bytes = i % kStepsPerBlock * 32;
    sm90::Wgmma<typename Config::T, Config::kN>::template ss<false, false>(
        s, sm90::descriptor_advance(q, block * Config::kM * Config::kRowBytes + bytes),
        sm90::descriptor_advance(k, block * Config::kN * Config::kRowBytes + bytes), i != 0);
  }
  if constexpr (Config::kMaskProduct) {
    sm90::Wgmma<__nv_bfloat16, Config::kN>::template ss<false, false>(s, a, sm90::descriptor_uniform(b), true);
  }
  sm90::wgmma_commit();
}

// O (64 x kDim) += P (64 x kN) V, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_pv(float (&o)[Config::kDim / 2], uint32_t (&p)[Config::kSteps][4], uint64_t v) {
  v = sm90::descriptor_uniform(v);
  sm90::pin_registers(o);
#pragma unroll
  for (int i = 0; i < Config::kSteps; ++i) sm90::pin_registers(p[i]);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kSteps; ++i) {
    sm90::Wgmma<typename Config::T, Config::kDim>::template rs<true>(
        o, p[i], sm90::descriptor_advance(v, i * 16 * Config::kRowBytes), true);
  }
  sm90::wgmma_commit();
}

// Running maximum and sum of a thread's two rows, of scores not yet scaled.
struct SoftmaxState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // of this thread's columns
};

template <int kN>
__device__ __forceinline__ void apply_mask(float (&s)[kN / 2], const uint32_t (&mask)[2][ColumnMask<kN>::kWords]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // bits in order, so that seven become predicates at once
#pragma unroll
    for (int bit = 0; bit < kN / 4; ++bit) {
      if (((mask[half][bit / 32] >> (bit % 32)) & 1) == 0) s[bit / 2 * 4 + 2 * half + bit % 2] = -INFINITY;
    }
  }
}

// Weights are relative to a maximum of the row that follows the scores by at most this much, as an exponent of 2: outputs
// and sums are rescaled seldom then, and no weight exceeds 2^8.
constexpr float kMaxGrowth = 8;

// The first half of a softmax step: the rows' new reference. True if some row of the warp changed it, and what was summed
// up so far is to be multiplied with factor.
// kMaskProduct: hidden scores are below kHiddenScore, else infinite.
template <int kN, bool kMaskProduct = false>
__device__ __forceinline__ bool update_max(SoftmaxState& state, const float (&s)[kN / 2], float scale_log2,
                                           float (&factor)[2]) {
  float part[2][2];  // of each row two maxima, for the sake of latency
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i / 2][i % 2] = s[i];
#pragma unroll
  for (int i = 4; i < kN / 2; ++i) part[i / 2 % 2][i % 2] = fmaxf(part[i / 2 % 2][i % 2], s[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = state.row_max[half];
    const float now = quad_max(fmaxf(part[half][0], part[half][1]));
    const bool grown = (now - before) * scale_log2 > kMaxGrowth && (!kMaskProduct || now > kHiddenScore);
    factor[half] = grown ? exp2_approx((before - now) * scale_log2) : 1.0f;
    state.row_max[half] = grown ? now : before;
    state.row_sum[half] *= factor[half];
  }
  return __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f);
}

// The second half, for column groups [kBegin, kEnd) of eight: scores to weights.
template <int kN, int kBegin, int kEnd>
__device__ __forceinline__ void exponentiate(SoftmaxState& state, float (&s)[kN / 2], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float row_max = state.row_max[half];
    const float offset = row_max == -INFINITY ? 0.0f : row_max * scale_log2;  // a row that sees no key yet
#pragma unroll
    for (int i = 2 * kBegin; i < 2 * kEnd; ++i) {
      float& x = s[i / 2 * 4 + 2 * half + i % 2];
      x = exp2_approx(fmaf(x, scale_log2, -offset));
      state.row_sum[half] += x;
    }
  }
}

// Both halves: scores to weights.
template <int kN>
__device__ __forceinline__ void update_softmax(SoftmaxState& state, float (&s)[kN / 2], float scale_log2,
                                               float (&factor)[2]) {
  update_max<kN>(state, s, scale_log2, factor);
  exponentiate<kN, 0, kN / 8>(state, s, scale_log2);
}

template <typename T, int kN>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[(kN + 15) / 16][4], const float (&s)[kN / 2]) {
#pragma unroll
  for (int i = 0; i < (kN + 15) / 16 * 4; ++i)
    p[i / 4][i % 4] = i < kN / 4 ? sm90::pack_pair<T>(s[2 * i], s[2 * i + 1]) : 0;
}

// What the rows of a warp do not see of a key tile.
struct Hidden {
  bool any;
  bool tail;  // the columns past the box, no other
};

// Hides the columns past the `volume` keys of a box, at least kShortestFullBox.
template <int kN>
__device__ __forceinline__ void apply_tail(float (&s)[kN / 2], int volume) {
#pragma unroll
  for (int bit = kN / 4 - 4; bit < kN / 4; ++bit) {
    if (bit / 2 * 8 + int(threadIdx.x) % 4 * 2 + bit % 2 < volume) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) s[bit / 2 * 4 + 2 * half + bit % 2] = -INFINITY;
  }
}

// Beyond this a hidden score may be among what a row has summed up (mask_product_sm90.h).
constexpr float kLargestScore = 1e25f;

// Ends the softmax of a thread's two rows: lse to global memory; inverse: what the outputs are to be multiplied with.
// tokens: of the rows, -1 where there is none. kMaskProduct: hidden scores are below kHiddenScore, else infinite.
template <bool kMaskProduct = false>
__device__ __forceinline__ void finish_softmax(const ForwardParams& params, const SoftmaxState& state,
                                               const int32_t (&tokens)[2], int32_t head, int lane, float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = quad_sum(state.row_sum[half]);
    if (kMaskProduct && !(fabsf(state.row_max[half]) < kLargestScore)) sum = NAN;  // the row is computed again
    inverse[half] = __fdividef(1.0f, sum);
    if (tokens[half] >= 0 && lane % 4 == 0 && params.lse != nullptr) {
      params.lse[int64_t(tokens[half]) * params.heads.divisor + head] = state.row_max[half] * params.scale + __logf(sum);
    }
  }
}

// O * inverse to global memory, 16 bytes a thread: quads transpose 4x4 registers, so that four lanes hold 64 contiguous
// bytes. nan: of each half a ballot of the rows that come out with a NaN: they are to be computed again, unless their
// weights are NaN and no hidden score can be the cause.
template <typename Config>
__device__ __forceinline__ void store_output(const ForwardParams& params, const float (&o)[Config::kDim / 2],
                                             const float (&inverse)[2], const int32_t (&tokens)[2], int32_t head, int lane,
                                             uint32_t (&nan)[2]) {
  using T = typename Config::T;
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t kept = 0;
    const int32_t token = tokens[half];
    const int64_t row = int64_t(token) * params.heads.divisor + head;
    T* const out = static_cast<T*>(params.out) + row * Config::kDim;
#pragma unroll
    for (int block = 0; block < Config::kDim / 32; ++block) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * block + i) + 2 * half;
        r[i] = sm90::pack_pair<T>(o[at] * inverse[half], o[at + 1] * inverse[half]);
        kept = keep_nan<T>(kept, r[i]);
      }
      // After both exchanges lane q holds what lanes 0..3 had in r[q].
      uint32_t send = q & 1 ? r[0] : r[1];
      uint32_t got = __shfl_xor_sync(~0u, send, 1);
      if (q & 1)
        r[0] = got;
      else
        r[1] = got;
      send = q & 1 ? r[2] : r[3];
      got = __shfl_xor_sync(~0u, send, 1);
      if (q & 1)
        r[2] = got;
      else
        r[3] = got;
      send = q & 2 ? r[0] : r[2];
      got = __shfl_xor_sync(~0u, send, 2);
      if (q & 2)
        r[0] = got;
      else
        r[2] = got;
      send = q & 2 ? r[1] : r[3];
      got = __shfl_xor_sync(~0u, send, 2);
      if (q & 2)
        r[1] = got;
      else
        r[3] = got;
      if (token >= 0) *reinterpret_cast<uint4*>(out + 32 * block + 8 * q) = make_uint4(r[0], r[1], r[2], r[3]);
    }
    nan[half] = __ballot_sync(~0u, token >= 0 && kept_nan<T>(kept) && (Config::kMaskProduct || !isnan(inverse[half])));
  }
}

// By a warp, when all its query tiles are done: computes its rows with a NaN again. A call of a function inside the loop
// over the tiles would cost the loop its registers, so the rows are not remembered but looked for, and only if there was
// one. PERF: all of it inlined. A kernel that has a call takes 2 to 3 us longer for every query tile, even if it is never
// made (H200: 1d-16k-w512 0.508 to 0.598 ms, causal D 128 0.493 to 0.531).
// row_offset: of the warp's 16 rows, more by `bases` than describe_row takes it; its items: from `first` on, in steps.
// kMaskProduct: a hidden key may have reached lse too.
template <typename T, int kDim, bool kMaskProduct = false>
__device__ __forceinline__ void recompute_nan_rows(const ForwardParams& params, const uint32_t* row_offset, uint32_t bases,
                                                   int first, int step) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int index = first; index < params.num_items; index += step) {
    ItemInfo item;
    bool exists = true;
    for (int a = 0; a < kMaxRank; ++a) {
      const ItemPlace place = item_place(params, index, a);
      item.group[a] = group_axis(params.axis[a], shard_of_axis(params, a), place.residue, params.groups[a]);
      item.first[a] = place.tile * params.unit[a] * params.grid[a];
      item.head = place.head;
      item.batch = place.batch;
      exists = exists && item.first[a] < item.group[a].q_count;
    }
    for (int i = 0; exists && i < 16 * params.item_heads; ++i) {
      const int32_t token = describe_row(params, item, row_offset[i % 16] - bases).token, head = item.head + i / 16;
      if (token < 0) continue;
      const int64_t row = int64_t(token) * params.heads.divisor + head;
      bool nan = false;
      for (int d = lane; d < kDim; d += 32) nan |= isnan(float(static_cast<const T*>(params.out)[row * kDim + d]));
      if (__any_sync(~0u, nan)) recompute_out<T>(params.rows, token, head, kMaskProduct ? params.lse : nullptr);
    }
  }
}

template <typename Config>
__device__ __forceinline__ void consume(const ForwardParams& params, ForwardStorage<Config>& smem, int wg) {
  using namespace sm90;
  using T = typename Config::T;
  constexpr int kN = Config::kN, kDim = Config::kDim;
  constexpr int kWords = ColumnMask<kN>::kWords;
  constexpr int kRows = Config::kRingConsumers * Config::kM;
  const int ring = Config::kShared ? 0 : wg;
  const int member = Config::kShared ? wg : 0;  // of the ring's consumers
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const float scale_log2 = params.scale * 1.4426950408889634f;
  const int32_t kv_box[kMaxRank] = {params.kv_box[0], params.kv_box[1], params.kv_box[2]};
  auto& record = smem.record;
  // The rows of this warp, and of this thread (0 and 8): of the query tile of the last product, other_rows apart from those
  // of the one before.
  RowInfo* warp_rows = &record.row[ring][0][64 * member + 16 * warp];
  ptrdiff_t other_rows = kRows;
  if (lane < 16) warp_rows[lane].token = warp_rows[lane + kRows].token = -1;
  __syncwarp();

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kMaskSlots> mask_at;
  bool masked_by_product = false;  // the product with the keys at k_at reads the mask at mask_at
  int ahead = 0;                   // the keys at k_at belong to the tile so many after the values at v_at
  int left = 0;                    // key tiles of the query tile still to be taken; < 0: no more query tiles
  bool first = false;              // no product yet with the query tile
  const auto arrive = [lane](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto release_k = [&]() {
    arrive(&record.k_empty[ring][k_at.slot]);
    k_at.advance();
    if constexpr (Config::kMaskProduct) {
      if (masked_by_product) {
        arrive(&smem.mask_product.empty[member][mask_at.slot]);
        mask_at.advance();
        masked_by_product = false;
      }
    }
    ++ahead;
    if (--left == 0) {  // the last product with Q is done: the next queries may come
      arrive(&record.q_empty[ring][q_at.slot]);
      q_at.advance();
    }
  };
  const auto release_v = [&]() {
    arrive(&record.v_empty[ring][v_at.slot]);
    v_at.advance();
    --ahead;
  };
  // Gives back the values of tiles that were passed over, until `keep` tiles are left.
  const auto drain_v = [&](int keep) {
    while (ahead > keep) {
      mbarrier_wait(&record.v_full[ring][v_at.slot], v_at.parity);
      release_v();
    }
  };
  // Every consumer takes one turn per tile, also at those it passes over: the token then goes round without counting.
  const auto await_turn = [&]() {
    if (Config::kShared && params.take_turns) named_barrier_sync(1 + wg, 256);
  };
  const auto pass_turn = [&]() {
    if (Config::kShared && params.take_turns) named_barrier_arrive(1 + (wg + 1 == Config::kConsumers ? 0 : wg + 1), 256);
  };
  // Passes over tiles outside this warpgroup's windows, and from one query tile to the next. True if there is another one,
  // now loaded, at k_at; false if there is none, or none that can be waited for while values are held (`pending`).
  const auto find_tile = [&](bool pending) {
    for (;;) {
      if (pending && ahead > Config::kStages) return false;  // the producer can get no further
      if (!pending) drain_v(0);
      if (left == 0) {
        mbarrier_wait(&record.q_full[ring][q_at.slot], q_at.parity);
        left = __shfl_sync(~0u, record.item[ring][q_at.slot].num_tiles, 0);
        first = true;
      }
      if (left < 0) return false;
      mbarrier_wait(&record.k_full[ring][k_at.slot], k_at.parity);
      const uint32_t classes = __shfl_sync(~0u, record.tile[ring][k_at.slot].classes, 0) >> (2 * member);
      if (classes & kInside) {
        masked_by_product = Config::kMaskProduct && (classes & kFull) == 0;
        return true;
      }
      release_k();
      await_turn();
      pass_turn();
    }
  };
  const auto last_rows = [&]() { return warp_rows + other_rows + lane / 4; };  // of this thread
  // Windows and tokens of the warp's rows, by its first lanes.
  const auto describe_rows = [&]() {
    warp_rows += other_rows;
    other_rows = -other_rows;
    __syncwarp();  // the reads of two query tiles ago
    if (lane < 16) {
      const RowInfo row =
          describe_row(params, record.item[ring][q_at.slot], record.row_offset[64 * member + 16 * warp + lane]);
      if constexpr (Config::kMaskProduct) {  // its window is of no use here
        warp_rows[lane].token = row.token;
        warp_rows[lane].head = row.head;
      } else {
        warp_rows[lane] = row;
      }
    }
    __syncwarp();
  };
  // What the rows of the warp do not see of the tile at k_at, with masks of the thread's rows where these are needed. The
  // part of the outer axes is kept, since tiles vary fastest along the innermost.
  uint32_t mask[2][kWords], outer_mask[2][kWords];
  int32_t outer_begin[2] = {INT32_MIN, INT32_MIN};
  const auto read_mask = [&]() {
    if constexpr (Config::kMaskProduct) {
      return Hidden{false, false};
    } else {
      const TileInfo tile = record.tile[ring][k_at.slot];
      if ((tile.classes >> (2 * member)) & kFull) return Hidden{params.kv_volume < kN, true};
      const int quad = lane % 4;
      const RowInfo* const rows = warp_rows + lane / 4;
      if (tile.begin[0] != outer_begin[0] || tile.begin[1] != outer_begin[1]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) outer_mask[half][w] = ~0u;
          smem.mask.restrict_axis(outer_mask[half], 0, rows[8 * half].keys[0], tile.begin[0], kv_box, quad);
          smem.mask.restrict_axis(outer_mask[half], 1, rows[8 * half].keys[1], tile.begin[1], kv_box, quad);
        }
        outer_begin[0] = tile.begin[0];
        outer_begin[1] = tile.begin[1];
      }
      bool all = true;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) mask[half][w] = outer_mask[half][w];
        smem.mask.restrict_axis(mask[half], 2, rows[8 * half].keys[2], tile.begin[2], kv_box, quad);
#pragma unroll
        for (int w = 0; w < kWords; ++w) all = all && mask[half][w] == ColumnMask<kN>::all(w);
      }
      return Hidden{__any_sync(~0u, !all) != 0, false};
    }
  };

  SoftmaxState state;
  bool nan_seen = false;
  float o[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
  const auto multiply_keys = [&](float (&s)[kN / 2]) {
    uint64_t a = 0, b = 0;
    if constexpr (Config::kMaskProduct) {
      auto& product = smem.mask_product;
      if (masked_by_product) mbarrier_wait(&product.full[member][mask_at.slot], mask_at.parity);
      a = descriptor_plain(smem_address(product.row), 64 * 16);
      b = masked_by_product ? descriptor_plain(smem_address(product.tile_of(member, mask_at.slot)), kN * 16)
                            : descriptor_plain(smem_address(product.nothing), 0);
    }
    multiply_qk<Config>(s, descriptor_k_major<Config::kRowBytes>(smem_address(smem.q[wg][q_at.slot])),
                        descriptor_k_major<Config::kRowBytes>(smem_address(smem.k[ring][k_at.slot])), a, b);
  };
  const auto multiply_values = [&](uint32_t (&p)[Config::kSteps][4]) {
    mbarrier_wait(&record.v_full[ring][v_at.slot], v_at.parity);
    multiply_pv<Config>(o, p,
                        descriptor_mn_major<Config::kRowBytes>(smem_address(smem.v[ring][v_at.slot]),
                                                               16 * Config::kSteps * Config::kRowBytes));
  };
  // What can be done before the scores are there.
  const auto prepare = [&]() {
    if (first) {
      describe_rows();
      outer_begin[0] = outer_begin[1] = INT32_MIN;
    }
    return read_mask();
  };
  const auto finish = [&](const RowInfo* rows, float (&inverse)[2]) {
    finish_softmax<Config::kMaskProduct>(params, state, {rows[0].token, rows[8].token}, rows[0].head, lane, inverse);
  };
  const auto store = [&](const RowInfo* rows, const float (&inverse)[2]) {
    uint32_t nan[2];
    store_output<Config>(params, o, inverse, {rows[0].token, rows[8].token}, rows[0].head, lane, nan);
    nan_seen |= (nan[0] | nan[1]) != 0;
  };
  // The rows' maxima. True if the outputs have to be multiplied with factor, or, if `first`, leave.
  const auto begin_softmax = [&](float (&s)[kN / 2], Hidden hidden, float (&factor)[2]) {
    pin_registers(s);
    release_k();
    if (hidden.any) {
      hidden.tail ? apply_tail<kN>(s, params.kv_volume) : apply_mask<kN>(s, mask);
    }
    float inverse[2];
    if (first) {
      finish(last_rows(), inverse);
      state = SoftmaxState();
    }
    const bool rescale = update_max<kN, Config::kMaskProduct>(state, s, scale_log2, factor);
    if (first) {
      factor[0] = inverse[0];
      factor[1] = inverse[1];
    }
    return rescale | first;
  };
  const auto settle_output = [&](const float (&factor)[2]) {
    if (first) {
      store(last_rows(), factor);
      first = false;
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] *= factor[i / 2 % 2];
    }
  };

  if (Config::kShared && params.take_turns && wg == Config::kConsumers - 1)
    named_barrier_arrive(1, 256);  // the first turn is consumer 0's
  while (find_tile(false)) {
    uint32_t p[Config::kSteps][4];
    {
      float s[kN / 2];
      float factor[2];
      await_turn();
      multiply_keys(s);
      pass_turn();
      const Hidden hidden = prepare();
      wgmma_wait<0>();
      if (begin_softmax(s, hidden, factor)) settle_output(factor);
      exponentiate<kN, 0, kN / 8>(state, s, scale_log2);
      pack_probabilities<T, kN>(p, s);
    }
    while (find_tile(true)) {
      float s[kN / 2];
      float factor[2];
      await_turn();
      multiply_keys(s);
      multiply_values(p);
      pass_turn();
      const Hidden hidden = prepare();
      wgmma_wait<1>();
      bool rescale = begin_softmax(s, hidden, factor);
      // The product of the values runs on under the maxima and kEarly of the exponentials. The sums are in the condition
      // because the compiler would otherwise move these behind the branch. It must be false for every sum there is, a NaN
      // too: a warp that parts here waits for ever.
      constexpr int kEarly = Config::kEarlyGroups;
      exponentiate<kN, 0, kEarly>(state, s, scale_log2);
      if (kEarly > 0) rescale |= state.row_sum[0] + state.row_sum[1] < 0.0f;
      if (rescale) {
        wgmma_wait<0>();
        pin_registers(o);
        settle_output(factor);
      }
      wgmma_wait<0>();
      pin_registers(o);
      release_v();
      drain_v(1);  // or the producer could not get kStages further than the tile of p
      exponentiate<kN, kEarly, kN / 8>(state, s, scale_log2);
      pack_probabilities<T, kN>(p, s);
    }
    multiply_values(p);
    wgmma_wait<0>();
    pin_registers(o);
    release_v();
  }
  float inverse[2];
  finish(warp_rows + lane / 4, inverse);
  store(warp_rows + lane / 4, inverse);
  if (nan_seen) {
    recompute_nan_rows<T, kDim, Config::kMaskProduct>(params, &record.row_offset[64 * member + 16 * warp], 0,
                                                      blockIdx.x * Config::kRings + ring, gridDim.x * Config::kRings);
  }
}

// ---- kernel ----
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  using Storage = ForwardStorage<Config>;
  extern __shared__ unsigned char dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) % 4;

  if (threadIdx.x == 0)  // one lane of every consumer warp
    smem.record.init_barriers(4 * Config::kRingConsumers, Config::kMaskProduct ? Config::kConsumers : 0);
  smem.record.build_row_offsets(params.unit, params.grid, Config::kM, threadIdx.x, Config::kThreads);
  if constexpr (!Config::kMaskProduct) smem.mask.build(params.kv_box, threadIdx.x, Config::kThreads);
  if (params.kv_volume < 16 * Config::kSteps) {
    // Rows that no load will write: zeros, because 0 * NaN would reach the output.
    uint4* const v = reinterpret_cast<uint4*>(&smem.v);
    for (int i = threadIdx.x; i < int(sizeof(smem.v) / sizeof(uint4)); i += Config::kThreads) v[i] = make_uint4(0, 0, 0, 0);
    if constexpr (Config::kMaskProduct) {  // and a NaN stays one under a hidden score
      uint4* const k = reinterpret_cast<uint4*>(&smem.k);
      for (int i = threadIdx.x; i < int(sizeof(smem.k) / sizeof(uint4)); i += Config::kThreads)
        k[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
  }
  if constexpr (Config::kMaskProduct) {
    if (threadIdx.x == 0) smem.mask_product.init_barriers();
    __syncthreads();  // row offsets
    smem.mask_product.build(params.unit, smem.record.row_offset, threadIdx.x, Config::kThreads);
    fence_proxy_async();
  }
  __syncthreads();

  if (warpgroup == Config::kConsumers) {
    decrease_registers<Config::kProducerRegisters>();
    if (warp < Config::kRings) produce<Config>(params, smem, warp);
    if constexpr (Config::kMaskProduct) {
      static_assert(Config::kShared && Config::kConsumers == 2, "the warps of the producer's warpgroup");
      if (warp == 1) hide_keys<Config>(params, smem);
      if (warp > 1) write_masks<Config>(params, smem, warp - 2);
    }
  } else {
    increase_registers<Config::kConsumerRegisters>();
    consume<Config>(params, smem, warpgroup);
  }
}

// Allows a kernel kBytes of dynamic shared memory on the current device, once per device. Null on success, else what
// failed.
template <const auto& kKernel, int kBytes>
const char* allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (error == cudaSuccess && (allowed.load(std::memory_order_relaxed) & bit) == 0) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null on success, else what failed.
template <typename Config>
const char* launch_forward(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(ForwardStorage<Config>) + 1024;
  static_assert(kBytes <= 232448, "shared memory of a Hopper CTA");
  if (const char* failure = allow_shared_memory<forward_sm90<Config>, kBytes>()) return failure;
  const int items = (params.num_items + Config::kRings - 1) / Config::kRings;
  const int ctas = items < num_sms ? items : num_sms;
  forward_sm90<Config><<<ctas, Config::kThreads, kBytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
