// Element types and the two matrix products of attention, on tiles in shared memory (mma.sync, SM 8.0 and later).
//
// A shared tile has rows of kRowBytes bytes, cut into 16-byte chunks whose position is XORed with the row number, so that
// the eight rows of an ldmatrix, and the scattered words of a TF32 fragment, fall into different banks. Accumulators and
// fragments follow arch/sm80/matrix.h: a thread holds rows g and g + 8 of every 16, columns 2q and 2q + 1 of every 8.
#pragma once

#include "../arch/sm80/async_copy.h"
#include "../arch/sm80/matrix.h"

namespace jax_na::fused {

namespace ptx = jax_na::sm80;

// An element: how it is stored; `operand`, the number that the matrix product sees of it; the product of one instruction.
struct F16 {
  using Storage = __half;
  static constexpr bool k16Bit = true;
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return ptx::pack_f16(a, b); }
  static __device__ __forceinline__ float to_float(Storage x) { return __half2float(x); }
  static __device__ __forceinline__ float operand(Storage x) { return to_float(x); }
  static __device__ __forceinline__ Storage from_float(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(c, a, b0, b1);
  }
};

struct BF16 {
  using Storage = __nv_bfloat16;
  static constexpr bool k16Bit = true;
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return ptx::pack_bf16(a, b); }
  static __device__ __forceinline__ float to_float(Storage x) { return __bfloat162float(x); }
  static __device__ __forceinline__ float operand(Storage x) { return to_float(x); }
  static __device__ __forceinline__ Storage from_float(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(c, a, b0, b1);
  }
};

// float32 rounded to TF32.
struct TF32 {
  using Storage = float;
  static constexpr bool k16Bit = false;
  static __device__ __forceinline__ float to_float(Storage x) { return x; }
  static __device__ __forceinline__ float operand(Storage x) {
    return __uint_as_float(ptx::round_tf32(__float_as_uint(x)));
  }
  static __device__ __forceinline__ Storage from_float(float x) { return x; }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t rounded[4] = {ptx::round_tf32(a[0]), ptx::round_tf32(a[1]), ptx::round_tf32(a[2]),
                                 ptx::round_tf32(a[3])};
    ptx::mma_tf32(c, rounded, ptx::round_tf32(b0), ptx::round_tf32(b1));
  }
};

// float32 as the sum of two TF32 numbers: three products, the error of float32.
struct F32 {
  using Storage = float;
  static constexpr bool k16Bit = false;
  static __device__ __forceinline__ float to_float(Storage x) { return x; }
  static __device__ __forceinline__ float operand(Storage x) { return x; }
  static __device__ __forceinline__ Storage from_float(float x) { return x; }
  static __device__ __forceinline__ uint32_t rest(uint32_t x, uint32_t big) {
    return ptx::round_tf32(__float_as_uint(__uint_as_float(x) - __uint_as_float(big)));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t big[4], small[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      big[i] = ptx::round_tf32(a[i]);
      small[i] = rest(a[i], big[i]);
    }
    const uint32_t b0_big = ptx::round_tf32(b0), b1_big = ptx::round_tf32(b1);
    // A separate accumulator for the products: the tensor core adds with truncation, so the running sum is kept outside it.
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    ptx::mma_tf32(sum, small, b0_big, b1_big);
    ptx::mma_tf32(sum, big, rest(b0, b0_big), rest(b1, b1_big));
    ptx::mma_tf32(sum, big, b0_big, b1_big);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
};

// Byte offset of 16-byte chunk `chunk` of row `row`.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  static_assert(kRowBytes >= 64 && kRowBytes % 64 == 0);
  const int mix = kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ mix) << 4));
}

// Both products take `active`, one bit per 16 columns: with kSkips, columns whose bit is 0 are left out (their scores stay
// as they are, their weights are taken as zero). The branches cost the scheduler some freedom, so it is off where windows
// are large.

