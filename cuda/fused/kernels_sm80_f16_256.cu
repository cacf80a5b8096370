#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f16_256 = launch_table<F16, 256>();
}  // namespace jax_na::fused
