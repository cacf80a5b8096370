// The window mask of one key tile in the wgmma accumulator layout, one bit per element of a thread.
//
// A thread of an accumulator with kN columns holds, of each of its two rows, the kN / 4 elements at columns 8j + 2q + e (q = thread % 4,
// e = 0, 1): bit 2j + e of the row's mask says whether the row sees that key. A window is a product of intervals, so the mask of a row
// is the AND over the axes of "the column's coordinate lies in [lo, hi)", and that is prefix(hi) & ~prefix(lo) with one table per
// axis: prefix(x) has the bits of the columns whose coordinate is below x. The tables depend on the key box alone; a CTA builds them
// once. An edge tile then costs six table reads a row and one predicated select per element; no division, no comparison.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace jax_na {

template <int kN>
struct ColumnMask {
  static constexpr int kBits = kN / 4;
  static constexpr int kWords = (kBits + 31) / 32;
  static constexpr int kMaxEntries = kN + 2 * kMaxRank;  // sum over the axes of extent + 1, when the product is at most kN

  uint32_t bits[kMaxEntries][4][kWords];  // [table of axis 0, 1, 2][q][word]

  // By all warps of the CTA; synchronise afterwards. box: extents of the key box.
  __device__ __forceinline__ void build(const int32_t (&box)[kMaxRank], int thread, int num_threads) {
    const int lane = thread % 32;  // the bit it answers for
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const int bit = 32 * word + lane;
        const int column = bit / 2 * 8 + q * 2 + bit % 2;
        const int line = column / box[2];
        const int c[kMaxRank] = {line / box[1], line % box[1], column - line * box[2]};
        int base = 0;
        for (int a = 0; a < kMaxRank; ++a) {
          // Columns past the box have c[0] >= box[0] and are never set on axis 0.
          for (int x = thread / 32; x <= box[a]; x += num_threads / 32) {
            const uint32_t value = __ballot_sync(~0u, bit < kBits && c[a] < x);
            if (lane == 0) bits[base + x][q][word] = value;
          }
          base += box[a] + 1;
        }
      }
    }
  }

  // keys: the row's windows; tile: first coordinates of the key tile.
  __device__ __forceinline__ void row(uint32_t (&mask)[kWords], const Interval (&keys)[kMaxRank], const int32_t (&tile)[kMaxRank],
                                      const int32_t (&box)[kMaxRank], int q) const {
    int base = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) mask[w] = ~0u;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int lo = min(max(keys[a].begin - tile[a], 0), box[a]);
      const int hi = min(max(keys[a].end - tile[a], 0), box[a]);
#pragma unroll
      for (int w = 0; w < kWords; ++w) mask[w] &= bits[base + hi][q][w] & ~bits[base + lo][q][w];
      base += box[a] + 1;
    }
  }
};

}  // namespace jax_na
