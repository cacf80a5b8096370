// The Hopper family: TMA and wgmma kernels for fp16 / bf16 on compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include "../common/call.h"
#include "../common/problem.h"

namespace jax_na::hopper {

// out (and lse, unless null) from query, key, value. An error names what is not served; nothing was launched then.
Status forward(const Problem& problem, const ForwardBuffers& buffers, const CallOptions& options, cudaStream_t stream);

}  // namespace jax_na::hopper
