#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_tf32_128 = launch_table<TF32, 128>();
}  // namespace jax_na::fused
