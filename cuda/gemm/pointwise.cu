// Instantiations and launch of the pointwise product.
#include "gemm/launch.h"
#include "gemm/pointwise.cuh"

namespace jax_na::gemm {
namespace {

template <typename T, bool kPrecise>
__global__ void __launch_bounds__(kThreads, 4) pointwise_kernel(const __grid_constant__ Params params) {
  Pointwise<T, kPrecise>::run(params);
}

}  // namespace

Status pointwise(const Problem& problem, const ProductBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  return with_element(options, [&](auto element, auto precise) {
    using T = decltype(element);
    constexpr bool kPrecise = decltype(precise)::value;
    return launch(Product::kPointwise, problem, buffers, 0, &pointwise_kernel<T, kPrecise>,
                  Pointwise<T, kPrecise>::shared_bytes(problem.dim), int(sizeof(T)), stream);
  });
}

}  // namespace jax_na::gemm
