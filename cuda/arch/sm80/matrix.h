// Warp-wide matrix instructions, SM 8.0 and later: PTX ISA, "ldmatrix" and "mma.sync".
//
// Fragment layouts, with lane = 4 * g + q (g in 0..7, q in 0..3) and 32 bytes of the reduction axis per instruction:
//   A [16 rows x 32 bytes]  a[0] row g, word q; a[1] row g + 8, word q; a[2] row g, word q + 4; a[3] row g + 8, word q + 4.
//   B [32 bytes x 8 cols]   b[0] column g, word q; b[1] column g, word q + 4.
//   C [16 rows x 8 cols]    c[0], c[1] row g, columns 2q, 2q + 1; c[2], c[3] row g + 8, the same columns.
// A word is two consecutive 16-bit elements, or one float32 rounded to TF32. So load_matrix_x4 of rows that are contiguous
// along the reduction axis yields A and B for every element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_na::sm80 {

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8. Result i, lane 4g + q: row g, word q of
// matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_row)
               : "memory");
}

// The same for 16-bit elements, each matrix transposed: result i, lane 4g + q: rows 2q, 2q + 1 of column g.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_row)
               : "memory");
}

// c += a b, float32 accumulators.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Nearest TF32 (10 bits of mantissa), ties away from zero, as float32 bits.
__device__ __forceinline__ uint32_t round_tf32(uint32_t bits) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(result) : "f"(__uint_as_float(bits)));
  return result;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^x, relative error 2^-22; 2^-inf = 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace jax_na::sm80
