// A consumer of the forward kernels for small windows, a warp of 16 queries: S = Q K^T and O = P V by mma.sync over its own
// keys of a tile.
#pragma once

#include "../arch/sm80/matrix.h"
#include "forward_epilogue_sm90.cuh"
#include "forward_small_shared_sm90.h"

namespace jax_na::hopper {

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
    recompute_nan_rows<typename Config::T, kDim>(params, 0, &smem.row_entries[16 * box],
                                                 extent[0] << 8 | (extent[0] + extent[1]) << 16, blockIdx.x, gridDim.x);
  }
}

}  // namespace jax_na::hopper
