#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_tf32_256 = launch_table<TF32, 256>();
}  // namespace jax_na::fused
