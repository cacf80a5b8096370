// Hopper backward, head dimension 64: regime 0 has 128 keys by 128 queries and two consumer warpgroups, regime 1 (small
// windows) 64 by 64, one warpgroup and several CTAs per SM.
#include "backward_kernel_sm90.cuh"

namespace jax_na::hopper {

template <typename T>
using LargeConfig = BackwardConfig<T, 64, 128, 2, 2, 2, 1>;
template <typename T>
using SmallConfig = BackwardConfig<T, 64, 64, 1, 2, 2, 2>;

template <>
Status launch_backward<64>(const BackwardLaunch& launch, cudaStream_t stream) {
  return launch.regime == 0 ? launch_any<LargeConfig>(launch, stream) : launch_any<SmallConfig>(launch, stream);
}

}  // namespace jax_na::hopper
