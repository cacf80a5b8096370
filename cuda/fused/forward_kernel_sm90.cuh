// Forward neighborhood attention for Hopper: TMA loads of unpermuted tensors, wgmma, warp specialisation. The kernel and
// its launch; forward_params_sm90.h names what it is told, DESIGN.md says why it is so.
#pragma once

#include <atomic>

#include "forward_consumer_sm90.cuh"
#include "forward_producer_sm90.cuh"

namespace jax_na::hopper {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  using Storage = ForwardStorage<Config>;
  extern __shared__ unsigned char dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) % 4;

  if (threadIdx.x == 0)  // one lane of every consumer warp
    smem.record.init_barriers(4 * Config::kRingConsumers, Config::kMaskProduct ? Config::kConsumers : 0);
  smem.record.build_row_offsets(params.unit, threadIdx.x, Config::kThreads);
  const bool two_shapes = Config::kShapes > 1 && params.edge_axis >= 0;
  if constexpr (!Config::kMaskProduct) {
    for (int shape = 0; shape < (two_shapes ? 2 : 1); ++shape)
      smem.mask[shape].build(params.kv[shape].extent, threadIdx.x, Config::kThreads);
  }
  if (min(params.kv[0].volume, params.kv[two_shapes].volume) < 16 * Config::kSteps) {
    // Rows that no load will write: zeros, because 0 * NaN would reach the output.
    uint4* const v = reinterpret_cast<uint4*>(&smem.v);
    for (int i = threadIdx.x; i < int(sizeof(smem.v) / sizeof(uint4)); i += Config::kThreads) v[i] = make_uint4(0, 0, 0, 0);
    if constexpr (Config::kMaskProduct) {  // and a NaN stays one under a hidden score
      uint4* const k = reinterpret_cast<uint4*>(&smem.k);
      for (int i = threadIdx.x; i < int(sizeof(smem.k) / sizeof(uint4)); i += Config::kThreads)
        k[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
  }
  if constexpr (Config::kMaskProduct) {
    if (threadIdx.x == 0) smem.mask_product.init_barriers();
    __syncthreads();  // row offsets
    smem.mask_product.build(params.unit, smem.record.row_offset, threadIdx.x, Config::kThreads);
    fence_proxy_async();
  }
  __syncthreads();

  if (warpgroup == Config::kConsumers) {
    decrease_registers<Config::kProducerRegisters>();
    if constexpr (!Config::kShared) {
      if (warp < Config::kRings) produce_alone<Config>(params, smem, warp);
    } else if (warp == 0) {
      if (threadIdx.x % 32 == 0) load_tiles<Config>(params, smem, 0);
    } else if (warp == 1) {
      describe<Config>(params, smem, 0, [&](uint32_t slot, bool last) {
        if constexpr (Config::kMaskProduct) hide_keys<Config>(params, smem, slot, last);
      });
    } else if constexpr (Config::kMaskProduct) {
      static_assert(Config::kConsumers == 2, "the warps of the producer's warpgroup");
      write_masks<Config>(params, smem, warp - 2);
    }
  } else {
    increase_registers<Config::kConsumerRegisters>();
    consume<Config>(params, smem, warpgroup);
  }
}

// Allows a kernel kBytes of dynamic shared memory on the current device, once per device. Null on success, else what
// failed.
template <const auto& kKernel, int kBytes>
const char* allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (error == cudaSuccess && (allowed.load(std::memory_order_relaxed) & bit) == 0) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null on success, else what failed.
template <typename Config>
const char* launch_forward(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(ForwardStorage<Config>) + 1024;
  static_assert(kBytes <= 232448, "shared memory of a Hopper CTA");
  if (const char* failure = allow_shared_memory<forward_sm90<Config>, kBytes>()) return failure;
  const int items = (params.num_items + Config::kRings - 1) / Config::kRings;
  const int ctas = items < num_sms ? items : num_sms;
  forward_sm90<Config><<<ctas, Config::kThreads, kBytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
