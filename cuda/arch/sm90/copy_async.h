// Small asynchronous copies and vector reductions: cp.async that completes on an mbarrier, red.global.add of four floats.
//
// Source: PTX ISA 8.x, "cp.async", "cp.async.mbarrier.arrive", "red" (vector forms need sm_90).
#pragma once

#include <cstdint>

#include "barrier.h"

namespace jax_na::sm90 {

// Eight bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async_8_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_address(shared)), "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}

// One arrival on the barrier once this thread's earlier cp.async are done; the barrier's count includes it.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// global[0..3] += values, float32, unordered; 16-byte aligned.
__device__ __forceinline__ void reduce_add_x4(float* global, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

}  // namespace jax_na::sm90
