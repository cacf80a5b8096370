// How gradients leave the accumulators of the Hopper backward mainloop: dk and dv in the type of the inputs, dq as float32
// additions in memory.
#pragma once

#include <cstdint>

#include "../arch/sm90/copy_async.h"
#include "../arch/sm90/wgmma.h"
#include "recompute_sm90.cuh"

namespace jax_na::hopper {

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

// An accumulator row's pairs of an 8-column block and its right neighbour, exchanged between two lanes so that each has
// four neighbours: even lanes the left block's, odd lanes the right one's.
__device__ __forceinline__ float4 four_neighbours(float left0, float left1, float right0, float right1) {
  const bool odd = threadIdx.x & 1;
  const float got0 = __shfl_xor_sync(~0u, odd ? left0 : right0, 1);
  const float got1 = __shfl_xor_sync(~0u, odd ? left1 : right1, 1);
  return make_float4(odd ? got0 : left0, odd ? got1 : left1, odd ? right0 : got0, odd ? right1 : got1);
}

}  // namespace jax_na::hopper
