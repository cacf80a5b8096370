// Forward neighborhood attention for small windows on Hopper: TMA for the tiles, mma.sync per warp.
//
// With a 7x7 window, 64 queries see a union four times their window, and wgmma multiplies and the softmax exponentiates all
// of it. Here the unit is a warp with 16 queries (a 2x7 or 4x4 box): it picks the keys of its own union out of the CTA's
// tile, row by row, because every lane of ldmatrix names the row it wants. The union is less than twice the window and the
// warps need no barrier among themselves. What is left is short of instructions and long in latency, so everything that
// does not depend on the elements is done once per coordinate of the tile, by the producer: windows, tokens, masks. At head
// dimension 32 two heads lie side by side in a row of 128 bytes: TMA takes as long for 64.
#pragma once

#include <cstddef>

#include "../arch/sm80/matrix.h"
#include "forward_sm90.h"

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
      const int row = (entry(key, 0) * params.kv_box[1] + entry(key, 1)) * params.kv_box[2] + entry(key, 2);
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

// ---- producer: one warp ----
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
  const uint32_t kv_bytes = params.kv_volume * row_bytes;

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
      num_tiles[a] = (__shfl_sync(~0u, keys.end, a) - tile_begin[a] + params.kv_box[a] - 1) / params.kv_box[a];
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
        const int32_t c1 = kv_first.c[1] + t[2] * params.kv_map_step[2];
        const int32_t c2 = kv_first.c[2] + t[1] * params.kv_map_step[1];
        const int32_t c3 = kv_first.c[3] + t[0] * params.kv_map_step[0];
        const uint32_t slot = kv_at.slot * small.kv_slot_bytes;
        mbarrier_arrive_expect_tx(&smem.k_full[kv_at.slot], kv_bytes);
        tma_load_5d(shared.k + slot, &params.k_map, &smem.k_full[kv_at.slot], kv_first.c[0], c1, c2, c3, kv_first.c[4]);
        mbarrier_arrive_expect_tx(&smem.v_full[kv_at.slot], kv_bytes);
        tma_load_5d(shared.v + slot, &params.v_map, &smem.v_full[kv_at.slot], kv_first.c[0], c1, c2, c3, kv_first.c[4]);
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
          const int32_t begin = a == 0   ? tile_begin[0] + t[0] * params.kv_box[0]
                                : a == 1 ? tile_begin[1] + t[1] * params.kv_box[1]
                                         : tile_begin[2] + t[2] * params.kv_box[2];
          const int32_t box = params.kv_box[a], keys = params.warp_keys[a];
          const int32_t stride = (a < 2 ? params.kv_box[2] : 1) * (a < 1 ? params.kv_box[1] : 1);
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

// ---- consumers ----
// c += a b, or c = a b if first.
template <typename T>
__device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool first) {
  float sum[4] = {first ? 0.0f : c[0], first ? 0.0f : c[1], first ? 0.0f : c[2], first ? 0.0f : c[3]};
  if constexpr (std::is_same_v<T, __half>) {
    sm80::mma_f16(sum, a, b0, b1);
  } else {
    sm80::mma_bf16(sum, a, b0, b1);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = sum[i];
}

// Byte offset of 16-byte chunk `chunk` of a row in a swizzled tile; chunk + 2s is at this offset ^ 32s.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk, uint32_t row_bytes) {
  const uint32_t offset = row * row_bytes + 16 * chunk;
  return offset ^ (offset >> 3 & (row_bytes == 128 ? 0x70 : 0x30));
}

// What a warp needs to know to attend to a key tile with one head.
struct SmallStep {
  uint32_t q;           // shared-memory address of this lane's row of queries, first 16 bytes
  uint32_t k;           // of the tile
  int32_t first_row;    // of the tile, where the warp's keys begin
  uint32_t mask[2];     // of the thread's rows
  uint32_t head_bytes;  // where the head lies in a row
  uint64_t* v_full;
  uint32_t parity;
};

