// Asynchronous copies from global to shared memory, SM 8.0 and later: PTX ISA, "cp.async".
//
// Shared addresses are 32-bit (shared_address). A copy with `valid` false reads nothing and writes zeros. Copies are
// visible to the issuing thread after wait_group, to the block after a __syncthreads that follows it.
#pragma once

#include <cstdint>

namespace jax_na::sm80 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past L1; both addresses 16-byte aligned.
__device__ __forceinline__ void copy_16(uint32_t destination, const void* source, bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

// 8 bytes, both addresses 8-byte aligned.
__device__ __forceinline__ void copy_8(uint32_t destination, const void* source, bool valid) {
  const int source_bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

// 4 bytes, both addresses 4-byte aligned.
__device__ __forceinline__ void copy_4(uint32_t destination, const void* source, bool valid) {
  const int source_bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's most recent groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace jax_na::sm80
