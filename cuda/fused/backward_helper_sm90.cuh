// The warps beside the producer of the Hopper backward mainloop, where its warpgroup has more: they describe the rows of a
// tile, load what belongs to single queries, and write the masks of the boxes that need some. All that would otherwise be
// in the way of the next box: the producer's, which is late as it is, and the consumers', who wait for tables in every box.
#pragma once

#include "backward_mask_sm90.cuh"
#include "backward_tile_sm90.cuh"

namespace jax_na::hopper {

template <class C>
struct Helper {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int thread;

  __device__ __forceinline__ void describe_rows(TileRecord<C>& tile) const {
    const TileIndex index(params, tile.number);
    GroupTokens keys[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) keys[a] = group_tokens<false>(params, index, a);
    fill_rows(params, tile, index, keys, thread, C::kHelperThreads);
    sm90::named_barrier_sync(kHelperBarrier, C::kHelperThreads);
  }

  __device__ __forceinline__ void serve_box(const TileRecord<C>& tile, uint32_t slot) const {
    const BoxRecord& record = shared.box[slot];
    load_stats(params, shared, slot, record.stats_row, record.last, tile.shape, thread, C::kHelperThreads);
    sm90::copy_async_arrive(&shared.full[slot]);
    if (!record.full) {
#pragma unroll 1
      for (int row = thread; row < C::kKeys; row += C::kHelperThreads) {
        uint4 words[1] = {make_uint4(~0u, ~0u, ~0u, ~0u)};
        mask_rows(words, params, shared, tile, record, row, 0);
        *reinterpret_cast<uint4*>(shared.mask[slot][row]) = words[0];
      }
    }
    __syncwarp();
    if (thread % 32 == 0) sm90::mbarrier_arrive(&shared.full[slot]);
  }

  __device__ __forceinline__ void run() const {
    sm90::RingPosition<C::kStages> ring;
    sm90::RingPosition<C::kTileStages> tile_ring;
    sm90::named_barrier_sync(kStartBarrier, C::kStartThreads);
    sm90::named_barrier_sync(kTableBarrier, C::kTableThreads);
#pragma unroll 1
    for (;;) {
      sm90::mbarrier_wait(&shared.tile_full[tile_ring.slot], tile_ring.parity);
      TileRecord<C>& tile = shared.tile[tile_ring.slot];
      const int32_t boxes = tile.boxes;
      if (boxes == kNoTile) break;
      describe_rows(tile);
#pragma unroll 1
      for (int32_t it = 0; it < boxes; ++it) {
        sm90::mbarrier_wait(&shared.described[ring.slot], ring.parity);
        serve_box(tile, ring.slot);
        ring.advance();
      }
      __syncwarp();
      if (thread % 32 == 0) sm90::mbarrier_arrive(&shared.tile_empty[tile_ring.slot]);
      tile_ring.advance();
    }
    sm90::copy_async_wait_all();
  }
};

}  // namespace jax_na::hopper
