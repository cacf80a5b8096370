// Constants of the forward kernels for small windows, and what lies in their shared memory.
#pragma once

#include <cstddef>

#include "forward_shared_sm90.h"

namespace jax_na::hopper {

template <typename T_, int kDim_>
struct SmallForwardConfig {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kN = kWarpColumns;             // of a consumer, at most
  static constexpr int kConsumers = kMostSmallWarps;  // at most; one more warp produces
  static constexpr Sharing kSharing = Sharing::kWarps;
  static constexpr bool kMaskProduct = false;
  static constexpr int kThreads = 32 * kSmallWarpsOfSm;  // what the registers have to suffice for
  static_assert(kDim == 32 || kDim == 64, "a row is one swizzle span");
};

// Where the keys of a warp lie in a tile, and which of them lie below a coordinate: the tables of ColumnMask over the box
// of a warp's keys.
struct WarpKeys {
  static constexpr int kColumns = kWarpColumns;
  static constexpr int kMaxEntries = kColumns + 2 * kMaxRank;
  alignas(16) uint32_t bits[kMaxEntries][4];  // as in ColumnMask
  uint16_t tile_row[kColumns];                // of a column, relative to the box's first key

  __device__ __forceinline__ void build(const ForwardParams& params, int thread, int num_threads) {
    const int lane = thread % 32;
    for (int i = thread; i < kColumns; i += num_threads) {
      const uint32_t key = params.small.column[i];
      const int row = (entry(key, 0) * params.kv[0].extent[1] + entry(key, 1)) * params.kv[0].extent[2] + entry(key, 2);
      tile_row[i] = key < kNoRow ? row : 0;
    }
    for (int q = 0; q < 4; ++q) {
      const int column = lane / 2 * 8 + q * 2 + lane % 2;
      const uint32_t key = column < kColumns ? params.small.column[column] : kNoRow;
      int base = 0;
      for (int a = 0; a < kMaxRank; ++a) {
        const int extent = params.warp_keys[a];
        for (int x = thread / 32; x <= extent; x += num_threads / 32) {
          const uint32_t value = __ballot_sync(~0u, key < kNoRow && entry(key, a) < x);
          if (lane == 0) bits[base + x][q] = value;
        }
        base += extent + 1;
      }
    }
  }
};

// One coordinate of the query tile on one axis; those of axis 0 come first.
struct TileCoordinate {
  uint8_t axis;
  uint8_t at;           // within its axis
  uint8_t first, last;  // coordinates of the same axis that belong to the same warp, counted like `at`
};

// In shared memory behind the rings of Q, K and V, and before what depends on the number of rows and stages.
struct SmallForwardRecords {
  struct Item {
    int32_t num_tiles;    // of keys; < 0: no more items
    int32_t head;         // the first
    int32_t first_token;  // of the batch entry, in [batch, axes]
  };
  // By stage and box: the row of the tile where the box' keys begin, < 0: it sees nothing of the tile.
  int32_t first_key[kMostSmallStages][kMostSmallWarps];
  Item item[kMostSmallStages];
  TileCoordinate coordinate[kMostSmallCoordinates];
  uint32_t row_entries[16 * kMostSmallWarps];  // of a row: its coordinates, counted as in `coordinate`, or kNoRow
  WarpKeys keys;
  // The producer's own. By coordinate: the window, and what the axis contributes to mask, first_key and token of a row.
  alignas(16) uint4 axis_mask[kMostSmallCoordinates];
  int32_t axis_first_key[kMostSmallCoordinates];
  int32_t axis_token[kMostSmallCoordinates];
  Interval window[kMostSmallCoordinates];
  GroupAxis group[kMaxRank];
  int32_t first[kMaxRank];  // query of the tile, local ordinal in the group
  // full: an arrival for the loads, one for the records.
  alignas(16) uint64_t q_full[kMostSmallStages];
  uint64_t q_empty[kMostSmallStages];
  uint64_t k_full[kMostSmallStages], v_full[kMostSmallStages];
  uint64_t kv_empty[kMostSmallStages];

  // By one thread. warps: consumers.
  __device__ __forceinline__ void init_barriers(int warps) {
    for (int i = 0; i < kMostSmallStages; ++i) {
      sm90::mbarrier_init(&q_full[i], 2);
      sm90::mbarrier_init(&q_empty[i], warps);
      sm90::mbarrier_init(&k_full[i], 2);
      sm90::mbarrier_init(&v_full[i], 1);
      sm90::mbarrier_init(&kv_empty[i], warps);
    }
    sm90::fence_barrier_init();
  }

  __device__ __forceinline__ void build_coordinates(const ForwardParams& params, int thread, int num_threads) {
    const auto &unit = params.unit, &grid = params.grid;
    for (int row = thread; row < 16 * grid[0] * grid[1] * grid[2]; row += num_threads) {
      const int box = row / 16, n = row % 16;
      const bool exists = n < unit[0] * unit[1] * unit[2];
      const int m = exists ? n : 0;
      const int at[kMaxRank] = {m / (unit[2] * unit[1]), m / unit[2] % unit[1], m % unit[2]};
      const int of[kMaxRank] = {box / (grid[2] * grid[1]), box / grid[2] % grid[1], box % grid[2]};
      uint32_t entries = exists ? 0 : kNoRow;
      int base = 0;
      for (int a = 0; a < kMaxRank; ++a) {
        entries |= uint32_t(base + of[a] * unit[a] + at[a]) << (8 * a);
        base += unit[a] * grid[a];
      }
      row_entries[row] = entries;
    }
    int base = 0;
    for (int a = 0; a < kMaxRank; ++a) {
      const int extent = unit[a] * grid[a];
      for (int at = thread; at < extent; at += num_threads) {
        const int first = at / unit[a] * unit[a];
        coordinate[base + at] = {uint8_t(a), uint8_t(at), uint8_t(first), uint8_t(first + unit[a] - 1)};
      }
      base += extent;
    }
  }
};
static_assert(sizeof(SmallForwardRecords) <= kSmallRecordBytes, "as the plan counts");

// The parts of a CTA's shared memory, whose sizes are the plan's.
struct SmallForwardShared {
  uint32_t q, k, v;  // shared-memory addresses of the rings' first slots
  SmallForwardRecords* records;
  uint4* mask;     // [stage][row]: which columns of its box' keys a row sees, a word for each lane of a quad
  int32_t* token;  // [query stage][row] from first_token, or -1: no such query
  int32_t rows;    // 16 a box

  __device__ __forceinline__ SmallForwardShared(const ForwardParams& params, unsigned char* memory) {
    const SmallForwardParams& small = params.small;
    rows = 16 * small.boxes;
    q = sm90::smem_address(memory);
    k = q + small.q_stages * small.q_slot_bytes;
    v = k + small.stages * small.kv_slot_bytes;
    records = reinterpret_cast<SmallForwardRecords*>(memory + (v - q) + small.stages * small.kv_slot_bytes);
    mask = reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(records) + kSmallRecordBytes);
    token = reinterpret_cast<int32_t*>(mask + small.stages * rows);
  }
};

// Position in a ring whose length is a run-time number; see sm90::RingPosition.
struct SmallRing {
  int32_t slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int32_t slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

constexpr int kTablesBarrier = 1;

}  // namespace jax_na::hopper
