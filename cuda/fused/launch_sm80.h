// Host side of one element type and head-dimension bucket: kernels_sm80_*.cu instantiate it, dispatch_sm80.cu calls it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/call.h"

namespace jax_na::fused {

struct Params;

struct LaunchTable {
  cudaError_t (*forward)(const Params&, bool large, int device, cudaStream_t);
  cudaError_t (*grad_query)(const Params&, uint32_t blocks, bool large, int device, cudaStream_t);
  cudaError_t (*grad_key_value)(const Params&, bool large, int device, cudaStream_t);
};

// One per kernels_sm80_<element>_<bucket>.cu.
extern const LaunchTable kLaunch_f16_32, kLaunch_f16_64, kLaunch_f16_128, kLaunch_f16_256;
extern const LaunchTable kLaunch_bf16_32, kLaunch_bf16_64, kLaunch_bf16_128, kLaunch_bf16_256;
extern const LaunchTable kLaunch_tf32_32, kLaunch_tf32_64, kLaunch_tf32_128, kLaunch_tf32_256;
extern const LaunchTable kLaunch_f32_32, kLaunch_f32_64, kLaunch_f32_128, kLaunch_f32_256;

}  // namespace jax_na::fused
