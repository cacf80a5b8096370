// Hopper backward mainloop: gradients of one outer tile over the boxes of the inner side that its windows reach.
//
// Pass kKeys (outer = keys): S^T = K Q^T, dP^T = V dO^T with keys on rows, P = exp2(S scale log2e - lse log2e), dS = P (dP
// - delta);
//   dV += P^T dO and dK += dS^T Q take P and dS from registers; dS goes through shared memory for dQ += dS K, which is
//   added to a float32 workspace in memory (red.global.add.v4). The query heads of a key/value head are looped inside the
//   tile.
// Pass kQueries (outer = queries): the same two products with queries on rows, dQ += dS K from registers; deterministic.
// One producer warp (TMA for the tiles, cp.async for lse and delta) and one or two consumer warpgroups of 64 rows each.
// Source of the schedule: FlashAttention-3 (arXiv 2407.08608), backward; own: window rule, masks, dq path, run-time boxes.
#pragma once

#include "../arch/sm90/barrier.h"
#include "../arch/sm90/copy_async.h"
#include "../arch/sm90/tma.h"
#include "../arch/sm90/wgmma.h"
#include "../arch/sm90/wgmma_first.h"
#include "backward_params_sm90.h"
#include "recompute_sm90.cuh"

namespace jax_na::hopper {

// Registers and shared memory per configuration: see DESIGN.md, "Hopper, backward".
template <typename T_, int D, int kInnerRows, int kWarpgroups, int kRing, int kOuterRing, int kCtasPerSm,
          BackwardPass kPass_>
struct BackwardConfig {
  using T = T_;
  static constexpr BackwardPass kPass = kPass_;
  static constexpr int kDim = D;
  static constexpr int kConsumers = kWarpgroups;
  static constexpr int kOuter = 64 * kWarpgroups;  // rows: keys in pass kKeys
  static constexpr int kInner = kInnerRows;        // columns: queries in pass kKeys
  static constexpr int kStages = kRing;            // of inner boxes
  static constexpr int kOuterStages = kOuterRing;  // of outer tiles
  static constexpr int kTileStages = 2;            // of what is known about a tile
  static constexpr int kMinCtas = kCtasPerSm;
  static constexpr bool kReallocateRegisters = kConsumers > 1;
  // 128 columns need every register the consumers can get; the producer then spills a little, once per tile.
  static constexpr int kConsumerRegisters = kInner == 128 ? 240 : 232;
  static constexpr int kProducerRegisters = kInner == 128 ? 24 : 40;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = kConsumerThreads + (kReallocateRegisters ? 128 : 32);
  static constexpr int kRowBytes = D >= 64 ? 128 : 64;  // the swizzle span
  static constexpr int kBlockChannels = kRowBytes / 2;
  static constexpr int kChannelBlocks = D / kBlockChannels;
  static constexpr int kOuterBlockBytes = kOuter * kRowBytes;
  static constexpr int kInnerBlockBytes = kInner * kRowBytes;
  // dq of one box: the warpgroups split its 64-row blocks, or its channels if there is one block only.
  static constexpr bool kSplitChannels = kInner / 64 < kConsumers;
  static constexpr int kDqChannels = kSplitChannels ? D / kConsumers : D;
  static constexpr int kDsBuffers = kPass == BackwardPass::kQueries ? 0 : kConsumers > 1 ? 2 : 1;
  static_assert(kSplitChannels ? kInner == 64 : kInner == 64 * kConsumers, "dq split");
};

// One axis of a tile. Ordinals count the tokens of the dilation group that lie in this shard.
struct TileAxis {
  int32_t inner_first, inner_begin;  // first inner token of the group; ordinal of the first inner token any row needs
  int32_t range;                     // inner tokens from there on
  int32_t boxes;                     // ceil(range / inner_box)
  int32_t full_begin, full_end;      // the ordinals every row of the tile sees
};

// What the producer says about an outer tile.
template <class C>
struct TileRecord {
  int2 interval[kMaxRank][C::kOuter];  // the inner ordinals each row sees
  int32_t outer_row[C::kOuter];        // of each row: token within the batch entry, or -1
  int32_t boxes;                       // to visit; kNoTile: the work is done
  int32_t head, batch;                 // of the outer side
};
constexpr int32_t kNoTile = -1;

// What the producer says about a box.
struct alignas(16) BoxRecord {
  int32_t origin[kMaxRank];  // inner ordinals
  int32_t full;              // every row sees the whole box
  int64_t dq_offset;         // of the box's first query and its head in dq, in elements
  uint32_t last;             // packed coordinates of the last token that lies in the range
};

template <class C>
struct BackwardShared {
  alignas(1024) uint8_t outer0[C::kOuterStages][C::kChannelBlocks * C::kOuterBlockBytes];
  alignas(1024) uint8_t outer1[C::kOuterStages][C::kChannelBlocks * C::kOuterBlockBytes];
  alignas(1024) uint8_t inner0[C::kStages][C::kChannelBlocks * C::kInnerBlockBytes];
  alignas(1024) uint8_t inner1[C::kStages][C::kChannelBlocks * C::kInnerBlockBytes];
  alignas(1024) uint8_t ds[C::kDsBuffers > 0 ? C::kDsBuffers : 1][C::kDsBuffers > 0 ? C::kOuter * C::kInner * 2 : 16];
  alignas(16) float2 stats[C::kStages][C::kInner];
  BoxRecord box[C::kStages];
  alignas(16) uint4 prefix[kMaxPrefixRows];
  int2 inner_row[C::kInner];  // of each column: packed coordinates, token relative to the first of its box
  TileRecord<C> tile[C::kTileStages];
  TileAxis axis[kMaxRank];  // of the producer's tile, its own
  alignas(8) uint64_t full[C::kStages];
  uint64_t empty[C::kStages];
  uint64_t outer_full[C::kOuterStages];
  uint64_t outer_empty[C::kOuterStages];
  uint64_t tile_full[C::kTileStages];
  uint64_t tile_empty[C::kTileStages];
};

// Which tile, head and dilation group a number stands for.
struct TileIndex {
  int32_t tile[kMaxRank];
  int32_t group[kMaxRank];
  int32_t head;  // of the outer side
  int32_t batch;

