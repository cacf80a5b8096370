#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_f16_128 = launch_table<F16, 128>();
}  // namespace jax_na::fused
