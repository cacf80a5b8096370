// Configuration and shared memory of the Hopper backward mainloop: what its producer and its consumers tell each other.
#pragma once

#include <type_traits>

#include "../arch/sm90/barrier.h"
#include "../arch/sm90/copy_async.h"
#include "backward_params_sm90.h"

namespace jax_na::hopper {

// Registers and shared memory per configuration: see DESIGN.md, "Hopper, backward".
template <typename T_, int D, int kQueriesOfBox, int kWarpgroups, int kQueryRing, int kKeyRing, int kCtasPerSm>
struct BackwardConfig {
  using T = T_;
  static constexpr int kDim = D;
  static constexpr int kConsumers = kWarpgroups;
  static constexpr int kKeys = 64 * kWarpgroups;  // rows of the accumulators
  static constexpr int kQueries = kQueriesOfBox;  // columns
  static constexpr int kStages = kQueryRing;      // of query boxes
  static constexpr int kKeyStages = kKeyRing;     // of key tiles
  static constexpr int kTileStages = 2;           // of what is known about a tile
  static constexpr int kMinCtas = kCtasPerSm;
  static constexpr bool kReallocateRegisters = kConsumers > 1;
  // 128 columns need every register the consumers can get; the producer then spills a little, once per tile.
  static constexpr int kConsumerRegisters = kQueries == 128 ? 240 : 232;
  static constexpr int kProducerRegisters = kQueries == 128 ? 24 : 40;
  // The first products of a tile run while dk and dv of the one before leave: if there are registers for both, and room for
  // both tiles' keys.
  static constexpr bool kOverlapTiles = kConsumers == 1;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = kConsumerThreads + (kReallocateRegisters ? 128 : 32);
  static constexpr int kHelperThreads = kReallocateRegisters ? 96 : 0;  // the rest of the producer's warpgroup
  static constexpr int kHelperWarps = kHelperThreads / 32;
  static constexpr int kTableThreads = kConsumerThreads + kHelperThreads;  // who reads BackwardShared::prefix
  static constexpr int kStartThreads = kTableThreads + 32;                 // and the producer
  static constexpr int kRowBytes = D >= 64 ? 128 : 64;                     // the swizzle span
  static constexpr int kBlockChannels = kRowBytes / 2;
  static constexpr int kChannelBlocks = D / kBlockChannels;
  static constexpr int kKeyBlockBytes = kKeys * kRowBytes;
  static constexpr int kQueryBlockBytes = kQueries * kRowBytes;
  // dq of one box: the warpgroups split its 64-row blocks, or its channels if there is one block only.
  static constexpr bool kSplitChannels = kQueries / 64 < kConsumers;
  static constexpr int kDqChannels = kSplitChannels ? D / kConsumers : D;
  static constexpr int kDsBuffers = kConsumers > 1 ? 2 : 1;
  static constexpr int kPrefixRows = kMostQueryShapes * (kQueries + 5);  // sums over the axes of box + 1
  static_assert(kSplitChannels ? kQueries == 64 : kQueries == 64 * kConsumers, "dq split");
};

// One axis of a tile. Ordinals count the tokens of the dilation group that lie in this shard.
struct TileAxis {
  int32_t query_first, query_begin;  // first query token of the group; ordinal of the first query any key needs
  int32_t range;                     // queries from there on
  int32_t boxes;                     // ceil(range / box of the tile's shape)
  int32_t full_begin, full_end;      // the ordinals that see every key of the tile
};

// What the producer says about a key tile.
template <class C>
struct TileRecord {
  int2 interval[kMaxRank][C::kKeys];            // the query ordinals that see each key
  int32_t token[C::kKeys];                      // of each key, within the batch entry, or -1
  int32_t boxes;                                // to visit, at least one; kNoTile: the work is done
  int32_t shape;                                // of the boxes
  int32_t box[kMaxRank], prefix_row[kMaxRank];  // of the shape
  uint32_t number;                              // of the tile
  int32_t head, batch;                          // of the keys
};
constexpr int32_t kNoTile = -1;

constexpr int kDsBarrier = 1;  // named barriers
constexpr int kStartBarrier = 2;
constexpr int kTableBarrier = 3;
constexpr int kHelperBarrier = 4;

// What the producer says about a query box.
struct alignas(16) BoxRecord {
  int32_t origin[kMaxRank];  // query ordinals
  int32_t full;              // every key of the tile is seen by the whole box
  int64_t dq_offset;         // of the box's first query and its head in dq, in elements
  int64_t stats_row;         // the same in BackwardParams::stats
  uint32_t last;             // packed coordinates of the last token that lies in the range
};

// lse log2(e) and delta of a box' queries, as the consumers read them: of two columns at once. Where helpers copy them,
// each has an array of its own: half as many loads (H200: 2 to 4 % at D 128). The producer of the smaller configurations
// copies them as they are (with two arrays: 2 to 3 % slower).
template <int kQueries>
struct SplitStats {
  float lse[kQueries], deltas[kQueries];

