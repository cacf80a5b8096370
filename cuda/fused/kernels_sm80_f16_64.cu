#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f16_64 = launch_table<F16, 64>();
}  // namespace jax_na::fused
