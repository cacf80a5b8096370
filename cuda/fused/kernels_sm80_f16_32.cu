#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f16_32 = launch_table<F16, 32>();
}  // namespace jax_na::fused
