// Sums of dq whose order cannot matter: fixed-point numbers, added as integers.
//
// A summand of row i of dq is a sum of dS_ij K_j over keys j of one tile. The probabilities of a query add up to at most
// one, so that over all its keys |dS_ij| = P_ij |dO_i . V_j - delta_i| does to at most |dO_i| max |V| + |delta_i|, and
// whatever part of the sum is taken, its elements are at most that times max |K|. In units of 2^-30 of the next power of
// two no sum leaves 32 bits, and rounding to such units loses less than that of the definition in 16 bits, by which dS is
// rounded. Two neighbours of a row are one 64-bit integer, so that one addition serves both.
#pragma once

#include <cstdint>

namespace jax_na::hopper {

// Of the keys and values of one head.
struct Extrema {
  float key;        // largest magnitude of an element of K
  float value_row;  // largest Euclidean norm of a row of V
};

// The exponent e of a row: its units are 2^(e - 30).
__device__ __forceinline__ int32_t fixed_point_exponent(float grad_norm, float delta, const Extrema& extrema) {
  const float bound = 1.1f * extrema.key * (grad_norm * extrema.value_row + fabsf(delta));
  // 2^-90 to 2^120: what is smaller rounds to zero, what is larger is not finite when it is added up.
  return min(max(int32_t(__float_as_uint(bound) >> 23 & 255) - 126, -90), 120);
}

__device__ __forceinline__ float power_of_two(int32_t exponent) { return __uint_as_float(uint32_t(exponent + 127) << 23); }

__device__ __forceinline__ uint64_t pack_fixed(float even, float odd) {
  const int32_t low = __float2int_rn(even), high = __float2int_rn(odd);
  return uint64_t(uint32_t(high + (low >> 31))) << 32 | uint32_t(low);
}

__device__ __forceinline__ float2 unpack_fixed(uint2 sum) {
  const int32_t low = sum.x;
  return make_float2(low, int32_t(sum.y) - (low >> 31));
}

}  // namespace jax_na::hopper
