// Hopper's bulk tensor copy engine (TMA): five-dimensional tiled loads, stores and reductions, and the tensor maps they
// need.
//
// Coordinates run innermost first, in elements of their dimension, and may be negative or past the end: loads fill
// zeros there, stores and reductions write nothing. A load completes on an mbarrier (expect box bytes, the out-of-range
// part included). Source: PTX ISA 8.x, "cp.async.bulk.tensor"; CUDA driver API, cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "barrier.h"

namespace jax_na::sm90 {

// ---- device ----
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_5d(uint32_t smem, const CUtensorMap* map, uint64_t* barrier, int32_t c0,
                                            int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(smem),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void tma_store_5d(const CUtensorMap* map, uint32_t smem, int32_t c0, int32_t c1, int32_t c2,
                                             int32_t c3, int32_t c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

__device__ __forceinline__ void tma_reduce_add_5d(const CUtensorMap* map, uint32_t smem, int32_t c0, int32_t c1, int32_t c2,
                                                  int32_t c3, int32_t c4) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// fp32 sum of contiguous shared memory into contiguous global memory; both 16-byte aligned, num_bytes a multiple of 16.
__device__ __forceinline__ void bulk_reduce_add_f32(float* global, uint32_t smem, uint32_t num_bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(smem),
               "r"(num_bytes)
               : "memory");
}

// Contiguous global to shared memory, 16-byte aligned.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, uint32_t num_bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
               "l"(global), "r"(num_bytes), "r"(smem_address(barrier))
               : "memory");
}

__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending committed stores have yet to read their shared memory.
template <int kPending>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until at most kPending committed stores are not yet complete.
template <int kPending>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- host ----
struct TensorMapRequest {
  const void* base = nullptr;  // 16-byte aligned
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  uint64_t size[5] = {1, 1, 1, 1, 1};            // elements per dimension, innermost first
  uint64_t stride_bytes[4] = {0, 0, 0, 0};       // of dimensions 1..4, multiples of 16
  uint32_t box[5] = {1, 1, 1, 1, 1};             // rows delivered per dimension: at most 256 after the next line
  uint32_t element_stride[5] = {1, 1, 1, 1, 1};  // 1..8; (box - 1) * stride + 1 <= 256
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
};

// Null on success, else what failed (static text).
inline const char* encode_tensor_map(CUtensorMap* map, const TensorMapRequest& request) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  uint32_t box[5];
  for (int i = 0; i < 5; ++i) box[i] = (request.box[i] - 1) * request.element_stride[i] + 1;
  const CUresult result = encode(
      map, request.type, 5, const_cast<void*>(request.base), reinterpret_cast<const cuuint64_t*>(request.size),
      reinterpret_cast<const cuuint64_t*>(request.stride_bytes), box, request.element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
      request.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor map";
}

}  // namespace jax_na::sm90
