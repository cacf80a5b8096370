#include "launch_sm80.cuh"

namespace jax_na::fused {
extern const LaunchTable kLaunch_bf16_128 = launch_table<BF16, 128>();
}  // namespace jax_na::fused
