#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_bf16_256 = launch_table<BF16, 256>();
}  // namespace jax_na::fused
