// Hopper backward, head dimension 32: 64 keys by 64 queries, one consumer warpgroup, several CTAs per SM.
#include "backward_kernel_sm90.cuh"

namespace jax_na::hopper {

template <typename T>
using Config = BackwardConfig<T, 32, 64, 1, 3, 2, 3>;

template <>
Status launch_backward<32>(const BackwardLaunch& launch, cudaStream_t stream) {
  return launch_any<Config>(launch, stream);
}

}  // namespace jax_na::hopper
