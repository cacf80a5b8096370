// Small asynchronous copies and reductions: cp.async that completes on an mbarrier, red.global.add.
//
// Source: PTX ISA 8.x, "cp.async", "cp.async.mbarrier.arrive", "red" (vector forms need sm_90).
#pragma once

#include <cstdint>

#include "barrier.h"

namespace jax_na::sm90 {

// 4, 8 or 16 bytes from global to shared memory, or zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(shared)), "l"(global), "n"(kBytes),
               "r"(valid ? kBytes : 0)
               : "memory");
}

// One arrival on the barrier once this thread's earlier cp.async are done; the barrier's count includes it.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// global[0..3] += values, float32, unordered; 16-byte aligned. Predicated instead of branched around: a branch between
// wgmma and its wait would make the compiler serialize the pipeline.
__device__ __forceinline__ void reduce_add_x4(float* global, float4 values, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(global),
      "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(int(valid))
      : "memory");
}

// *global += value, unordered, predicated likewise.
__device__ __forceinline__ void reduce_add(uint64_t* global, uint64_t value, bool valid) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p red.relaxed.gpu.global.add.u64 [%0], %1;\n}\n" ::"l"(global),
               "l"(value), "r"(int(valid))
               : "memory");
}

}  // namespace jax_na::sm90
