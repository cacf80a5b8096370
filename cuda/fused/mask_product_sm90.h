// The window mask as one more step of S = Q K^T: hidden scores are made by the tensor cores, consumers spend no
// instruction.
//
// A window is a product of intervals and the queries of a consumer are a box, so a pair is hidden if on some axis the
// query's coordinate in the box, as a code (mask_codes.h), does not see the key's. A (64 rows x 16 codes, bf16) holds 1/4
// where a row has that code; B (kN keys x 16 codes) holds -2^127 where the window of that code lacks the key, else 0. A B^T
// adds exactly 0 to the score of a pair that is seen, and any other comes out at -2^125 or below, three of which are still
// finite.
//
// The warp that describes the tiles turns the windows of a query tile into a table, one word for every key coordinate of
// every axis (hide_keys); one warp per consumer then writes a tile by three words a key (write_masks). None of them waits
// for the consumers but for a slot of tiles.
//
// A hidden key that is NaN or about as large as a hidden score reaches the row all the same: such rows come out as NaN and
// are computed again.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/sm90/barrier.h"
#include "geometry.h"
#include "mask_codes.h"
#include "plan_sm90.h"
#include "window_range_sm90.h"

namespace jax_na::hopper {

template <int kN, int kConsumers, int kSlots, int kQStages>
struct ProductMask {
  static constexpr int kChunks = kMaskCodes / 8;  // of eight codes: 16 bytes
  static constexpr int kLaneKeys = (kN + 31) / 32;

  alignas(128) uint4 row[kChunks * 64];                         // A: [chunk][row]
  alignas(128) uint4 tile[kConsumers * kSlots * kChunks * kN];  // B: [consumer][slot][chunk][key]
  alignas(128) uint4 nothing[kN];                               // a chunk of B of a tile that every row sees: zeros
  // Spread codes that a key coordinate of the query tile is hidden from, axis by axis.
  uint32_t hidden[kQStages][kConsumers][kMaskCoordinates];
  uint64_t full[kConsumers][kSlots], empty[kConsumers][kSlots];
  uint64_t hidden_full[kQStages];  // q_empty of the stage says when `hidden` may be written again

  // By one thread.
  __device__ __forceinline__ void init_barriers() {
    for (int w = 0; w < kConsumers; ++w) {
      for (int i = 0; i < kSlots; ++i) {
        sm90::mbarrier_init(&full[w][i], 1);
        sm90::mbarrier_init(&empty[w][i], 4);  // a lane of every warp
      }
    }
    for (int i = 0; i < kQStages; ++i) {
      sm90::mbarrier_init(&hidden_full[i], 1);
    }
    sm90::fence_barrier_init();
  }

  __device__ __forceinline__ uint4* tile_of(int w, int slot) { return tile + (w * kSlots + slot) * kChunks * kN; }

  // By all threads of the CTA; then fence_proxy_async() and synchronise. row_offset: coordinates in the box of row r of a
  // consumer, eight bits an axis; bit 24: no such row.
  __device__ __forceinline__ void build(const int32_t (&unit)[kMaxRank], const uint32_t* row_offset, int thread,
                                        int num_threads) {
    for (int i = thread; i < kChunks * 64; i += num_threads) {
      const uint32_t at = row_offset[i % 64];
      const uint32_t codes = at >> 24 == 0 ? codes_of_query(unit, at) : 0;
      uint32_t words[4];
      for (int j = 0; j < 4; ++j) {
        const int k = 8 * (i / 64) + 2 * j;
        words[j] = (codes >> code_of_slot(k) & 1) * kCodeWeight | (codes >> code_of_slot(k + 1) & 1) * kCodeWeight << 16;
      }
      row[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    for (int i = thread; i < kN; i += num_threads) nothing[i] = make_uint4(0, 0, 0, 0);
  }

  // The coordinates of a lane's keys in their tile, eight bits an axis; kNoKey: past the box.
  static constexpr uint32_t kNoKey = 1u << 31;
  __device__ static __forceinline__ void place_keys(const int32_t (&box)[kMaxRank], int lane,
                                                    uint32_t (&place)[kLaneKeys]) {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = 32 * i + lane, line = key / box[2];
      const int c[kMaxRank] = {line / box[1], line % box[1], key - line * box[2]};
      place[i] = c[0] < box[0] ? c[0] | c[1] << 8 | c[2] << 16 : kNoKey;
    }
  }

  // By a warp: B of a tile. at: what `hidden` holds of the tile's first key coordinate on every axis.
  __device__ __forceinline__ void write_tile(int w, int slot, const uint32_t* at0, const uint32_t* at1, const uint32_t* at2,
                                             const uint32_t (&place)[kLaneKeys], int lane) {
    uint32_t codes[kLaneKeys];
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const uint32_t past = uint32_t(int32_t(place[i]) >> 31);  // all bits of a key past the box
      codes[i] = at0[place[i] & 255] | at1[place[i] >> 8 & 255] | at2[place[i] >> 16 & 255] | past;
    }
    uint4* const out = tile_of(w, slot) + lane;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      if (32 * i + lane >= kN) break;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int j = 4 * chunk;
        out[chunk * kN + 32 * i] = make_uint4(mask_word(codes[i], j), mask_word(codes[i], j + 1),
                                              mask_word(codes[i], j + 2), mask_word(codes[i], j + 3));
      }
    }
  }
};

