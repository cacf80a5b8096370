// Element types: fragments out of shared memory and the warp's matrix product, for 16-bit elements and for float32 in TF32.
//
// A `Tensor<T, kPrecise>` knows: kStep elements of the reduction axis per instruction; load_a / load_b, from rows that are
// contiguous along the reduction axis; load_a_transposed / load_b_transposed, from rows that run across it; multiply.
// Addresses are shared-memory byte addresses of element (0, 0), strides in bytes. Layouts: arch/sm80/matrix.h.
#pragma once

#include <type_traits>

#include "arch/sm80/async_copy.h"
#include "arch/sm80/matrix.h"
#include "gemm/tile.cuh"

namespace jax_na::gemm {

template <typename T, bool kPrecise>
struct Tensor {
  static_assert(sizeof(T) == 2 && !kPrecise);
  static constexpr int kStep = 16;
  static constexpr int kPad = 16;  // bytes added to a row: rows of a fragment fall into different banks
  static constexpr int kPadTransposed = 16;

  // A [16 rows x kStep], rows contiguous along the reduction.
  __device__ __forceinline__ static void load_a(uint32_t (&a)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4(a, base + (lane % 16) * stride + (lane / 16) * 16);
  }
  // A from rows of the reduction axis, contiguous along the 16 rows of A.
  __device__ __forceinline__ static void load_a_transposed(uint32_t (&a)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4_transposed(a, base + (lane % 8 + 8 * (lane / 16)) * stride + ((lane / 8) % 2) * 16);
  }
  // B [kStep x 16 columns], two instructions' worth: b[0..1] columns 0-7, b[2..3] columns 8-15.
  __device__ __forceinline__ static void load_b(uint32_t (&b)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4(b, base + (lane % 8 + 8 * (lane / 16)) * stride + ((lane / 8) % 2) * 16);
  }
  __device__ __forceinline__ static void load_b_transposed(uint32_t (&b)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4_transposed(b, base + (lane % 16) * stride + (lane / 16) * 16);
  }
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
      sm80::mma_f16(c, a, b0, b1);
    } else {
      sm80::mma_bf16(c, a, b0, b1);
    }
  }
};

// kPrecise: each operand split into two TF32 numbers, three products; the error of a float32 multiplication.
template <bool kPrecise>
struct Tensor<float, kPrecise> {
  static constexpr int kStep = 8;
  static constexpr int kPad = 16;
  static constexpr int kPadTransposed = 32;

  __device__ __forceinline__ static uint32_t word(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
    return value;
  }
  __device__ __forceinline__ static void load_a(uint32_t (&a)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4(a, base + (lane % 16) * stride + (lane / 16) * 16);
  }
  __device__ __forceinline__ static void load_a_transposed(uint32_t (&a)[4], uint32_t base, int stride, int lane) {
    const uint32_t address = base + (lane % 4) * stride + (lane / 4) * 4;
    a[0] = word(address);
    a[1] = word(address + 32);
    a[2] = word(address + 4 * stride);
    a[3] = word(address + 4 * stride + 32);
  }
  __device__ __forceinline__ static void load_b(uint32_t (&b)[4], uint32_t base, int stride, int lane) {
    sm80::load_matrix_x4(b, base + (lane % 8 + 8 * (lane / 16)) * stride + ((lane / 8) % 2) * 16);
  }
  __device__ __forceinline__ static void load_b_transposed(uint32_t (&b)[4], uint32_t base, int stride, int lane) {
    const uint32_t address = base + (lane % 4) * stride + (lane / 4) * 4;
    b[0] = word(address);
    b[1] = word(address + 4 * stride);
    b[2] = word(address + 32);
    b[3] = word(address + 4 * stride + 32);
  }
  __device__ __forceinline__ static uint32_t rest(uint32_t bits, uint32_t rounded) {
    return sm80::round_tf32(__float_as_uint(__uint_as_float(bits) - __uint_as_float(rounded)));
  }
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = sm80::round_tf32(a[i]);
    const uint32_t high0 = sm80::round_tf32(b0), high1 = sm80::round_tf32(b1);
    if constexpr (kPrecise) {
      uint32_t low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = rest(a[i], high[i]);
      sm80::mma_tf32(c, low, high0, high1);
      sm80::mma_tf32(c, high, rest(b0, high0), rest(b1, high1));
    }
    sm80::mma_tf32(c, high, high0, high1);
  }
};

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two neighbouring elements, as they are stored.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <typename T>
__device__ __forceinline__ Pair<T> make_pair_of(float low, float high) {
  return {from_float<T>(low), from_float<T>(high)};
}

// Raw bits of one element: moved between weights and shared memory without conversion.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// PERF: a plain store through a pointer that was read from shared memory compiles to a generic store, behind which no load
// from shared memory may move up. This one may be reordered with them: nothing in the kernel reads what it wrote.
template <typename T>
__device__ __forceinline__ void store_global(char* to, Bits<T> value) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.b16 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "h"(value));
  } else {
    asm volatile("st.global.b32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "r"(value));
  }
}

// Rows of kWidth elements from `source + token * token_bytes` (bytes), token by token from `tokens` (-1: zeros), into
// shared memory. Columns at and beyond `valid` become zero. All threads of the block take part.
template <typename T, int kWidth>
__device__ __forceinline__ void load_rows(uint32_t shared, int stride, const T* source, int32_t token_bytes,
                                          const int32_t* tokens, int valid, bool aligned) {
  if (aligned) {
    constexpr int kElements = 16 / sizeof(T), kPieces = kWidth / kElements, kRows = kThreads / kPieces;
    static_assert(kPieces * kRows == kThreads && kChunk % kRows == 0);
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const bool in_row = piece * kElements < valid;
    const char* const from = reinterpret_cast<const char*>(source + (in_row ? piece * kElements : 0));
    const uint32_t to = shared + row * stride + piece * 16;
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      const int32_t token = tokens[row + i * kRows];
      sm80::copy_16(to + i * kRows * stride, from + int64_t(max(token, 0)) * token_bytes, in_row && token >= 0);
    }
  } else {
    for (int i = threadIdx.x; i < kChunk * kWidth; i += kThreads) {
      const int row = i / kWidth, column = i % kWidth;
      const int32_t token = tokens[row];
      const char* const from = reinterpret_cast<const char*>(source) + int64_t(token) * token_bytes;
      const T value = token >= 0 && column < valid ? reinterpret_cast<const T*>(from)[column] : from_float<T>(0.0f);
      *reinterpret_cast<T*>(__cvta_shared_to_generic(shared + row * stride + column * sizeof(T))) = value;
    }
  }
}

// The two columns of a lane: packed key with guard bits, and its place in the window's enumeration, in bytes.
template <typename T>
struct LaneKeys {
  uint32_t key[2];
  int64_t offset[2];

  __device__ __forceinline__ void set(const Params& params, int i, bool exists, const int32_t (&x)[kMaxRank]) {
    key[i] = (exists ? pack(params, x[0], x[1], x[2]) : params.nowhere) + params.guard;
    offset[i] = int64_t(linear(params, x[0], x[1], x[2])) * int64_t(sizeof(T));
  }
};

}  // namespace jax_na::gemm