// s += a b^T: rows of a (this warp's, 16 per row tile) by rows of b (kCols), both along the same kRowBytes.
template <class E, int kRowTiles, int kCols, int kRowBytes, bool kSkips>
__device__ __forceinline__ void multiply_transposed(float (&s)[kRowTiles][kCols / 8][4], uint32_t a, uint32_t b,
                                                    uint32_t active) {
  const int lane = threadIdx.x & 31;
  const uint32_t a_lane = a + swizzled<kRowBytes>(lane & 15, lane >> 4);
  const uint32_t b_lane = b + swizzled<kRowBytes>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
  if constexpr (kSkips) {
    uint32_t a_frag[kRowTiles][kRowBytes / 32][4];
#pragma unroll
    for (int kk = 0; kk < kRowBytes / 32; ++kk) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) ptx::load_matrix_x4(a_frag[r][kk], (a_lane ^ (kk << 5)) + r * 16 * kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      if ((active >> n & 1) == 0) continue;
#pragma unroll
      for (int kk = 0; kk < kRowBytes / 32; ++kk) {
        uint32_t b_frag[4];
        ptx::load_matrix_x4(b_frag, (b_lane ^ (kk << 5)) + n * 16 * kRowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          E::mma(s[r][2 * n], a_frag[r][kk], b_frag[0], b_frag[1]);
          E::mma(s[r][2 * n + 1], a_frag[r][kk], b_frag[2], b_frag[3]);
        }
      }
    }
  } else {
#pragma unroll
    for (int kk = 0; kk < kRowBytes / 32; ++kk) {
      uint32_t a_frag[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) ptx::load_matrix_x4(a_frag[r], (a_lane ^ (kk << 5)) + r * 16 * kRowBytes);
#pragma unroll
      for (int n = 0; n < kCols / 16; ++n) {
        uint32_t b_frag[4];
        ptx::load_matrix_x4(b_frag, (b_lane ^ (kk << 5)) + n * 16 * kRowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          E::mma(s[r][2 * n], a_frag[r], b_frag[0], b_frag[1]);
          E::mma(s[r][2 * n + 1], a_frag[r], b_frag[2], b_frag[3]);
        }
      }
    }
  }
}

// o += p b: p in accumulator layout (kCols columns), b kCols rows of kRowBytes.
template <class E, int kRowTiles, int kCols, int kRowBytes, bool kSkips>
__device__ __forceinline__ void multiply(float (&o)[kRowTiles][kRowBytes / sizeof(typename E::Storage) / 8][4],
                                         const float (&p)[kRowTiles][kCols / 8][4], uint32_t b, uint32_t active) {
  const int lane = threadIdx.x & 31;
  if constexpr (E::k16Bit) {
    const uint32_t b_lane = b + swizzled<kRowBytes>(lane & 15, lane >> 4);
#pragma unroll
    for (int kk = 0; kk < kCols / 16; ++kk) {
      if (kSkips && (active >> kk & 1) == 0) continue;
      uint32_t p_frag[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          p_frag[r][2 * half] = E::pack(p[r][2 * kk + half][0], p[r][2 * kk + half][1]);
          p_frag[r][2 * half + 1] = E::pack(p[r][2 * kk + half][2], p[r][2 * kk + half][3]);
        }
      }
#pragma unroll
      for (int d = 0; d < kRowBytes / 32; ++d) {
        uint32_t b_frag[4];
        ptx::load_matrix_x4_transposed(b_frag, (b_lane ^ (d << 5)) + kk * 16 * kRowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          E::mma(o[r][2 * d], p_frag[r], b_frag[0], b_frag[1]);
          E::mma(o[r][2 * d + 1], p_frag[r], b_frag[2], b_frag[3]);
        }
      }
    }
  } else {
    // The reduction index of one instruction is permuted: words q and q + 4 stand for columns 2q and 2q + 1 of p, so that p
    // needs no exchange between threads.
    const int g = lane >> 2, q = lane & 3;
    const uint32_t even = b + swizzled<kRowBytes>(2 * q, g >> 2) + ((g & 3) << 2);
    const uint32_t odd = b + swizzled<kRowBytes>(2 * q + 1, g >> 2) + ((g & 3) << 2);
#pragma unroll
    for (int kk = 0; kk < kCols / 8; ++kk) {
      if (kSkips && (active >> (kk / 2) & 1) == 0) continue;
      uint32_t p_frag[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        p_frag[r][0] = __float_as_uint(p[r][kk][0]);
        p_frag[r][1] = __float_as_uint(p[r][kk][2]);
        p_frag[r][2] = __float_as_uint(p[r][kk][1]);
        p_frag[r][3] = __float_as_uint(p[r][kk][3]);
      }
#pragma unroll
      for (int d = 0; d < kRowBytes / 32; ++d) {
        uint32_t b0, b1;
        asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(b0) : "r"((even ^ (d << 5)) + kk * 8 * kRowBytes) : "memory");
        asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(b1) : "r"((odd ^ (d << 5)) + kk * 8 * kRowBytes) : "memory");
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) E::mma(o[r][d], p_frag[r], b0, b1);
      }
    }
  }
}

