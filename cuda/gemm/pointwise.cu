// Instantiations and launch of the pointwise product: kSlice is a bucket of the head dimension, at most 256 bytes.
#include "gemm/pointwise.cuh"

#include "gemm/launch.h"

namespace jax_na::gemm {
namespace {

template <typename T, bool kPrecise, int kSlice>
__global__ void __launch_bounds__(kThreads, 4) pointwise_kernel(const __grid_constant__ Params params) {
  Pointwise<T, kPrecise, kSlice>::run(params);
}

}  // namespace

Status pointwise(const Problem& problem, const ProductBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  return with_element(options, [&](auto element, auto precise) {
    using T = decltype(element);
    constexpr bool kPrecise = decltype(precise)::value;
    return with_columns<256 / sizeof(T)>(problem.dim, [&](auto slice) {
      constexpr int kSlice = decltype(slice)::value;
      return launch(Product::kPointwise, problem, buffers, 0, &pointwise_kernel<T, kPrecise, kSlice>,
                    Pointwise<T, kPrecise, kSlice>::shared_bytes(), int(sizeof(T)), stream);
    });
  });
}

}  // namespace jax_na::gemm