  // Tiles of one head and group follow one another: they share what they read in L2.
  __device__ __forceinline__ TileIndex(const BackwardParams& params, uint32_t linear) {
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) tile[a] = params.axis[a].tiles.split(linear);
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) group[a] = params.axis[a].groups.split(linear);
    head = params.outer_heads.split(linear);
    batch = linear;
  }
};

// The tokens of this CTA's dilation group on one axis of one side.
struct GroupTokens {
  int32_t first, count;
};

template <bool kQuerySide>
__device__ __forceinline__ GroupTokens group_tokens(const BackwardParams& params, const TileIndex& index, int a,
                                                    int32_t length) {
  const int32_t dilation = params.axis[a].dilation;
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

template <BackwardPass kPass>
__device__ __forceinline__ GroupTokens outer_tokens(const BackwardParams& params, const TileIndex& index, int a) {
  return group_tokens<kPass == BackwardPass::kQueries>(params, index, a, params.axis[a].outer_length);
}

// The inner ordinals that the rows of the tile need, from the intervals of its first and last row: both ends never
// decrease.
template <BackwardPass kPass>
__device__ __forceinline__ TileAxis tile_axis(const BackwardParams& params, const TileIndex& index, int a) {
  const BackwardAxis& plan = params.axis[a];
  const GroupTokens outer = outer_tokens<kPass>(params, index, a);
  const GroupTokens inner = group_tokens<kPass == BackwardPass::kKeys>(params, index, a, plan.inner_length);
  const int32_t origin = index.tile[a] * plan.outer_box;
  const int32_t end = min(origin + plan.outer_box, outer.count);
  TileAxis tile{inner.first, 0, 0, 0, 0, -1};
  if (origin >= end) return tile;
  const int2* table = params.intervals + plan.table_row + outer.first;
  const int2 low = table[origin * plan.dilation], high = table[(end - 1) * plan.dilation];
  tile.inner_begin = low.x;
  tile.range = high.y - low.x;
  tile.boxes = plan.inner_box_divisor.divide(tile.range + plan.inner_box - 1);
  if (end - origin == plan.outer_box) tile.full_begin = high.x, tile.full_end = low.y;
  return tile;
}

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

// The tables that are the same for every tile, by the consumer threads.
template <class C>
__device__ __forceinline__ void fill_tables(const BackwardParams& params, BackwardShared<C>& shared) {
  for (int i = threadIdx.x; i < kMaxPrefixRows; i += C::kConsumerThreads) shared.prefix[i] = params.prefix[i];
  if (threadIdx.x < C::kInner) {
    const uint32_t packed = packed_coordinates(threadIdx.x, params.inner_box1, params.inner_box2);
    int32_t token = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      token += coordinate(packed, a) * params.axis[a].dilation * params.axis[a].inner_token_stride;
    }
    shared.inner_row[threadIdx.x] = make_int2(packed, token);
  }
}