// Copies kRows rows of two tensors into two shared tiles; tokens[r] < 0 and bytes beyond a row's own become zero. Row bytes
// are multiples of 16, `step` is the distance between tokens in bytes.
template <class Byte>
struct Rows {
  Byte* base;
  int32_t step;
  int32_t row_bytes;
};
using RowSource = Rows<const char>;
using RowTarget = Rows<char>;

template <int kRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t tile_a, const RowSource& a, uint32_t tile_b, const RowSource& b,
                                          const int32_t* tokens) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % kThreads == 0);
  if constexpr (kThreads >= kChunks) {
    constexpr int kPass = kThreads / kChunks;  // rows at a time
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const bool in_a = chunk * 16 < a.row_bytes, in_b = chunk * 16 < b.row_bytes;
    const char *from_a = a.base + chunk * 16, *from_b = b.base + chunk * 16;
    const uint32_t at = swizzled<kRowBytes>(row, chunk);
#pragma unroll
    for (int i = 0; i < kRows / kPass; ++i) {
      const int32_t token = tokens[row + i * kPass];
      // The swizzle of row + i * kPass: the low bits of the two do not overlap.
      const uint32_t to = (kRowBytes == 64 ? at : at ^ ((i * kPass & 7) << 4)) + i * kPass * kRowBytes;
      ptx::copy_16(tile_a + to, from_a + uint64_t(uint32_t(token)) * uint32_t(a.step), token >= 0 && in_a);
      ptx::copy_16(tile_b + to, from_b + uint64_t(uint32_t(token)) * uint32_t(b.step), token >= 0 && in_b);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads;
      const int row = index / kChunks, chunk = index % kChunks;
      const int32_t token = tokens[row];
      const uint32_t to = swizzled<kRowBytes>(row, chunk);
      ptx::copy_16(tile_a + to, a.base + uint64_t(uint32_t(token)) * uint32_t(a.step) + chunk * 16,
                   token >= 0 && chunk * 16 < a.row_bytes);
      ptx::copy_16(tile_b + to, b.base + uint64_t(uint32_t(token)) * uint32_t(b.step) + chunk * 16,
                   token >= 0 && chunk * 16 < b.row_bytes);
    }
  }
}

// The same for one tensor.
template <int kRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t tile, const RowSource& source, const int32_t* tokens) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int row = index / kChunks, chunk = index % kChunks;
    const int32_t token = tokens[row];
    ptx::copy_16(tile + swizzled<kRowBytes>(row, chunk),
                 source.base + uint64_t(uint32_t(token)) * uint32_t(source.step) + chunk * 16,
                 token >= 0 && chunk * 16 < source.row_bytes);
  }
}

// Writes this warp's rows of an accumulator to global memory, through its own rows of a shared tile (kRowTiles * 16 rows).
template <class E, int kRowTiles, int kRowBytes>
__device__ __forceinline__ void store_rows(const float (&o)[kRowTiles][kRowBytes / sizeof(typename E::Storage) / 8][4],
                                           uint32_t tile, const RowTarget& target, const int32_t* tokens) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = r * 16 + half * 8 + g;
#pragma unroll
      for (int n = 0; n < static_cast<int>(kRowBytes / sizeof(typename E::Storage) / 8); ++n) {
        const float a = o[r][n][2 * half], b = o[r][n][2 * half + 1];
        if constexpr (E::k16Bit) {
          asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(tile + swizzled<kRowBytes>(row, n) + q * 4), "r"(E::pack(a, b))
                       : "memory");
        } else {
          asm volatile(
              "st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(tile + swizzled<kRowBytes>(row, 2 * n + (q >> 1)) + (q & 1) * 8),
              "f"(a), "f"(b)
              : "memory");
        }
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kRowTiles * 16 * kChunks / 32; ++i) {
    const int index = lane + i * 32;
    const int row = index / kChunks, chunk = index % kChunks;
    uint32_t x, y, z, w;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "r"(tile + swizzled<kRowBytes>(row, chunk))
                 : "memory");
    const int32_t token = tokens[row];
    if (token >= 0 && chunk * 16 < target.row_bytes) {
      *reinterpret_cast<uint4*>(target.base + int64_t(token) * target.step + chunk * 16) = make_uint4(x, y, z, w);
    }
  }
}

}  // namespace jax_na::fused
