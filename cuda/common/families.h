// The kernel families and their entry points. A family is compiled in if CMake sees sources for it (JAX_NA_WITH_<FAMILY>);
// cuda/ffi/dispatch.cc lists them with the GPUs they run on, jax_na/_cuda.py says what they can serve.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"
#include "problem.h"

namespace jax_na {

#define JAX_NA_DECLARE_FAMILY(name)                                                          \
  namespace name {                                                                           \
  Status forward(const Problem&, const ForwardBuffers&, const CallOptions&, cudaStream_t);   \
  Status backward(const Problem&, const BackwardBuffers&, const CallOptions&, cudaStream_t); \
  }

JAX_NA_DECLARE_FAMILY(naive)   // direct kernels: any GPU from SM 8.0, every dtype and head dimension
JAX_NA_DECLARE_FAMILY(fused)   // tiles on mma.sync: any GPU from SM 8.0
JAX_NA_DECLARE_FAMILY(hopper)  // tiles on TMA and wgmma: SM 9.0
// The unfused products, families naive and gemm, have an entry point of their own: product.h.

#undef JAX_NA_DECLARE_FAMILY

}  // namespace jax_na
