#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f32_128 = launch_table<F32, 128>();
}  // namespace jax_na::fused
