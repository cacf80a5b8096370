#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f32_256 = launch_table<F32, 256>();
}  // namespace jax_na::fused
