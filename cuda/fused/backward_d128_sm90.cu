// Hopper backward, head dimension 128: 128 keys by 64 queries, two consumer warpgroups.
#include "backward_kernel_sm90.cuh"

namespace jax_na::hopper {

template <typename T>
using Config = BackwardConfig<T, 128, 64, 2, 2, 1, 1>;

template <>
Status launch_backward<128>(const BackwardLaunch& launch, cudaStream_t stream) {
  return launch_any<Config>(launch, stream);
}

}  // namespace jax_na::hopper
