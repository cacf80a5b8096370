#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f32_32 = launch_table<F32, 32>();
}  // namespace jax_na::fused