// One warp, 16 kSteps of its keys from column `from` on: scores, softmax, output. kFirst: no keys came before.
template <typename Config, int kSteps, bool kFirst>
__device__ __forceinline__ void attend(const ForwardParams& params, const uint16_t* tile_row, const SmallStep& step,
                                       int from, float scale_log2, SoftmaxState& state, float (&o)[Config::kDim / 2]) {
  using T = typename Config::T;
  constexpr int kDim = Config::kDim, kN = 16 * kSteps;
  const int lane = threadIdx.x % 32;
  const uint32_t row_bytes = kDim == 64 ? 128 : 64 * params.item_heads;
  const uint32_t v_offset = params.small.stages * params.small.kv_slot_bytes;  // from keys to values
  // Matrices of a load, 8 rows x 16 bytes: keys (rows 0, bytes 0), (rows 0, bytes 16), (rows 8, ...), (rows 8, ...); values
  // (rows 0, bytes 0), (rows 8, bytes 0), ... So the two registers of an operand follow one another, which saves moves.
  uint32_t address[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = from + 16 * i + lane % 8 + lane / 16 * 8;
    address[i] = swizzled(step.first_row + tile_row[column], lane / 8 % 2, row_bytes) ^ step.head_bytes;
  }
  float s[kN / 2];
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t q[4];
    sm80::load_matrix_x4(q, step.q ^ (32 * d));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t b[4];
      sm80::load_matrix_x4(b, step.k + (address[i] ^ (32 * d)));
      mma<T>(s + 8 * i, q, b[0], b[1], d == 0);
      mma<T>(s + 8 * i + 4, q, b[2], b[3], d == 0);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) address[i] = __shfl_sync(~0u, address[i], lane % 8 + lane / 8 % 2 * 16 + lane / 16 * 8);
  const uint32_t mask[2][1] = {{step.mask[0] >> (from / 4)}, {step.mask[1] >> (from / 4)}};
  apply_mask<kN>(s, mask);
  float factor[2];
  if constexpr (kFirst) state = SoftmaxState();
  update_softmax<kN>(state, s, scale_log2, factor);
  if constexpr (!kFirst) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] *= factor[i / 2 % 2];
  }
  uint32_t p[kSteps][4];
  pack_probabilities<T, kN>(p, s);
  sm90::mbarrier_wait(step.v_full, step.parity);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b[4];
      sm80::load_matrix_x4_transposed(b, step.k + v_offset + (address[i] ^ (32 * d)));
      mma<T>(o + 8 * d, p[i], b[0], b[1], kFirst && i == 0);
      mma<T>(o + 8 * d + 4, p[i], b[2], b[3], kFirst && i == 0);
    }
  }
}

template <int kValue>
using Number = std::integral_constant<int, kValue>;

