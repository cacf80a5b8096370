// Online softmax of the Hopper forward kernels: masks, maxima, exponentials of a thread's two rows.
#pragma once

#include "../arch/sm90/wgmma.h"
#include "forward_params_sm90.h"
#include "mask_product_sm90.h"
#include "mask_sm90.h"

namespace jax_na::hopper {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Running maximum and sum of a thread's two rows, of scores not yet scaled.
struct SoftmaxState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // of this thread's columns
};

template <int kN>
__device__ __forceinline__ void apply_mask(float (&s)[kN / 2], const uint32_t (&mask)[2][ColumnMask<kN>::kWords]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // bits in order, so that seven become predicates at once
#pragma unroll
    for (int bit = 0; bit < kN / 4; ++bit) {
      if (((mask[half][bit / 32] >> (bit % 32)) & 1) == 0) s[bit / 2 * 4 + 2 * half + bit % 2] = -INFINITY;
    }
  }
}

// Weights are relative to a maximum of the row that follows the scores by at most this much, as an exponent of 2: outputs
// and sums are rescaled seldom then, and no weight exceeds 2^8.
constexpr float kMaxGrowth = 8;

// The first half of a softmax step: the rows' new reference. True if some row of the warp changed it, and what was summed
// up so far is to be multiplied with factor.
// kMaskProduct: hidden scores are below kHiddenScore, else infinite.
template <int kN, bool kMaskProduct = false>
__device__ __forceinline__ bool update_max(SoftmaxState& state, const float (&s)[kN / 2], float scale_log2,
                                           float (&factor)[2]) {
  float part[2][2];  // of each row two maxima, for the sake of latency
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i / 2][i % 2] = s[i];
#pragma unroll
  for (int i = 4; i < kN / 2; ++i) part[i / 2 % 2][i % 2] = fmaxf(part[i / 2 % 2][i % 2], s[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = state.row_max[half];
    const float now = quad_max(fmaxf(part[half][0], part[half][1]));
    const bool grown = (now - before) * scale_log2 > kMaxGrowth && (!kMaskProduct || now > kHiddenScore);
    factor[half] = grown ? exp2_approx((before - now) * scale_log2) : 1.0f;
    state.row_max[half] = grown ? now : before;
    state.row_sum[half] *= factor[half];
  }
  return __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f);
}

// The second half, for column groups [kBegin, kEnd) of eight: scores to weights.
template <int kN, int kBegin, int kEnd>
__device__ __forceinline__ void exponentiate(SoftmaxState& state, float (&s)[kN / 2], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float row_max = state.row_max[half];
    const float offset = row_max == -INFINITY ? 0.0f : row_max * scale_log2;  // a row that sees no key yet
#pragma unroll
    for (int i = 2 * kBegin; i < 2 * kEnd; ++i) {
      float& x = s[i / 2 * 4 + 2 * half + i % 2];
      x = exp2_approx(fmaf(x, scale_log2, -offset));
      state.row_sum[half] += x;
    }
  }
}

// Both halves: scores to weights.
template <int kN>
__device__ __forceinline__ void update_softmax(SoftmaxState& state, float (&s)[kN / 2], float scale_log2,
                                               float (&factor)[2]) {
  update_max<kN>(state, s, scale_log2, factor);
  exponentiate<kN, 0, kN / 8>(state, s, scale_log2);
}

template <typename T, int kN>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[(kN + 15) / 16][4], const float (&s)[kN / 2]) {
#pragma unroll
  for (int i = 0; i < (kN + 15) / 16 * 4; ++i)
    p[i / 4][i % 4] = i < kN / 4 ? sm90::pack_pair<T>(s[2 * i], s[2 * i + 1]) : 0;
}

// What the rows of a warp do not see of a key tile: kNothing, kSome, or, if only the columns past its keys, their number.
enum Hidden : int { kSome = -1, kNothing = 0 };

// Hides the columns past the `volume` keys of a box, at least kShortestFullBox.
template <int kN>
__device__ __forceinline__ void apply_tail(float (&s)[kN / 2], int volume) {
#pragma unroll
  for (int bit = kN / 4 - 4; bit < kN / 4; ++bit) {
    if (bit / 2 * 8 + int(threadIdx.x) % 4 * 2 + bit % 2 < volume) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) s[bit / 2 * 4 + 2 * half + bit % 2] = -INFINITY;
  }
}

}  // namespace jax_na::hopper
