// The window mask of one key tile in the wgmma accumulator layout, one bit per element of a thread.
//
// A thread of an accumulator with kN columns holds, of each of its two rows, the kN / 4 elements at columns 8j + 2q + e (q
// = thread % 4, e = 0, 1): bit 2j + e of the row's mask says whether the row sees that key. A window is a product of
// intervals, so the mask of a row is the AND over the axes of "the column's coordinate lies in [lo, hi)", and that is
// prefix(hi) & ~prefix(lo) with one table per axis: prefix(x) has the bits of the columns whose coordinate is below x. The
// tables depend on the key box alone; a CTA builds them once. An edge tile then costs six table reads a row and one
// predicated select per element; no division, no comparison.
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
        const bool exists = bit < kBits && c[0] < box[0];  // columns past the box are set on no axis
        int base = 0;
        for (int a = 0; a < kMaxRank; ++a) {
          for (int x = thread / 32; x <= box[a]; x += num_threads / 32) {
            const uint32_t value = __ballot_sync(~0u, exists && c[a] < x);
            if (lane == 0) bits[base + x][q][word] = value;
          }
          base += box[a] + 1;
        }
      }
    }
  }

  // Word w of a row that sees every column.
  __device__ static constexpr uint32_t all(int w) { return 32 * (w + 1) <= kBits ? ~0u : (1u << kBits % 32) - 1; }

  // ANDs the columns inside `keys` on axis a into the mask; tile: first coordinate of the key tile on that axis.
  __device__ __forceinline__ void restrict_axis(uint32_t (&mask)[kWords], int a, Interval keys, int32_t tile,
                                                const int32_t (&box)[kMaxRank], int q) const {
    const int base = a == 0 ? 0 : a == 1 ? box[0] + 1 : box[0] + box[1] + 2;
    const int lo = base + min(max(keys.begin - tile, 0), box[a]);
    const int hi = base + min(max(keys.end - tile, 0), box[a]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) mask[w] &= bits[hi][q][w] & ~bits[lo][q][w];
  }
};

}  // namespace jax_na
