// Hopper warpgroup matrix multiply: shared-memory matrix descriptors and `wgmma` for fp16 / bf16 with fp32
// accumulators.
//
//   D[64, N] (+)= A[64, 16] * B[16, N], per instruction, by the 128 threads of one warpgroup.
// A lies in shared memory (ss) or in registers (rs); B in shared memory. Accumulator of thread t, for 8-column group j:
//   d[4j + 0, 1] = row 16 (t / 32) + t % 32 / 4,      columns 8j + 2 (t % 4) + {0, 1}
//   d[4j + 2, 3] = the row 8 below, same columns.
// A in registers has the same layout: for 16 columns starting at 8j, {d[4j..], d[4j+4..]} packed in pairs, in order.
//
// Shared-memory tiles are what TMA writes with a swizzle: rows of kRowBytes (128 or 64, the swizzle span), 16-byte
// chunk c of row r at chunk c ^ (r % 8) (128) or c ^ (r / 2 % 4) (64); wider tiles are several such column blocks one
// after the other. The base of a tile is 1024-byte aligned. `K-major`: the row index is M or N and K runs along the
// row. `MN-major`: K is the row index. Source: PTX ISA 8.x, "Asynchronous warpgroup level matrix multiply-accumulate",
// matrix descriptor and canonical layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jax_na::sm90 {

// ---- matrix descriptors ----
// Bits 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 swizzle (1: 128 B, 2: 64
// B).
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64, "swizzle span");
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kStrideBytes = 8 * kRowBytes;  // from one group of eight rows to the next
  return (kSwizzle << 62) | ((kStrideBytes >> 4) << 32) | (uint64_t((leading_bytes & 0x3FFFF) >> 4) << 16) |
         uint64_t((address & 0x3FFFF) >> 4);
}

// A tile whose rows are M (or N) and whose columns are K. Advance K by 16: 32 bytes, then block_bytes at the end of a
// row.
template <int kRowBytes>
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
  return matrix_descriptor<kRowBytes>(address, 16);
}

// A tile whose rows are K and whose columns are M (or N); block_bytes: from one column block of kRowBytes to the next.
// Advance K by 16: 16 * kRowBytes.
template <int kRowBytes>
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address, uint32_t block_bytes) {
  return matrix_descriptor<kRowBytes>(address, block_bytes);
}

// A tile without a swizzle whose rows are M (or N) and whose columns are K: chunks of 16 bytes of all rows follow one
// another, chunk_bytes apart.
__device__ __forceinline__ uint64_t descriptor_plain(uint32_t address, uint32_t chunk_bytes) {
  constexpr uint64_t kStrideBytes = 8 * 16;  // from one group of eight rows to the next
  return ((kStrideBytes >> 4) << 32) | (uint64_t(chunk_bytes >> 4) << 16) | uint64_t((address & 0x3FFFF) >> 4);
}

// The descriptor `bytes` further (a multiple of 16, no carry out of the address field).
__device__ __forceinline__ uint64_t descriptor_advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000) | uint32_t(uint32_t(descriptor) + (bytes >> 4));
}

// The same descriptor, known to be the same in all lanes: its arithmetic then stays in uniform registers.
__device__ __forceinline__ uint64_t descriptor_uniform(uint64_t descriptor) {
  return (descriptor & 0xFFFFFFFF00000000) | __shfl_sync(~0u, uint32_t(descriptor), 0);
}

// ---- ordering ----
// Before the first wgmma, and whenever registers it reads or writes were touched by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator or register operand across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// ---- the instruction ----
// Wgmma<T, N>::ss<kMnMajorA, kMnMajorB>(d, descriptor_a, descriptor_b, accumulate)
// Wgmma<T, N>::rs<kMnMajorB>(d, a, descriptor_b, accumulate)       a: four packed registers
template <typename T, int kN>
struct Wgmma;