// Row `row` of a tile: what it sees, where it lies.
template <class C>
__device__ __forceinline__ void fill_row(const BackwardParams& params, TileRecord<C>& record, const TileIndex& index,
                                         const GroupTokens (&outer)[kMaxRank], int row) {
  const uint32_t packed = packed_coordinates(row, params.outer_box1, params.outer_box2);
  bool valid = row < params.outer_volume;
  int2 interval[kMaxRank];
  int32_t token = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const BackwardAxis& plan = params.axis[a];
    const int32_t ordinal = index.tile[a] * plan.outer_box + coordinate(packed, a);
    const int32_t x = outer[a].first + ordinal * plan.dilation;
    const bool inside = ordinal < outer[a].count;
    valid &= inside;
    interval[a] = inside ? params.intervals[plan.table_row + x] : make_int2(0, 0);
    token += x * plan.outer_token_stride;
  }
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) record.interval[a][row] = valid ? interval[a] : make_int2(0, 0);
  record.outer_row[row] = valid ? token : -1;
}

// Walks the boxes of a tile: query heads of the group outermost, then axis 0, 1, 2.
template <class C>
struct BoxWalk {
  const BackwardShared<C>& shared;
  int32_t box[kMaxRank] = {0, 0, 0};
  int32_t head = 0;
  __device__ __forceinline__ explicit BoxWalk(const BackwardShared<C>& s) : shared(s) {}
  __device__ __forceinline__ void next() {
    if (++box[2] < shared.axis[2].boxes) return;
    box[2] = 0;
    if (++box[1] < shared.axis[1].boxes) return;
    box[1] = 0;
    if (++box[0] < shared.axis[0].boxes) return;
    box[0] = 0;
    ++head;
  }
};

template <class C>
__device__ __forceinline__ int32_t num_boxes(const BackwardParams& params, const BackwardShared<C>& shared) {
  const int32_t boxes = shared.axis[0].boxes * shared.axis[1].boxes * shared.axis[2].boxes;
  return C::kPass == BackwardPass::kKeys ? boxes * params.group_heads : boxes;
}

template <class C>
__device__ __forceinline__ void load_tile(const CUtensorMap* map, const MapCoords& at, uint8_t* target, uint64_t* barrier,
                                          int32_t block_bytes) {
#pragma unroll
  for (int block = 0; block < C::kChannelBlocks; ++block) {
    sm90::tma_load_5d(sm90::smem_address(target) + block * block_bytes, map, barrier, at.c[0] + block * C::kBlockChannels,
                      at.c[1], at.c[2], at.c[3], at.c[4]);
  }
}

// ---- producer: one warp ----
template <class C>
struct Producer {
  static constexpr bool kKeysPass = C::kPass == BackwardPass::kKeys;
  static constexpr int kRowsPerLane = C::kInner / 32;

  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int lane;
  // Of the columns this lane loads lse and delta for. Columns beyond the box are beyond every `last` on axis 0.
  uint32_t coordinates[kRowsPerLane];
  int32_t row_token[kRowsPerLane];
  sm90::RingPosition<C::kStages> ring;
  sm90::RingPosition<C::kOuterStages> outer_ring;
  sm90::RingPosition<C::kTileStages> tile_ring;

  __device__ __forceinline__ Producer(const BackwardParams& p, BackwardShared<C>& s)
      : params(p), shared(s), lane(threadIdx.x % 32) {
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      coordinates[i] = packed_coordinates(lane + 32 * i, params.inner_box1, params.inner_box2);
      row_token[i] = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        row_token[i] += coordinate(coordinates[i], a) * params.axis[a].dilation * params.axis[a].inner_token_stride;
      }
    }
  }

  __device__ __forceinline__ void load_outer(const TileIndex& index, const GroupTokens (&outer)[kMaxRank]) const {
    int32_t token[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      token[a] = outer[a].first + index.tile[a] * params.axis[a].outer_box * params.axis[a].dilation;
    }
    const MapCoords at = map_coords(params.outer_layout, index.head * C::kDim, token, index.batch);
    uint64_t* barrier = &shared.outer_full[outer_ring.slot];
    sm90::mbarrier_arrive_expect_tx(barrier, 2 * params.outer_volume * C::kDim * sizeof(typename C::T));
    load_tile<C>(&params.outer0, at, shared.outer0[outer_ring.slot], barrier, C::kOuterBlockBytes);
    load_tile<C>(&params.outer1, at, shared.outer1[outer_ring.slot], barrier, C::kOuterBlockBytes);
  }

  __device__ __forceinline__ void load_box(const TileIndex& index, const BoxWalk<C>& walk) {
    const int32_t head = kKeysPass ? index.head * params.group_heads + walk.head : index.head / params.group_heads;
    int32_t ordinal[kMaxRank], at_token[kMaxRank], token = 0;
    uint32_t last = 0;
    bool full = params.outer_volume == C::kOuter;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const BackwardAxis& plan = params.axis[a];
      const TileAxis& tile = shared.axis[a];
      const int32_t origin = walk.box[a] * plan.inner_box;
      ordinal[a] = tile.inner_begin + origin;
      at_token[a] = tile.inner_first + ordinal[a] * plan.dilation;
      token += at_token[a] * plan.inner_token_stride;
      last |= (min(tile.range - origin, plan.inner_box) - 1) << (20 - 10 * a);
      full &= ordinal[a] >= tile.full_begin && ordinal[a] + plan.inner_box <= tile.full_end;
    }
    sm90::mbarrier_wait(&shared.empty[ring.slot], ring.parity ^ 1);
    uint64_t* barrier = &shared.full[ring.slot];
    if (lane == 0) {
      BoxRecord& record = shared.box[ring.slot];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) record.origin[a] = ordinal[a];
      record.full = full;
      record.last = last;
      record.dq_offset = ((index.batch * params.q_tokens + token) * params.heads + head) * C::kDim;
      const MapCoords at = map_coords(params.inner_layout, head * C::kDim, at_token, index.batch);
      sm90::mbarrier_arrive_expect_tx(barrier, 2 * params.inner_volume * C::kDim * sizeof(typename C::T));
      load_tile<C>(&params.inner0, at, shared.inner0[ring.slot], barrier, C::kInnerBlockBytes);
      load_tile<C>(&params.inner1, at, shared.inner1[ring.slot], barrier, C::kInnerBlockBytes);
    }
    if constexpr (kKeysPass) {
      const float2* stats = params.stats + (int64_t(index.batch) * params.heads + head) * params.q_tokens + token;
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        const bool valid = not_beyond(coordinates[i], last);
        sm90::copy_async_8_or_zero(&shared.stats[ring.slot][lane + 32 * i], stats + (valid ? row_token[i] : 0), valid);
      }
      sm90::copy_async_arrive(barrier);
    }
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
      GroupTokens outer[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) outer[a] = outer_tokens<C::kPass>(params, index, a);
      if (lane < kMaxRank) shared.axis[lane] = tile_axis<C::kPass>(params, index, lane);
