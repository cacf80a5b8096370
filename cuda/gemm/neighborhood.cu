// Instantiations and launch of the neighborhood product: kColumns is a bucket of the head dimension, wider ones take
// several blocks.
#include "gemm/launch.h"
#include "gemm/neighborhood.cuh"

namespace jax_na::gemm {
namespace {

template <typename T, bool kPrecise, int kColumns>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kColumns>)
    neighborhood_kernel(const __grid_constant__ Params params) {
  Neighborhood<T, kPrecise, kColumns>::run(params);
}

}  // namespace

Status neighborhood(const Problem& problem, const ProductBuffers& buffers, const CallOptions& options,
                    cudaStream_t stream) {
  return with_element(options, [&](auto element, auto precise) {
    using T = decltype(element);
    constexpr bool kPrecise = decltype(precise)::value;
    return with_columns<kPrecise ? 64 : 128>(problem.dim, [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      return launch(Product::kNeighborhood, problem, buffers, kColumns, &neighborhood_kernel<T, kPrecise, kColumns>,
                    Neighborhood<T, kPrecise, kColumns>::shared_bytes(), int(sizeof(T)), stream);
    });
  });
}

}  // namespace jax_na::gemm
