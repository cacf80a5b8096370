// The codes of a window mask that is made by the tensor cores (mask_product_sm90.h): plain arithmetic, for host and device.
//
// A query of a consumer's box has a code for its coordinate on every axis on which the box is wider than 1: those of axis 0
// are numbered first. Sets of codes are bits of a word. On an axis of extent 1 there is no code: a key hidden there is
// hidden from every code. If no axis has one, all queries (there is one) have code 0.
#pragma once

#include <cstdint>

#include "../common/problem.h"
#include "../common/window.h"

namespace jax_na::hopper {

constexpr int kMaskCodes = 16;
constexpr uint32_t kAllCodes = (1u << kMaskCodes) - 1;

// bf16: 1/4, what a query's row holds in the slot of a code; what a key's row does, where it is hidden: mask_word.
constexpr uint32_t kCodeWeight = 0x3E80;
constexpr float kHiddenScore = -1e37f;  // their products are below

JAX_NA_HOST_DEVICE int32_t codes_of_extent(int32_t extent) { return extent > 1 ? extent : 0; }

// The first code of axis a.
JAX_NA_HOST_DEVICE int32_t first_code(const int32_t (&unit)[kMaxRank], int32_t a) {
  return (a > 0 ? codes_of_extent(unit[0]) : 0) + (a > 1 ? codes_of_extent(unit[1]) : 0);
}

// The codes of a query; at: its coordinates in the box, eight bits an axis.
JAX_NA_HOST_DEVICE uint32_t codes_of_query(const int32_t (&unit)[kMaxRank], uint32_t at) {
  uint32_t codes = 0;
  for (int32_t a = 0; a < kMaxRank; ++a) {
    if (unit[a] > 1) codes |= 1u << (first_code(unit, a) + int32_t(at >> (8 * a) & 255));
  }
  return codes != 0 ? codes : 1;
}

// The codes of one axis that key coordinate j of a group of so many tokens is hidden from. first_query: group coordinate of
// the box' first; code: first_code of the axis. A window holds an interval of keys and a key is seen by an interval of
// queries, so that two shifts make all codes of the axis.
JAX_NA_HOST_DEVICE uint32_t hidden_codes(Interval seen_by, int32_t first_query, int32_t extent, int32_t code) {
  int32_t begin = seen_by.begin - first_query, end = seen_by.end - first_query;
  begin = begin > 0 ? begin : 0;
  end = end < extent ? end : extent;
  const uint32_t seen = end > begin ? (1u << end) - (1u << begin) : 0;
  if (extent == 1) return seen != 0 ? 0 : kAllCodes;
  return (((1u << extent) - 1) & ~seen) << code;
}

// The queries that see key coordinate j; unlike queries_of_key for a j behind the group too.
JAX_NA_HOST_DEVICE Interval seen_by(const Axis& axis, int32_t j, int32_t length) {
  if (j < 0 || j >= length) return {0, 0};
  return queries_of_key(j, length, axis.window, axis.stride, axis.causal != 0);
}

// A set of codes in the form that mask_word takes: every code is the highest bit of a byte after a shift by 0 to 3.
JAX_NA_HOST_DEVICE uint32_t spread_codes(uint32_t codes) { return codes | codes << 20; }

// Word j (0..7) of the 16 halfwords of a set of codes: 0xFF00 (bf16: -2^127) where slot 2 j, 2 j + 1 holds a code of the
// set, else 0.
JAX_NA_HOST_DEVICE uint32_t mask_word(uint32_t spread, int32_t j) {
  const uint32_t bytes = spread << (j / 2);
#ifdef __CUDA_ARCH__
  uint32_t word;  // bytes 1 and 3: the sign of a byte, eight times; 0 and 2: a zero
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(bytes), "r"(0), "r"(j % 2 == 0 ? 0x9484 : 0xB4A4));
  return word;
#else
  const uint32_t low = bytes >> (j % 2 == 0 ? 7 : 23) & 1, high = bytes >> (j % 2 == 0 ? 15 : 31) & 1;
  return low * 0xFF00u | high * 0xFF000000u;
#endif
}

// Which code slot k (0..15, along the reduction of the product) stands for.
JAX_NA_HOST_DEVICE int32_t code_of_slot(int32_t k) {
  const int32_t j = k / 2;
  return (j % 2 == 0 ? 7 : 3) - j / 2 + 8 * (k % 2);
}

}  // namespace jax_na::hopper