#pragma unroll
      for (int i = 0; i < C::kOuter / 32; ++i) fill_row(params, record, index, outer, lane + 32 * i);
      __syncwarp();
      const int32_t boxes = num_boxes(params, shared);
      if (lane == 0) {
        record.boxes = boxes;
        record.head = index.head;
        record.batch = index.batch;
      }
      sm90::mbarrier_arrive(&shared.tile_full[tile_ring.slot]);
      tile_ring.advance();
      if (boxes > 0) {
        sm90::mbarrier_wait(&shared.outer_empty[outer_ring.slot], outer_ring.parity ^ 1);
        if (lane == 0) load_outer(index, outer);
        outer_ring.advance();
      }
      BoxWalk<C> walk(shared);
#pragma unroll 1
      for (int32_t it = 0; it < boxes; ++it) {
        load_box(index, walk);
        walk.next();
      }
      __syncwarp();  // every lane has read shared.axis
    }
    if constexpr (kKeysPass) sm90::copy_async_wait_all();
  }
};

// ---- the mask: which columns of a box a row of the tile sees ----
// Bit 2 j + e of word[h]: row h (of the thread's two) sees column 8 j + 2 (lane % 4) + e.
template <class C>
struct RowMask {
  uint32_t word[2];

  __device__ __forceinline__ RowMask() : word{~0u, ~0u} {}

  // row: the first of the thread's two rows, eight apart.
  __device__ __forceinline__ RowMask(const BackwardParams& params, const BackwardShared<C>& shared,
                                     const TileRecord<C>& tile, const BoxRecord& record, int row) {
    const uint32_t* prefix = reinterpret_cast<const uint32_t*>(shared.prefix) + threadIdx.x % 4;
    word[0] = word[1] = ~0u;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < kMaxRank - params.rank) continue;
      const int32_t size = params.axis[a].inner_box;
      const int32_t origin = record.origin[a];
      const uint32_t* table = prefix + 4 * params.axis[a].prefix_row;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int2 interval = tile.interval[a][row + 8 * h];
        const int32_t low = min(max(interval.x - origin, 0), size);
        const int32_t high = min(max(interval.y - origin, 0), size);
        word[h] &= table[4 * high] & ~table[4 * low];
      }
    }
  }
};

// ---- global memory ----
// fp32 accumulator pairs of an 8-column block and its right neighbour to 16-byte additions: even lanes take the left block,
// odd lanes the right one; `row` points there.
__device__ __forceinline__ void add_row(float* row, float left0, float left1, float right0, float right1, bool valid) {
  const bool odd = threadIdx.x & 1;
  const float got0 = __shfl_xor_sync(~0u, odd ? left0 : right0, 1);
  const float got1 = __shfl_xor_sync(~0u, odd ? left1 : right1, 1);
  sm90::reduce_add_x4(row, odd ? got0 : left0, odd ? got1 : left1, odd ? right0 : got0, odd ? right1 : got1, valid);
}

