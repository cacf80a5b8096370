// Hopper backward, head dimension 64: regime 0 has 128 keys by 128 queries and two consumer warpgroups, regime 1 (small
// windows) 64 by 64, one warpgroup and several CTAs per SM.
#include "backward_launch_sm90.cuh"

namespace jax_na::hopper {

template <typename T, BackwardPass kPass>
using LargeConfig = BackwardConfig<T, 64, 128, 2, 2, 2, 1, kPass>;
template <typename T>
using SmallConfig = BackwardConfig<T, 64, 64, 1, 2, 2, 2, BackwardPass::kKeys>;

template <>
Status launch_backward<64>(const BackwardLaunch& launch, cudaStream_t stream) {
  if (launch.regime == 0) return launch_any<LargeConfig>(launch, stream);
  return launch.dtype == DType::kF16 ? launch_config<SmallConfig<__half>>(launch, stream)
                                     : launch_config<SmallConfig<__nv_bfloat16>>(launch, stream);
}

}  // namespace jax_na::hopper
