// Programmatic dependent launch: a kernel that starts while the one before it in the stream still runs, so that its
// beginning hides behind the other's end. Source: CUDA programming guide, "Programmatic Dependent Launch"; PTX ISA 8.x,
// "griddepcontrol".
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace jax_na::sm90 {

// Until the kernels before have ended and what they wrote can be read. Nothing when the launch was an ordinary one.
__device__ __forceinline__ void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start, once every block has come here or ended.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Off: not yet tried inside the CUDA graphs that XLA captures. An ordinary launch otherwise.
constexpr bool kDependentLaunches = false;

template <typename Params>
cudaError_t launch_dependent(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes,
                             cudaStream_t stream, const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kDependentLaunches ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace jax_na::sm90