// Four 8-column blocks of one row, each a packed pair per lane of a quad, to 16 bytes per lane: lane q gets block q.
__device__ __forceinline__ uint4 transpose_quad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
  const uint32_t a = __shfl_xor_sync(~0u, high ? w0 : w2, 2);
  const uint32_t b = __shfl_xor_sync(~0u, high ? w1 : w3, 2);
  // Lanes 0, 1 now hold blocks 0, 1 of lanes l and l + 2; lanes 2, 3 hold blocks 2, 3 of lanes l - 2 and l.
  const uint32_t e0 = high ? a : w0, e1 = high ? b : w1, f0 = high ? w2 : a, f1 = high ? w3 : b;
  const uint32_t c = __shfl_xor_sync(~0u, odd ? e0 : e1, 1);
  const uint32_t d = __shfl_xor_sync(~0u, odd ? f0 : f1, 1);
  return make_uint4(odd ? c : e0, odd ? e1 : c, odd ? d : f0, odd ? f1 : d);
}

// Two rows of fp32 accumulators, times factor, to rows of T; null: no row. out points at this lane's first 16 bytes.
// nan_found is set if there is a NaN among them.
template <typename T, int kChannels>
__device__ __forceinline__ void store_rows(T* const (&out)[2], const float (&acc)[kChannels / 2], float factor,
                                           uint32_t* nan_found) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < kChannels / 8; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = sm90::pack_pair<T>(acc[4 * (j + i) + 2 * h] * factor, acc[4 * (j + i) + 2 * h + 1] * factor);
        kept = keep_nan<T>(kept, w[i]);
      }
      const uint4 words = transpose_quad(w[0], w[1], w[2], w[3]);
      if (out[h] != nullptr) *reinterpret_cast<uint4*>(out[h] + 8 * j) = words;
    }
    if (out[h] != nullptr && kept_nan<T>(kept)) *nan_found = 1;
  }
}

// ---- consumers: one or two warpgroups of 64 rows ----
constexpr int kDsBarrier = 1;  // named barriers
constexpr int kStartBarrier = 2;

