#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_bf16_32 = launch_table<BF16, 32>();
}  // namespace jax_na::fused
