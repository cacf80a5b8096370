// A Hopper forward kernel's constants, and what lies in its shared memory: tiles, and what producer and consumers tell each
// other.
#pragma once

#include "../arch/sm90/barrier.h"
#include "forward_params_sm90.h"
#include "mask_product_sm90.h"
#include "mask_sm90.h"
#include "window_range_sm90.h"

namespace jax_na::hopper {

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
  static constexpr int kShapes = tile_shapes(kSharing, kMaskProduct);    // of key tiles, at most
  static constexpr int kTileBatch = kStages > 4 ? 8 : 32, kBatches = 2;  // of key tiles that are described
  static constexpr int kM = 64;                                          // queries of a consumer
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

// What the producer says about a key tile.
struct TileInfo {
  int32_t begin[kMaxRank];  // group coordinates
  // kInside, kFull of consumer w in bits 2w, 2w + 1; its shape from bit kShapeBit on; from kTailBit on its keys, if they
  // are fewer than its columns.
  uint32_t classes;
};
constexpr int kShapeBit = 8, kTailBit = 16;

// What the producer says about a query tile.
struct ItemInfo {
  GroupAxis group[kMaxRank];
  int32_t first[kMaxRank];  // query of the tile, local ordinal in the group
  int32_t batch;
  int32_t head;
  int32_t num_tiles;  // of keys; < 0: no more items
};

// The key tiles of a query tile, of one shape: they vary fastest along the last axis.
struct KeyTiles {
  int32_t begin[kMaxRank];  // of the first one, group coordinates
  int32_t count[kMaxRank];
  MapCoords at;  // of the first one
};

// A key tile to be loaded.
struct TileLoad {
  TileInfo info;
  int32_t element, at[kMaxRank];  // map coordinates, innermost first, but for the batch
};

// One query of a tile.
struct RowInfo {
  Interval keys[kMaxRank];  // its window
  int32_t token;            // in [batch, axes], or -1: no such query
  int32_t head;
};

// What producer and consumers tell each other. kRows: queries of a ring's tile; kRowSlots: tiles whose rows are kept.
template <int kRings, int kConsumers, int kRows, int kRowSlots, int kStages, int kQStages, int kShapes, int kTileBatch,
          int kBatches>
struct ProducerStorage {
  alignas(16) RowInfo row[kRings][kRowSlots][kRows];
  alignas(16) TileInfo tile[kRings][kStages];
  alignas(16) WindowRange range[kRings][kQStages][kMaxRank][kConsumers];
  alignas(16) TileLoad load[kRings][kBatches][kTileBatch];
  KeyTiles keys[kRings][kQStages][kShapes];
  Shard shard[kRings][kMaxRank];
  uint32_t row_offset[kRows / kConsumers];  // of a consumer's row from its first, eight bits an axis, or kNoRow
  ItemInfo item[kRings][kQStages];
  alignas(8) uint64_t q_full[kRings][kQStages], q_empty[kRings][kQStages];
  uint64_t k_full[kRings][kStages], k_empty[kRings][kStages];
  uint64_t v_full[kRings][kStages], v_empty[kRings][kStages];
  uint64_t item_full[kRings][kQStages];  // what says that it is empty is q_empty
  uint64_t batch_full[kRings][kBatches], batch_empty[kRings][kBatches];

  // By one thread. arrivals: consumer warps of a ring; mask_warps: warps that read `item` to write masks.
  __device__ __forceinline__ void init_barriers(int arrivals, int mask_warps = 0) {
    for (int r = 0; r < kRings; ++r) {
      for (int i = 0; i < kQStages; ++i) {
        sm90::mbarrier_init(&q_full[r][i], 1);
        sm90::mbarrier_init(&q_empty[r][i], arrivals + mask_warps);
        sm90::mbarrier_init(&item_full[r][i], 1);
      }
      for (int i = 0; i < kBatches; ++i) {
        sm90::mbarrier_init(&batch_full[r][i], 1);
        sm90::mbarrier_init(&batch_empty[r][i], 1);
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

  // By all threads. unit: queries of a consumer.
  __device__ __forceinline__ void build_row_offsets(const int32_t (&unit)[kMaxRank], int thread, int num_threads) {
    for (int row = thread; row < kRows / kConsumers; row += num_threads) {
      const int at[kMaxRank] = {row / (unit[2] * unit[1]), row / unit[2] % unit[1], row % unit[2]};
      row_offset[row] = at[0] >= unit[0] ? 1u << 24 : at[0] | at[1] << 8 | at[2] << 16;
    }
  }
};

// Three numbers of eight bits, and a bit that says there are none.
constexpr uint32_t kNoRow = 1u << 24;
__device__ __forceinline__ int entry(uint32_t packed, int a) { return packed >> (8 * a) & 255; }

// A row of a consumer: its window and its token.
__device__ __forceinline__ RowInfo describe_row(const ForwardParams& params, const ItemInfo& item, int consumer,
                                                uint32_t row_offset) {
  RowInfo row;
  bool exists = row_offset < kNoRow;
  int32_t token = item.batch;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const GroupAxis group = item.group[a];
    int32_t ordinal = item.first[a] + (params.grid[a] > 1 ? consumer * params.unit[a] : 0) + entry(row_offset, a);
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
                              Config::kQStages, Config::kShapes, Config::kTileBatch, Config::kBatches> record;
  struct None {};
  alignas(16) std::conditional_t<Config::kMaskProduct, None, ColumnMask<Config::kN>> mask[Config::kShapes];
  ProductMask<Config::kN, Config::kRingConsumers, Config::kMaskSlots, Config::kQStages> mask_product;
};

}  // namespace jax_na::hopper