// Of kernels that have none.
template <int kN, int kConsumers, int kQStages>
struct ProductMask<kN, kConsumers, 0, kQStages> {};

// By a warp: which codes hide the key coordinates of a query tile from its consumers. last: there is none.
template <typename Config, typename Params, typename Storage>
__device__ __forceinline__ void hide_keys(const Params& params, Storage& smem, uint32_t slot, bool last) {
  auto& product = smem.mask_product;
  const int lane = threadIdx.x % 32;
  if (!last) {
    const auto& item = smem.record.item[0][slot];
    const auto& keys = smem.record.keys[0][slot][0];
    const int32_t entry1 = keys.count[0] * params.kv[0].extent[0];
    const int32_t entry2 = entry1 + keys.count[1] * params.kv[0].extent[1];
    const int32_t entries = entry2 + keys.count[2] * params.kv[0].extent[2];
#pragma unroll 1
    for (int32_t entry = lane; entry < entries; entry += 32) {
      const int a = entry < entry1 ? 0 : entry < entry2 ? 1 : 2;
      const int32_t key = keys.begin[a] + entry - (a == 0 ? 0 : a == 1 ? entry1 : entry2);
      const Interval queries = seen_by(params.axis[a], key, item.group[a].length);
      const int32_t first = item.group[a].q_base + item.first[a], extent = params.unit[a];
      const int32_t code = first_code(params.unit, a), shift = params.grid[a] == 1 ? 0 : extent;
#pragma unroll
      for (int w = 0; w < Config::kConsumers; ++w)
        product.hidden[slot][w][entry] = spread_codes(hidden_codes(queries, first + w * shift, extent, code));
    }
  }
  __syncwarp();
  if (lane == 0) sm90::mbarrier_arrive(&product.hidden_full[slot]);
}

// One warp per consumer: walks its key tiles as the producer does and writes the mask of every one that needs it.
template <typename Config, typename Params, typename Storage>
__device__ __forceinline__ void write_masks(const Params& params, Storage& smem, int member) {
  using namespace sm90;
  auto& product = smem.mask_product;
  const int lane = threadIdx.x % 32;
  const int axis = lane < kMaxRank ? lane : 0;  // of this lane
  const int32_t box0 = params.kv[0].extent[0], box1 = params.kv[0].extent[1], box2 = params.kv[0].extent[2];
  const int32_t extent = params.kv[0].extent[axis];
  const uint32_t possible = box0 * box1 * box2 == Config::kN ? kInside | kFull : kInside;
  uint32_t place[(Config::kN + 31) / 32];
  product.place_keys(params.kv[0].extent, lane, place);
  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kMaskSlots> at;
  for (;;) {
    mbarrier_wait(&product.hidden_full[q_at.slot], q_at.parity);
    if (smem.record.item[0][q_at.slot].num_tiles < 0) return;
    const auto& keys = smem.record.keys[0][q_at.slot][0];
    const int32_t tiles0 = keys.count[0], tiles1 = keys.count[1], tiles2 = keys.count[2];
    const int32_t begin = keys.begin[axis];
    const WindowRange range = smem.record.range[0][q_at.slot][axis][member];
    const uint32_t* const hidden0 = product.hidden[q_at.slot][member];
    const uint32_t* const hidden1 = hidden0 + tiles0 * box0;
    const uint32_t* const hidden2 = hidden1 + tiles1 * box1;
    for (int t0 = 0; t0 < tiles0; ++t0) {
      for (int t1 = 0; t1 < tiles1; ++t1) {
        for (int t2 = 0; t2 < tiles2; ++t2) {
          const int32_t key = begin + (axis == 0 ? t0 : axis == 1 ? t1 : t2) * extent;
          const uint32_t classes = __reduce_and_sync(~0u, range.classes(key, key + extent)) & possible;
          if (classes != kInside) continue;
          mbarrier_wait(&product.empty[member][at.slot], at.parity ^ 1);
          product.write_tile(member, at.slot, hidden0 + t0 * box0, hidden1 + t1 * box1, hidden2 + t2 * box2, place, lane);
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(&product.full[member][at.slot]);
          at.advance();
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&smem.record.q_empty[0][q_at.slot]);
    q_at.advance();
  }
}

}  // namespace jax_na::hopper
