// Instantiations and launch of the inverse product: kColumns is a bucket of the head dimension, wider ones take several
// blocks.
#include "gemm/inverse.cuh"
#include "gemm/launch.h"

namespace jax_na::gemm {
namespace {

template <typename T, bool kPrecise, int kColumns>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kColumns>) inverse_kernel(const __grid_constant__ Params params) {
  Inverse<T, kPrecise, kColumns>::run(params);
}

}  // namespace

Status inverse(const Problem& problem, const ProductBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  return with_element(options, [&](auto element, auto precise) {
    using T = decltype(element);
    constexpr bool kPrecise = decltype(precise)::value;
    return with_columns<kPrecise ? 64 : 128>(problem.dim, [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      return launch(Product::kInverse, problem, buffers, kColumns, &inverse_kernel<T, kPrecise, kColumns>,
                    Inverse<T, kPrecise, kColumns>::shared_bytes(), int(sizeof(T)), stream);
    });
  });
}

}  // namespace jax_na::gemm