template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr bool kKeysPass = C::kPass == BackwardPass::kKeys;
  static constexpr int kScores = C::kInner / 2;  // accumulator registers of S and dP
  using Grads = sm90::Wgmma<T, C::kDim>;

  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int warpgroup;
  const int row;  // the thread's first row of the tile; the second is eight further

  // S or dP = outer (64 rows of this warpgroup) times inner transposed, over the channels.
  __device__ __forceinline__ void issue_scores(float (&acc)[kScores], const uint8_t* outer, const uint8_t* inner) const {
    const uint64_t a = sm90::descriptor_k_major<C::kRowBytes>(sm90::smem_address(outer) + warpgroup * 64 * C::kRowBytes);
    const uint64_t b = sm90::descriptor_k_major<C::kRowBytes>(sm90::smem_address(inner));
    constexpr int kStepsPerBlock = C::kRowBytes / 32;
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int block = k / kStepsPerBlock, within = k % kStepsPerBlock * 32;
      const uint64_t a_step = sm90::descriptor_advance(a, block * C::kOuterBlockBytes + within);
      const uint64_t b_step = sm90::descriptor_advance(b, block * C::kInnerBlockBytes + within);
      if (k == 0) {
        sm90::WgmmaFirst<T, C::kInner>::template ss<false, false>(acc, a_step, b_step);
      } else {
        sm90::Wgmma<T, C::kInner>::template ss<false, false>(acc, a_step, b_step, true);
      }
    }
    sm90::wgmma_commit();
  }

  // acc += registers (64 rows x inner) times inner tile (inner rows x channels).
  __device__ __forceinline__ void issue_grads(float (&acc)[C::kDim / 2], const uint32_t (&a)[C::kInner / 16][4],
                                              const uint8_t* inner) const {
    const uint64_t b = sm90::descriptor_mn_major<C::kRowBytes>(sm90::smem_address(inner), C::kInnerBlockBytes);
#pragma unroll
    for (int k = 0; k < C::kInner / 16; ++k) {
      Grads::template rs<true>(acc, a[k], sm90::descriptor_advance(b, k * 16 * C::kRowBytes), true);
    }
  }

  // dq of 64 queries = dS (all rows of the tile) times K, this warpgroup's queries or channels.
  __device__ __forceinline__ void issue_dq(float (&acc)[C::kDqChannels / 2], const uint8_t* ds, const uint8_t* keys) const {
    const int query_block = C::kSplitChannels ? 0 : warpgroup;
    const uint64_t a = sm90::descriptor_mn_major<128>(sm90::smem_address(ds) + query_block * C::kOuter * 128, 0);
    const int channel = C::kSplitChannels ? warpgroup * C::kDqChannels : 0;
    const uint32_t offset = channel / C::kBlockChannels * C::kOuterBlockBytes + channel % C::kBlockChannels * 2;
    const uint64_t b = sm90::descriptor_mn_major<C::kRowBytes>(sm90::smem_address(keys) + offset, C::kOuterBlockBytes);
#pragma unroll
    for (int k = 0; k < C::kOuter / 16; ++k) {
      const uint64_t a_step = sm90::descriptor_advance(a, k * 16 * 128);
      const uint64_t b_step = sm90::descriptor_advance(b, k * 16 * C::kRowBytes);
      if (k == 0) {
        sm90::WgmmaFirst<T, C::kDqChannels>::template ss<true, true>(acc, a_step, b_step);
      } else {
        sm90::Wgmma<T, C::kDqChannels>::template ss<true, true>(acc, a_step, b_step, true);
      }
    }
    sm90::wgmma_commit();
  }

  template <bool kMasked>
  __device__ __forceinline__ void probabilities(float (&s)[kScores], const float2* stats, const float (&row_lse)[2],
                                                const RowMask<C>& mask) const {
    const float scale_log2 = params.scale_log2;
#pragma unroll
    for (int j = 0; j < C::kInner / 8; ++j) {
      float lse[2] = {row_lse[0], row_lse[1]};
      if constexpr (kKeysPass) {
        const float4 pair = *reinterpret_cast<const float4*>(stats + 8 * j);
        lse[0] = pair.x;
        lse[1] = pair.z;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float p = exp2f_approximate(fmaf(s[4 * j + i], scale_log2, -(kKeysPass ? lse[i % 2] : lse[i / 2])));
        if constexpr (kMasked) p = mask.word[i / 2] >> (2 * j + i % 2) & 1 ? p : 0.0f;
        s[4 * j + i] = p;
      }
    }
  }

  static __device__ __forceinline__ float exp2f_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  static __device__ __forceinline__ void pack_fragments(uint32_t (&out)[C::kInner / 16][4], const float (&in)[kScores]) {
#pragma unroll
    for (int k = 0; k < C::kInner / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[k][i] = sm90::pack_pair<T>(in[8 * k + 2 * i], in[8 * k + 2 * i + 1]);
    }
  }

  // dS to shared memory: [64-query block][key row][64 queries], 128-byte swizzle.
  __device__ __forceinline__ void store_ds(uint8_t* ds, const uint32_t (&fragments)[C::kInner / 16][4]) const {
    const int lane = threadIdx.x % 32;
    const int matrix_row = row - lane / 4 + (lane / 8 % 2) * 8 + lane % 8;
    const uint32_t base = sm90::smem_address(ds) + matrix_row * 128;
#pragma unroll
    for (int k = 0; k < C::kInner / 16; ++k) {
      const int chunk = (2 * k + lane / 16) % 8;
      const uint32_t address = base + k / 4 * (C::kOuter * 128) + ((chunk ^ matrix_row % 8) * 16);
      sm90::stmatrix_x4(address, fragments[k][0], fragments[k][1], fragments[k][2], fragments[k][3]);
    }
  }

  // Where the two dq rows of this thread go, in elements of dq.
  struct DqTarget {
    int64_t offset;
    bool valid;
  };

  __device__ __forceinline__ void dq_targets(DqTarget (&target)[2], const BoxRecord& record) const {
    const int channel = C::kSplitChannels ? warpgroup * C::kDqChannels : 0;
    const int query = (C::kSplitChannels ? 0 : 64 * warpgroup) + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 at = shared.inner_row[query + 8 * h];
      target[h].offset = record.dq_offset + channel + int64_t(at.y) * (params.heads * C::kDim);
      target[h].valid = params.dq != DqOutput::kNone && not_beyond(at.x, record.last);
    }
  }

  __device__ __forceinline__ void write_dq(const float (&acc)[C::kDqChannels / 2], const DqTarget (&target)[2]) const {
    const int quad_lane = threadIdx.x % 4;
    if (params.dq == DqOutput::kFinal) {
      T* out[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        out[h] = target[h].valid ? static_cast<T*>(params.grad_query) + target[h].offset + 8 * quad_lane : nullptr;
      }
      store_rows<T, C::kDqChannels>(out, acc, params.scale, params.nan_found);
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Lane q of a quad: columns 2 q .. of the left block (even q), 2 (q - 1) .. of the right one (odd).
      float* const row = params.grad_query_f32 + target[h].offset + quad_lane / 2 * 4 + quad_lane % 2 * 8;
#pragma unroll
      for (int j = 0; j < C::kDqChannels / 8; j += 2) {
        add_row(row + 8 * j, acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1], acc[4 * j + 4 + 2 * h], acc[4 * j + 5 + 2 * h],
                target[h].valid);
      }
    }
  }

  __device__ __forceinline__ void row_stats(const TileRecord<C>& tile, float (&lse)[2], float (&delta)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t token = tile.outer_row[row + 8 * h];
      const int64_t at = (int64_t(tile.batch) * params.heads + tile.head) * params.q_tokens + token;
      const float2 stats = token >= 0 ? params.stats[at] : make_float2(0.0f, 0.0f);
      lse[h] = stats.x;
      delta[h] = stats.y;
    }
  }

  // One arrival per warp.
  static __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) sm90::mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void store_tile(void* target, const TileRecord<C>& tile, const float (&acc)[C::kDim / 2],
                                             float factor) const {
    T* out[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t token = tile.outer_row[row + 8 * h];
      const int64_t at = (tile.batch * params.outer_tokens + token) * params.outer_heads.divisor + tile.head;
      out[h] = token >= 0 ? static_cast<T*>(target) + at * C::kDim + 8 * (threadIdx.x % 4) : nullptr;
    }
    store_rows<T, C::kDim>(out, acc, factor, params.nan_found);
  }

  __device__ __forceinline__ void run() {
    sm90::RingPosition<C::kStages> ring;
    sm90::RingPosition<C::kOuterStages> outer_ring;
    sm90::RingPosition<C::kTileStages> tile_ring;
    uint32_t ds_buffer = 0;
#pragma unroll 1
    for (;;) {
      const TileRecord<C>& tile = shared.tile[tile_ring.slot];
      sm90::mbarrier_wait(&shared.tile_full[tile_ring.slot], tile_ring.parity);
      const int32_t boxes = tile.boxes;
      if (boxes == kNoTile) break;
      float acc0[C::kDim / 2];                  // dk, or dq
      float acc1[kKeysPass ? C::kDim / 2 : 1];  // dv
#pragma unroll
      for (float& x : acc0) x = 0.0f;
#pragma unroll
      for (float& x : acc1) x = 0.0f;
      if (boxes > 0) {
        const uint8_t* const outer0 = shared.outer0[outer_ring.slot];
        const uint8_t* const outer1 = shared.outer1[outer_ring.slot];
        float row_lse[2] = {0.0f, 0.0f}, row_delta[2] = {0.0f, 0.0f};
        if constexpr (!kKeysPass) row_stats(tile, row_lse, row_delta);
        float s[kScores], dp[kScores];
        sm90::mbarrier_wait(&shared.outer_full[outer_ring.slot], outer_ring.parity);
        sm90::mbarrier_wait(&shared.full[ring.slot], ring.parity);
        sm90::wgmma_fence();
        issue_scores(s, outer0, shared.inner0[ring.slot]);
        issue_scores(dp, outer1, shared.inner1[ring.slot]);
        // The only way out is the break behind the last wait: a path that leaves with products in flight would make the
        // compiler serialize all of them.
#pragma unroll 1
        for (int32_t left = boxes;; --left) {
          const float2* stats = shared.stats[ring.slot] + 2 * (threadIdx.x % 4);
          const BoxRecord& record = shared.box[ring.slot];
          uint32_t p_fragments[kKeysPass ? C::kInner / 16 : 1][4], ds_fragments[C::kInner / 16][4];
          if (record.full) {
            sm90::wgmma_wait<1>();
            sm90::pin_registers(s);
            probabilities<false>(s, stats, row_lse, RowMask<C>());
          } else {
            const RowMask<C> mask(params, shared, tile, record, row);
            sm90::wgmma_wait<1>();
            sm90::pin_registers(s);
            probabilities<true>(s, stats, row_lse, mask);
          }
          // PERF: dV runs behind dP while dS is made, dK behind dQ while dq leaves (dV and dK together: 5 to 10 % at D
          // 128).
          if constexpr (kKeysPass) {
            pack_fragments(p_fragments, s);
            sm90::wgmma_fence();
            issue_grads(acc1, p_fragments, shared.inner1[ring.slot]);
            sm90::wgmma_commit();
            sm90::wgmma_wait<1>();
          } else {
            sm90::wgmma_wait<0>();
          }
          sm90::pin_registers(dp);
#pragma unroll
          for (int j = 0; j < C::kInner / 8; ++j) {
            float delta[2] = {row_delta[0], row_delta[1]};
            if constexpr (kKeysPass) {
              const float4 pair = *reinterpret_cast<const float4*>(stats + 8 * j);
              delta[0] = pair.y;
              delta[1] = pair.w;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (kKeysPass ? delta[i % 2] : delta[i / 2]));
            }
          }
          pack_fragments(ds_fragments, dp);

          float dq[kKeysPass ? C::kDqChannels / 2 : 1];
          if constexpr (kKeysPass) {
            // Two buffers in turn make one barrier per box enough: whoever passes it has read the buffer of the box before.
            uint8_t* ds = shared.ds[C::kDsBuffers > 1 ? ds_buffer : 0];
            ds_buffer ^= 1;
            store_ds(ds, ds_fragments);
            sm90::fence_proxy_async();
            sm90::named_barrier_sync(kDsBarrier, C::kConsumerThreads);
            sm90::wgmma_fence();
            issue_dq(dq, ds, outer0);
          } else {
            sm90::wgmma_fence();
          }
          issue_grads(acc0, ds_fragments, shared.inner0[ring.slot]);
          sm90::wgmma_commit();
          if constexpr (kKeysPass) {
            DqTarget dq_target[2];
            dq_targets(dq_target, record);
            sm90::wgmma_wait<1>();
            sm90::pin_registers(dq);
            write_dq(dq, dq_target);
          }
          sm90::wgmma_wait<0>();
          sm90::pin_registers(acc0);
          if constexpr (kKeysPass) sm90::pin_registers(acc1);
          release(&shared.empty[ring.slot]);
          ring.advance();
          if (left == 1) break;
          sm90::mbarrier_wait(&shared.full[ring.slot], ring.parity);
          sm90::wgmma_fence();
          issue_scores(s, outer0, shared.inner0[ring.slot]);
          issue_scores(dp, outer1, shared.inner1[ring.slot]);
        }
        release(&shared.outer_empty[outer_ring.slot]);
        outer_ring.advance();
      }
      store_tile(params.grad_outer0, tile, acc0, params.scale);
      if constexpr (kKeysPass) store_tile(params.grad_outer1, tile, acc1, 1.0f);
      release(&shared.tile_empty[tile_ring.slot]);
      tile_ring.advance();
    }
  }
};