// One warp: its box of every item in turn.
template <typename Config>
__device__ __forceinline__ void consume_small(const ForwardParams& params, const SmallForwardShared& shared, int warp) {
  using namespace sm90;
  constexpr int kDim = Config::kDim;
  SmallForwardRecords& smem = *shared.records;
  const SmallForwardParams& small = params.small;
  const int lane = threadIdx.x % 32;
  const float scale_log2 = params.scale * 1.4426950408889634f;
  const uint32_t row_bytes = kDim == 64 ? 128 : 64 * params.item_heads;

  // Which box of the tile is this warp's, and which heads: from one on, in steps. Where the queries are that this lane
  // reads.
  const int item_heads = kDim == 64 ? 1 : params.item_heads;
  const int first_head = kDim == 64 ? 0 : warp / small.boxes, head_step = kDim == 64 ? 1 : small.warps / small.boxes;
  const int box = warp - first_head * small.boxes;
  const int own_row = 16 * box + lane / 4;  // and the eighth after it
  uint32_t q_offset;
  {
    const uint32_t entries = smem.row_entries[16 * box + lane % 16];
    const int32_t extent[kMaxRank] = {params.unit[0] * params.grid[0], params.unit[1] * params.grid[1],
                                      params.unit[2] * params.grid[2]};
    const int32_t row = (entry(entries, 0) * extent[1] + entry(entries, 1) - extent[0]) * extent[2] + entry(entries, 2) -
                        extent[0] - extent[1];
    q_offset = swizzled(row, lane / 16, row_bytes);
  }
  const int32_t keys = params.warp_keys[0] * params.warp_keys[1] * params.warp_keys[2];

  SmallRing q_at, kv_at;
  bool nan_seen = false;
  for (;;) {
    mbarrier_wait(&smem.q_full[q_at.slot], q_at.parity);
    const int num_tiles = smem.item[q_at.slot].num_tiles;
    if (num_tiles < 0) break;
    const int32_t item_head = smem.item[q_at.slot].head, first_token = smem.item[q_at.slot].first_token;
    const int32_t* const token = &shared.token[q_at.slot * shared.rows + own_row];
    const int32_t tokens[2] = {token[0] < 0 ? -1 : first_token + token[0], token[8] < 0 ? -1 : first_token + token[8]};
    for (int head = first_head; head < item_heads; head += head_step) {  // several only if there is one key tile
      const bool last_head = head + head_step >= item_heads;
      SmallStep step;
      step.head_bytes = head * kDim * 2;
      step.q = (shared.q + q_at.slot * small.q_slot_bytes + q_offset) ^ step.head_bytes;
      SoftmaxState state;
      float o[kDim / 2];
      bool first_tile = true;
      for (int t = 0; t < num_tiles; ++t) {
        mbarrier_wait(&smem.k_full[kv_at.slot], kv_at.parity);
        step.first_row = smem.first_key[kv_at.slot][box];
        step.v_full = &smem.v_full[kv_at.slot];
        step.parity = kv_at.parity;
        if (step.first_row >= 0) {
          step.k = shared.k + kv_at.slot * small.kv_slot_bytes;
          const uint4* const row_mask = &shared.mask[kv_at.slot * shared.rows + own_row];
          step.mask[0] = reinterpret_cast<const uint32_t*>(row_mask)[lane % 4];
          step.mask[1] = reinterpret_cast<const uint32_t*>(row_mask + 8)[lane % 4];
          const auto attend_keys = [&](auto steps, auto first, int from) {
            attend<Config, steps, first>(params, smem.keys.tile_row, step, from, scale_log2, state, o);
          };
          const auto attend_tile = [&](auto first) {
            if (keys <= 64) {
              attend_keys(Number<4>(), first, 0);
            } else if (keys <= 80) {
              attend_keys(Number<5>(), first, 0);
            } else if constexpr (kDim == 32) {
              attend_keys(Number<kWarpColumns / 16>(), first, 0);
            } else {  // in two parts, for want of registers
              attend_keys(Number<4>(), first, 0);
              attend_keys(Number<kWarpColumns / 16 - 4>(), Number<0>(), 64);
            }
          };
          if (first_tile) {
            attend_tile(Number<1>());
            first_tile = false;
          } else {
            attend_tile(Number<0>());
          }
        } else {
          mbarrier_wait(step.v_full, step.parity);
        }
        if (last_head) {
          __syncwarp();
          if (lane == 0) mbarrier_arrive(&smem.kv_empty[kv_at.slot]);
          kv_at.advance(small.stages);
        }
      }
      if (last_head) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&smem.q_empty[q_at.slot]);
        q_at.advance(small.q_stages);
      }
      if (!first_tile) {
        float inverse[2];
        finish_softmax(params, state, tokens, item_head + head, lane, inverse);
        uint32_t nan[2];
        store_output<Config>(params, o, inverse, tokens, item_head + head, lane, nan);
        nan_seen |= (nan[0] | nan[1]) != 0;
      }
    }
  }
  if (nan_seen) {
    const int32_t extent[2] = {params.unit[0] * params.grid[0], params.unit[1] * params.grid[1]};
    recompute_nan_rows<typename Config::T, kDim>(params, &smem.row_entries[16 * box],
                                                 extent[0] << 8 | (extent[0] + extent[1]) << 16, blockIdx.x, gridDim.x);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads) forward_small_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  extern __shared__ unsigned char dynamic_smem[];
  const SmallForwardShared shared(params, dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warps = params.small.warps;

  // The first loads run while the consumers make the tables.
  if (warp == warps) {
    if (threadIdx.x % 32 == 0) shared.records->init_barriers(warps);
    __syncwarp();
    produce_small<Config>(params, shared);
    return;
  }
  shared.records->build_coordinates(params, threadIdx.x, 32 * warps);
  shared.records->keys.build(params, threadIdx.x, 32 * warps);
  named_barrier_sync(kTablesBarrier, blockDim.x);
  consume_small<Config>(params, shared, warp);
}

// Null on success, else what failed.
template <typename Config>
const char* launch_small(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  if (const char* failure = allow_shared_memory<forward_small_sm90<Config>, kMostSharedBytes>()) return failure;
  int places = 1;
  for (int a = 0; a < kMaxRank; ++a) places *= params.tiles[a].divisor * params.groups[a].divisor;
  const int ctas = scheduled_ctas(
      params.num_items < num_sms * params.small.ctas ? params.num_items : num_sms * params.small.ctas, places);
  forward_small_sm90<Config><<<ctas, 32 * (params.small.warps + 1), params.small.shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