  __device__ __forceinline__ void load(int query, const float2* source, bool valid) {
    sm90::copy_async_or_zero<4>(&lse[query], &source->x, valid);
    sm90::copy_async_or_zero<4>(&deltas[query], &source->y, valid);
  }
  __device__ __forceinline__ float2 lse_pair(int query) const { return reinterpret_cast<const float2&>(lse[query]); }
  __device__ __forceinline__ float2 delta_pair(int query) const { return reinterpret_cast<const float2&>(deltas[query]); }
  __device__ __forceinline__ float delta(int query) const { return deltas[query]; }
};
template <int kQueries>
struct JoinedStats {
  float2 stats[kQueries];

  __device__ __forceinline__ void load(int query, const float2* source, bool valid) {
    sm90::copy_async_or_zero<8>(&stats[query], source, valid);
  }
  __device__ __forceinline__ float4 pair(int query) const { return reinterpret_cast<const float4&>(stats[query]); }
  __device__ __forceinline__ float2 lse_pair(int query) const { return make_float2(pair(query).x, pair(query).z); }
  __device__ __forceinline__ float2 delta_pair(int query) const { return make_float2(pair(query).y, pair(query).w); }
  __device__ __forceinline__ float delta(int query) const { return stats[query].y; }
};

template <class C>
struct BackwardShared {
  alignas(1024) uint8_t key[C::kKeyStages][C::kChannelBlocks * C::kKeyBlockBytes];
  alignas(1024) uint8_t value[C::kKeyStages][C::kChannelBlocks * C::kKeyBlockBytes];
  alignas(1024) uint8_t query[C::kStages][C::kChannelBlocks * C::kQueryBlockBytes];
  alignas(1024) uint8_t grad_out[C::kStages][C::kChannelBlocks * C::kQueryBlockBytes];
  alignas(1024) uint8_t ds[C::kDsBuffers][C::kKeys * C::kQueries * 2];
  using Stats = std::conditional_t<(C::kHelperThreads > 0), SplitStats<C::kQueries>, JoinedStats<C::kQueries>>;
  alignas(16) Stats stats[C::kStages];
  float grad_norm[C::kStages][C::kQueries];
  BoxRecord box[C::kStages];
  alignas(16) uint32_t mask[C::kHelperThreads > 0 ? C::kStages : 1][C::kHelperThreads > 0 ? C::kKeys : 1][4];  // by helpers
  // prefix[prefix_row + t][q], bit 2 j + e: column 8 j + 2 q + e of a query box has a coordinate below t on that axis. The
  // columns of lanes with lane % 4 == q that lie in the interval [lo, hi) are therefore prefix[hi] & ~prefix[lo].
  alignas(16) uint32_t prefix[C::kPrefixRows][4];
  int2 query_row[kMostQueryShapes][C::kQueries];  // of each column: packed coordinates, token relative to its box's first
  TileRecord<C> tile[C::kTileStages];
  TileAxis axis[kMaxRank];  // of the producer's tile, its own
  alignas(8) uint64_t full[C::kStages];
  uint64_t described[C::kStages];  // the record of the box is there, for the helpers
  uint64_t empty[C::kStages];
  uint64_t key_full[C::kKeyStages];
  uint64_t key_empty[C::kKeyStages];
  uint64_t tile_full[C::kTileStages];
  uint64_t tile_empty[C::kTileStages];
};

// Coordinates of row `row` inside a box, ten bits per axis (axis 2 lowest), the top one of each ten zero.
__device__ __forceinline__ uint32_t packed_coordinates(uint32_t row, const FastDivisor& box1, const FastDivisor& box2) {
  const uint32_t c2 = box2.split(row);
  const uint32_t c1 = box1.split(row);
  return row << 20 | c1 << 10 | c2;
}
__device__ __forceinline__ int32_t coordinate(uint32_t packed, int a) { return packed >> (20 - 10 * a) & 1023; }

// Is every coordinate at most that of `last`? The top bit of each ten stops the borrow.
__device__ __forceinline__ bool not_beyond(uint32_t packed, uint32_t last) {
  constexpr uint32_t kGuards = 1u << 29 | 1u << 19 | 1u << 9;
  return (((last | kGuards) - packed) & kGuards) == kGuards;
}

// Packed coordinates of column `row` of a query box, and its token relative to the box's first.
__device__ __forceinline__ int2 query_row(const BackwardParams& params, const QueryShape& shape, uint32_t row) {
  const uint32_t packed = packed_coordinates(row, shape.box[1], shape.box[2]);
  int32_t token = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    token += coordinate(packed, a) * params.axis[a].dilation * params.axis[a].query_token_stride;
  }
  return make_int2(packed, token);
}

}  // namespace jax_na::hopper
