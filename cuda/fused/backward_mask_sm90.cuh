// The window mask of the Hopper backward: which columns of a box see a row of the tile. Bit 2 j + e of word q: column
// 8 j + 2 q + e, as the accumulators of the lanes with lane % 4 == q hold them.
#pragma once

#include "backward_shared_sm90.h"

namespace jax_na::hopper {

__device__ __forceinline__ void keep_between(uint32_t& mask, uint32_t below_low, uint32_t below_high) {
  mask &= below_high & ~below_low;
}
__device__ __forceinline__ void keep_between(uint4& mask, const uint4& below_low, const uint4& below_high) {
  keep_between(mask.x, below_low.x, below_high.x);
  keep_between(mask.y, below_low.y, below_high.y);
  keep_between(mask.z, below_low.z, below_high.z);
  keep_between(mask.w, below_low.w, below_high.w);
}

// Word q of rows `row`, `row` + 8 and so on, or all four words of each.
template <class Words, int kRows, class C>
__device__ __forceinline__ void mask_rows(Words (&mask)[kRows], const BackwardParams& params,
                                          const BackwardShared<C>& shared, const TileRecord<C>& tile,
                                          const BoxRecord& record, int row, int q) {
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < kMaxRank - params.rank) continue;
    const int32_t size = tile.box[a];
    const uint32_t (*table)[4] = shared.prefix + tile.prefix_row[a];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int2 interval = tile.interval[a][row + 8 * i];
      const int32_t low = min(max(interval.x - record.origin[a], 0), size);
      const int32_t high = min(max(interval.y - record.origin[a], 0), size);
      keep_between(mask[i], reinterpret_cast<const Words&>(table[low][q]), reinterpret_cast<const Words&>(table[high][q]));
    }
  }
}

// The words of a thread's two rows, eight apart.
struct RowMask {
  uint32_t word[2] = {~0u, ~0u};
};

}  // namespace jax_na::hopper
