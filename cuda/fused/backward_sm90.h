// Backward on Hopper: what it serves, the workspace it needs, and the launchers of its kernels by head dimension.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/call.h"
#include "../common/problem.h"
#include "backward_params_sm90.h"

namespace jax_na::hopper {

// Bytes of ForwardBuffers::workspace in a backward call: lse and delta of every query and head, then (unless deterministic) dq in
// float32. jax_na/_cuda.py declares the extra output with the same formula.
inline int64_t backward_workspace_bytes(const Problem& problem, bool deterministic) {
  const int64_t rows = problem.batch * problem.q_tokens() * problem.heads;
  const int64_t stats_bytes = (rows * 8 + 255) / 256 * 256;
  return stats_bytes + (deterministic ? 0 : rows * problem.dim * 4);
}

// Rows of the outer tile and of an inner box, and what one box and one tile cost (nanoseconds on one SM of an H200, all CTAs of the
// SM together): the tile choice and the choice between two regimes of one head dimension go by these.
struct BackwardRegime {
  int32_t outer;
  int32_t inner;
  double box_ns;
  double masked_box_ns;  // further, if the box needs a mask
  double tile_ns;
};

// Launchers, one source per head dimension. `regime` counts the entries of backward_regimes.
struct BackwardLaunch {
  BackwardPass pass;
  DType dtype;
  int32_t regime;
  int64_t num_tiles;
  const BackwardParams* params;
};

template <int D>
Status launch_backward(const BackwardLaunch& launch, cudaStream_t stream);

}  // namespace jax_na::hopper
