#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_tf32_32 = launch_table<TF32, 32>();
}  // namespace jax_na::fused
