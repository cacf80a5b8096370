// Backward on Hopper: what it serves, the workspace it needs, and the launchers of its kernels by head dimension.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/call.h"
#include "../common/problem.h"
#include "backward_params_sm90.h"

namespace jax_na::hopper {

// ForwardBuffers::workspace in a backward call, in this order, each part rounded up to 256 bytes. jax_na/_cuda.py declares
// the extra output with the same formula.
struct BackwardWorkspace {
  int64_t counter_bytes;    // uint32 each, see Counter, and no_stats
  int64_t stats_bytes;      // float2 per query and head
  int64_t intervals_bytes;  // int2 per key token of each axis
  int64_t norm_bytes;       // float per query and head, if deterministic
  int64_t extrema_bytes;    // Extrema per batch entry and key head, if deterministic
  int64_t dq_bytes;         // 4 bytes for an element of query
  int64_t total() const { return counter_bytes + stats_bytes + intervals_bytes + norm_bytes + extrema_bytes + dq_bytes; }
};

inline BackwardWorkspace backward_workspace(const Problem& problem, bool deterministic) {
  const auto round_up = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t rows = problem.batch * problem.q_tokens() * problem.heads;
  int64_t axis_tokens = 0;
  for (const Axis& axis : problem.axis) axis_tokens += axis.kv_len;
  return {256,
          round_up(rows * 8),
          round_up(axis_tokens * 8),
          deterministic ? round_up(rows * 4) : 0,
          deterministic ? round_up(problem.batch * problem.kv_heads * int64_t(sizeof(Extrema))) : 0,
          round_up(rows * problem.dim * 4)};
}

// Launchers, one source per head dimension. `regime` counts the entries of backward_regimes.
struct BackwardLaunch {
  DType dtype;
  int32_t regime;
  int32_t num_sms;
  const BackwardParams* params;
};

template <int D>
Status launch_backward(const BackwardLaunch& launch, cudaStream_t stream);

}  // namespace jax_na::hopper
