#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f32_64 = launch_table<F32, 64>();
}  // namespace jax_na::fused
