// Launches one backward mainloop: the part that is the same for every configuration.
#pragma once

#include <string>

#include "backward_mainloop_sm90.cuh"
#include "backward_sm90.h"

namespace jax_na::hopper {

template <class C>
Status launch_config(const BackwardLaunch& launch, cudaStream_t stream) {
  // The attribute is per device and cheap to set; a cache would need one entry per device.
  constexpr int kBytes = sizeof(BackwardShared<C>) + 1024;
  static_assert(kBytes <= 227 * 1024, "shared memory");
  cudaError_t error = cudaFuncSetAttribute(backward_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    const uint32_t resident = uint32_t(launch.num_sms) * C::kMinCtas;
    const uint32_t grid = launch.params->num_tiles < resident ? launch.params->num_tiles : resident;
    backward_kernel<C><<<dim3(grid), C::kThreads, kBytes, stream>>>(*launch.params);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return {};
  return Status::error(std::string("Hopper backward, head dimension ") + std::to_string(C::kDim) + ": " +
                       cudaGetErrorString(error));
}

// Config<T, kPass> for both element types and passes.
template <template <typename, BackwardPass> class Config>
Status launch_any(const BackwardLaunch& launch, cudaStream_t stream) {
  const bool half = launch.dtype == DType::kF16;
  if (launch.pass == BackwardPass::kKeys) {
    return half ? launch_config<Config<__half, BackwardPass::kKeys>>(launch, stream)
                : launch_config<Config<__nv_bfloat16, BackwardPass::kKeys>>(launch, stream);
  }
  return half ? launch_config<Config<__half, BackwardPass::kQueries>>(launch, stream)
              : launch_config<Config<__nv_bfloat16, BackwardPass::kQueries>>(launch, stream);
}

}  // namespace jax_na::hopper