// clang-format off
#define JAX_NA_REGS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAX_NA_REGS_16 JAX_NA_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_NA_REGS_24 JAX_NA_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAX_NA_REGS_32 JAX_NA_REGS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_NA_REGS_40 JAX_NA_REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JAX_NA_REGS_48 JAX_NA_REGS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_NA_REGS_56 JAX_NA_REGS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAX_NA_REGS_64 JAX_NA_REGS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_NA_REGS_72 JAX_NA_REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JAX_NA_REGS_80 JAX_NA_REGS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JAX_NA_REGS_88 JAX_NA_REGS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JAX_NA_REGS_96 JAX_NA_REGS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_NA_REGS_100 JAX_NA_REGS_96 ", %96, %97, %98, %99"
#define JAX_NA_REGS_104 JAX_NA_REGS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define JAX_NA_REGS_112 JAX_NA_REGS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define JAX_NA_REGS_120 JAX_NA_REGS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define JAX_NA_REGS_128 JAX_NA_REGS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define JAX_NA_OUTS_8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define JAX_NA_OUTS_16(d) JAX_NA_OUTS_8(d), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define JAX_NA_OUTS_24(d) JAX_NA_OUTS_16(d), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define JAX_NA_OUTS_32(d) JAX_NA_OUTS_24(d), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define JAX_NA_OUTS_40(d) JAX_NA_OUTS_32(d), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define JAX_NA_OUTS_48(d) JAX_NA_OUTS_40(d), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define JAX_NA_OUTS_56(d) JAX_NA_OUTS_48(d), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define JAX_NA_OUTS_64(d) JAX_NA_OUTS_56(d), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define JAX_NA_OUTS_72(d) JAX_NA_OUTS_64(d), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define JAX_NA_OUTS_80(d) JAX_NA_OUTS_72(d), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define JAX_NA_OUTS_88(d) JAX_NA_OUTS_80(d), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define JAX_NA_OUTS_96(d) JAX_NA_OUTS_88(d), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define JAX_NA_OUTS_100(d) JAX_NA_OUTS_96(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define JAX_NA_OUTS_104(d) JAX_NA_OUTS_96(d), \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define JAX_NA_OUTS_112(d) JAX_NA_OUTS_104(d), \
  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define JAX_NA_OUTS_120(d) JAX_NA_OUTS_112(d), \
  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define JAX_NA_OUTS_128(d) JAX_NA_OUTS_120(d), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define JAX_NA_WGMMA_SS(N, R, TYPE, A, B, P, TA, TB)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" JAX_NA_REGS_##R "}, "           \
               "%" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                                                \
               : JAX_NA_OUTS_##R(d)                                                                                \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMnMajorA ? 1 : 0), "n"(kMnMajorB ? 1 : 0))

#define JAX_NA_WGMMA_RS(N, R, TYPE, A0, A1, A2, A3, B, P, TB)                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" JAX_NA_REGS_##R "}, "           \
               "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"                         \
               : JAX_NA_OUTS_##R(d)                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kMnMajorB ? 1 : 0))

// N, number of accumulator registers R = N / 2, then R, R + 1, ..., R + 6: the numbers of the operands behind them.
#define JAX_NA_DEFINE_WGMMA(N, R, I0, I1, I2, I3, I4, I5, I6)                                                      \
  template <typename T>                                                                                            \
  struct Wgmma<T, N> {                                                                                             \
    static constexpr int kRegisters = R;                                                                           \
    template <bool kMnMajorA, bool kMnMajorB>                                                                      \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {            \
      if constexpr (std::is_same_v<T, __half>) {                                                                   \
        JAX_NA_WGMMA_SS(N, R, "f16", I0, I1, I2, I3, I4);                                                          \
      } else {                                                                                                     \
        JAX_NA_WGMMA_SS(N, R, "bf16", I0, I1, I2, I3, I4);                                                         \
      }                                                                                                            \
    }                                                                                                              \
    template <bool kMnMajorB>                                                                                      \
    static __device__ __forceinline__ void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      if constexpr (std::is_same_v<T, __half>) {                                                                   \
        JAX_NA_WGMMA_RS(N, R, "f16", I0, I1, I2, I3, I4, I5, I6);                                                  \
      } else {                                                                                                     \
        JAX_NA_WGMMA_RS(N, R, "bf16", I0, I1, I2, I3, I4, I5, I6);                                                 \
      }                                                                                                            \
    }                                                                                                              \
  };

JAX_NA_DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
JAX_NA_DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
JAX_NA_DEFINE_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
JAX_NA_DEFINE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
JAX_NA_DEFINE_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
JAX_NA_DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
JAX_NA_DEFINE_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
JAX_NA_DEFINE_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
JAX_NA_DEFINE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
JAX_NA_DEFINE_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
JAX_NA_DEFINE_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
JAX_NA_DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef JAX_NA_DEFINE_WGMMA
#undef JAX_NA_WGMMA_RS
#undef JAX_NA_WGMMA_SS
// clang-format on

// Two fp32 accumulators to one register of two T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace jax_na::sm90