// Rows of a tile that no TMA box covers are zero for good: products with them must stay finite.
template <class C, int kTiles, int kBytes>
__device__ __forceinline__ void zero_uncovered_rows(uint8_t (&tiles)[kTiles][kBytes], int32_t volume, int32_t rows) {
  const int32_t chunks = (rows - volume) * (C::kRowBytes / 16);
#pragma unroll 1
  for (int block = 0; block < kTiles * C::kChannelBlocks; ++block) {
    uint4* target = reinterpret_cast<uint4*>(tiles[0] + (block * rows + volume) * C::kRowBytes);
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks; i += C::kConsumerThreads) target[i] = make_uint4(0, 0, 0, 0);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas) backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ uint8_t shared_memory[];
  BackwardShared<C>& shared =
      *reinterpret_cast<BackwardShared<C>*>(shared_memory + ((1024 - (sm90::smem_address(shared_memory) & 1023)) & 1023));
  constexpr int kStartThreads = C::kConsumerThreads + 32;  // the consumers and the producer warp
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == C::kConsumers) {
    if constexpr (C::kReallocateRegisters) sm90::decrease_registers<C::kProducerRegisters>();
    if (threadIdx.x / 32 != C::kConsumerThreads / 32) return;
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < C::kStages; ++i) {
        // TMA, and in pass kKeys the cp.async of the 32 lanes.
        sm90::mbarrier_init(&shared.full[i], C::kPass == BackwardPass::kKeys ? 33 : 1);
        sm90::mbarrier_init(&shared.empty[i], C::kConsumerThreads / 32);
      }
      for (int i = 0; i < C::kOuterStages; ++i) {
        sm90::mbarrier_init(&shared.outer_full[i], 1);
        sm90::mbarrier_init(&shared.outer_empty[i], C::kConsumerThreads / 32);
      }
      for (int i = 0; i < C::kTileStages; ++i) {
        sm90::mbarrier_init(&shared.tile_full[i], 32);
        sm90::mbarrier_init(&shared.tile_empty[i], C::kConsumerThreads / 32);
      }
      sm90::fence_barrier_init();
    }
    __syncwarp();
    sm90::named_barrier_arrive(kStartBarrier, kStartThreads);
    Producer<C>(params, shared).run();
  } else {
    if constexpr (C::kReallocateRegisters) sm90::increase_registers<C::kConsumerRegisters>();
    fill_tables(params, shared);
    zero_uncovered_rows<C>(shared.outer0, params.outer_volume, C::kOuter);
    zero_uncovered_rows<C>(shared.outer1, params.outer_volume, C::kOuter);
    zero_uncovered_rows<C>(shared.inner0, params.inner_volume, C::kInner);
    zero_uncovered_rows<C>(shared.inner1, params.inner_volume, C::kInner);
    sm90::fence_proxy_async();
    sm90::named_barrier_sync(kStartBarrier, kStartThreads);
    const int row = warpgroup * 64 + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4;
    Consumer<C>{params, shared, warpgroup, row}.run();
  }
}

}  // namespace jax_na::hopper
