// Hopper warpgroup matrix multiply whose accumulator starts at zero: D[64, N] = A[64, 16] * B[16, N].
//
// The same instruction as Wgmma::ss with accumulate = false, but the accumulator is an output only: its registers are free
// until here, so that a software-pipelined loop can keep such a product in flight across its back edge.
#pragma once

#include "wgmma.h"

namespace jax_na::sm90 {

template <typename T, int kN>
struct WgmmaFirst;

// clang-format off
#define JAX_NA_FRESH_16(d) \
  "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]), \
  "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15])
#define JAX_NA_FRESH_32(d) \
  "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]), \
  "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), \
  "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]), \
  "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31])
#define JAX_NA_FRESH_64(d) \
  "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]), \
  "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), \
  "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]), \
  "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31]), "=f"(d[32]), \
  "=f"(d[33]), "=f"(d[34]), "=f"(d[35]), "=f"(d[36]), "=f"(d[37]), "=f"(d[38]), "=f"(d[39]), "=f"(d[40]), \
  "=f"(d[41]), "=f"(d[42]), "=f"(d[43]), "=f"(d[44]), "=f"(d[45]), "=f"(d[46]), "=f"(d[47]), "=f"(d[48]), \
  "=f"(d[49]), "=f"(d[50]), "=f"(d[51]), "=f"(d[52]), "=f"(d[53]), "=f"(d[54]), "=f"(d[55]), "=f"(d[56]), \
  "=f"(d[57]), "=f"(d[58]), "=f"(d[59]), "=f"(d[60]), "=f"(d[61]), "=f"(d[62]), "=f"(d[63])
#define JAX_NA_WGMMA_FIRST(N, R, TYPE, A, B, TA, TB)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" JAX_NA_REGS_##R "}, "    \
               "%" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                                         \
               : JAX_NA_FRESH_##R(d)                                                                        \
               : "l"(a), "l"(b), "n"(kMnMajorA ? 1 : 0), "n"(kMnMajorB ? 1 : 0))

// N, number of accumulator registers R = N / 2, then R, ..., R + 3: the numbers of the operands behind them.
#define JAX_NA_DEFINE_WGMMA_FIRST(N, R, I0, I1, I2, I3)                                                     \
  template <typename T>                                                                                     \
  struct WgmmaFirst<T, N> {                                                                                 \
    template <bool kMnMajorA, bool kMnMajorB>                                                               \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b) {                      \
      if constexpr (std::is_same_v<T, __half>) {                                                            \
        JAX_NA_WGMMA_FIRST(N, R, "f16", I0, I1, I2, I3);                                                    \
      } else {                                                                                              \
        JAX_NA_WGMMA_FIRST(N, R, "bf16", I0, I1, I2, I3);                                                   \
      }                                                                                                     \
    }                                                                                                       \
  };

JAX_NA_DEFINE_WGMMA_FIRST(32, 16, 16, 17, 18, 19)
JAX_NA_DEFINE_WGMMA_FIRST(64, 32, 32, 33, 34, 35)
JAX_NA_DEFINE_WGMMA_FIRST(128, 64, 64, 65, 66, 67)

#undef JAX_NA_DEFINE_WGMMA_FIRST
#undef JAX_NA_WGMMA_FIRST
// clang-format on

}  // namespace jax_na::sm90
