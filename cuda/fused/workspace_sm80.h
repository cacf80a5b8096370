// Scratch memory of the backward pass; jax_na/_cuda.py (fused_workspace_bytes) mirrors the sizes. The forward pass takes
// none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/problem.h"

namespace jax_na::fused {

struct Workspace {
  int64_t stats = 0;         // float2 per query and head
  int64_t bias_partial = 0;  // float32 [bias_splits][heads][bias_entries]
  int64_t bias_entries = 0;
  int32_t bias_splits = 0;
  int64_t extra_partial = 0;  // float32 [extra_splits][batch, num_extra, kv_heads, dim + dim_v]
  int32_t extra_splits = 0;
  int64_t bytes = 0;
};

inline Workspace backward_workspace(const Problem& problem, bool has_bias) {
  constexpr int64_t kBlocks = 528;  // four per SM of the largest GPUs: enough to fill them
  Workspace w;
  const int64_t queries = problem.batch * problem.q_tokens();
  const auto take = [&w](int64_t bytes) {
    const int64_t at = w.bytes;
    w.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  w.stats = take(queries * problem.heads * 8);
  if (has_bias) {
    w.bias_entries = 1;
    for (const Axis& axis : problem.axis) w.bias_entries *= 2 * axis.window - 1;
    w.bias_splits = static_cast<int32_t>((kBlocks + problem.heads - 1) / problem.heads);
    w.bias_partial = take(4 * w.bias_splits * problem.heads * w.bias_entries);
  }
  if (problem.num_extra > 0) {
    const int64_t rows = problem.batch * problem.kv_heads * problem.num_extra;
    const int64_t tiles = problem.batch * problem.kv_heads * ((problem.num_extra + 63) / 64);
    const int64_t columns = problem.q_tokens() * (problem.heads / problem.kv_heads);
    w.extra_splits =
        static_cast<int32_t>(std::max<int64_t>(1, std::min((kBlocks / 2 + tiles - 1) / tiles, (columns + 1023) / 1024)));
    w.extra_partial = take(4 * w.extra_splits * rows * (problem.dim + problem.dim_v));
  }
  return w;
}

}  // namespace jax_na::fused
