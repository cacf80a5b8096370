#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_bf16_64 = launch_table<BF16, 64>();
}  // namespace jax_na::fused
