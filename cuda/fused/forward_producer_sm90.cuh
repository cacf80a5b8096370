// The producer of a Hopper forward kernel: loads the tiles of a ring.
#pragma once

#include "../arch/sm90/tma.h"
#include "forward_describer_sm90.cuh"

namespace jax_na::hopper {

// The queries of the query tile in `slot`. By one lane.
template <typename Config, typename Storage>
__device__ __forceinline__ void load_queries(const ForwardParams& params, Storage& smem, int ring, uint32_t slot) {
  using namespace sm90;
  const ItemInfo& item = smem.record.item[ring][slot];
  uint64_t* const full = &smem.record.q_full[ring][slot];
  const uint32_t num_queries = params.unit[0] * params.unit[1] * params.unit[2] * Config::kRingConsumers;
  mbarrier_arrive_expect_tx(full, num_queries * Config::kDim * 2);
#pragma unroll
  for (int w = 0; w < Config::kRingConsumers; ++w) {
    int32_t x[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t ordinal = item.first[a] + (params.grid[a] == 1 ? 0 : w * params.unit[a]);
      x[a] = item.group[a].q_first + ordinal * params.axis[a].dilation;
    }
    const MapCoords m = map_coords(params.q_layout, item.head * Config::kDim, x, item.batch);
    const uint32_t q_smem = smem_address(smem.q[Config::kSharing == Sharing::kPrivate ? ring : w][slot]);
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      tma_load_5d(q_smem + b * Config::kM * Config::kRowBytes, &params.q_map, full, m.c[0] + b * Config::kRowElements,
                  m.c[1], m.c[2], m.c[3], m.c[4]);
    }
  }
}

// A key tile into the ring's next stage. By one lane.
template <typename Config, typename Storage>
__device__ __forceinline__ void load_key_tile(const ForwardParams& params, Storage& smem, int ring, const TileLoad& load,
                                              int32_t batch, sm90::RingPosition<Config::kStages>& at) {
  using namespace sm90;
  auto& record = smem.record;
  const TileInfo info = load.info;
  const int32_t c[4] = {load.element, load.at[0], load.at[1], load.at[2]};
  const int shape = Config::kShapes == 1 ? 0 : info.classes >> kShapeBit & 1;
  const uint32_t bytes = params.kv[shape].volume * Config::kDim * 2;
  mbarrier_wait(&record.k_empty[ring][at.slot], at.parity ^ 1);
  record.tile[ring][at.slot] = info;
  mbarrier_arrive_expect_tx(&record.k_full[ring][at.slot], bytes);
  const uint32_t k_smem = smem_address(smem.k[ring][at.slot]);
#pragma unroll
  for (int b = 0; b < Config::kBlocks; ++b) {
    tma_load_5d(k_smem + b * Config::kN * Config::kRowBytes, &params.k_map[shape], &record.k_full[ring][at.slot],
                c[0] + b * Config::kRowElements, c[1], c[2], c[3], batch);
  }
  mbarrier_wait(&record.v_empty[ring][at.slot], at.parity ^ 1);
  mbarrier_arrive_expect_tx(&record.v_full[ring][at.slot], bytes);
  const uint32_t v_smem = smem_address(smem.v[ring][at.slot]);
#pragma unroll
  for (int b = 0; b < Config::kBlocks; ++b) {
    tma_load_5d(v_smem + b * 16 * Config::kSteps * Config::kRowBytes, &params.v_map[shape], &record.v_full[ring][at.slot],
                c[0] + b * Config::kRowElements, c[1], c[2], c[3], batch);
  }
  at.advance();
}

// By one lane, beside a warp that describes the tiles. As soon as the first key tiles of a query tile fill the ring, the
// queries of the next one are asked for: they then lie in shared memory when the consumers come to it.
template <typename Config, typename Storage>
__device__ __forceinline__ void load_tiles(const ForwardParams& params, Storage& smem, int ring) {
  using namespace sm90;
  auto& record = smem.record;
  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kBatches> batch_at;
  RingPosition<Config::kStages> kv_at;
  int32_t next = 0, next_batch = 0;  // of the query tile asked for last: its key tiles; its entry of the batch
  const auto ask_for_queries = [&]() {
    mbarrier_wait(&record.item_full[ring][q_at.slot], q_at.parity);
    next = record.item[ring][q_at.slot].num_tiles;
    next_batch = record.item[ring][q_at.slot].batch;
    if (next < 0) {
      mbarrier_arrive(&record.q_full[ring][q_at.slot]);
    } else {
      load_queries<Config>(params, smem, ring, q_at.slot);
    }
    q_at.advance();
  };
  ask_for_queries();
  while (next > 0) {
    const int32_t num_tiles = next, batch = next_batch;
    bool asked = false;
    for (int32_t n = 0; n < num_tiles; ++n) {
      const int32_t entry = n % Config::kTileBatch;
      if (entry == 0) mbarrier_wait(&record.batch_full[ring][batch_at.slot], batch_at.parity);
      load_key_tile<Config>(params, smem, ring, record.load[ring][batch_at.slot][entry], batch, kv_at);
      if (entry == Config::kTileBatch - 1 || n == num_tiles - 1) {
        mbarrier_arrive(&record.batch_empty[ring][batch_at.slot]);
        batch_at.advance();
      }
      if (!asked && n + 1 >= Config::kStages && mbarrier_test_wait(&record.item_full[ring][q_at.slot], q_at.parity)) {
        ask_for_queries();
        asked = true;
      }
    }
    if (!asked) ask_for_queries();
  }
}

// By a warp that does both, in turns: the kernel with a ring for every consumer has no warps for more.
template <typename Config, typename Storage>
__device__ __forceinline__ void produce_alone(const ForwardParams& params, Storage& smem, int ring) {
  using namespace sm90;
  auto& record = smem.record;
  const bool first_lane = threadIdx.x % 32 == 0;
  Describer<Config, Storage> describer(params, smem, ring);
  RingPosition<Config::kStages> kv_at;
  const auto ask_for_queries = [&]() {
    const int32_t num_tiles = describer.next_item();
    if (first_lane) {
      if (num_tiles < 0) {
        mbarrier_arrive(&record.q_full[ring][describer.slot()]);
      } else {
        load_queries<Config>(params, smem, ring, describer.slot());
      }
    }
    return num_tiles;
  };
  int32_t next = ask_for_queries();
  while (next > 0) {
    const int32_t num_tiles = next;
    const uint32_t slot = describer.slot();
    const int32_t batch = record.item[ring][slot].batch;
    next = 0;  // not known yet
    for (int32_t n = 0, end; n < num_tiles; n = end) {
      if (n % Config::kTileBatch == 0) describer.describe_tiles(slot, n, 0);
      end = min(num_tiles, n - n % Config::kTileBatch + Config::kTileBatch);
      if (n < Config::kStages) end = min(end, Config::kStages);
      for (int32_t i = n; first_lane && i < end; ++i)
        load_key_tile<Config>(params, smem, ring, record.load[ring][0][i % Config::kTileBatch], batch, kv_at);
      __syncwarp();
      if (n < Config::kStages && Config::kQStages > 1) next = ask_for_queries();
    }
    if (next == 0) next = ask_for_queries();
  }
}

}  // namespace jax_na::hopper
