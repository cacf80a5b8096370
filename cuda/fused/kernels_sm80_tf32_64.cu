#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_tf32_64 = launch_table<TF32, 64>();
}  // namespace jax_na::fused
