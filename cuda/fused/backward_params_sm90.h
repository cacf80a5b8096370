// What the host hands to one launch of the Hopper backward mainloop (backward_kernel_sm90.cuh).
//
// A CTA holds a tile of keys (K, V; dk and dv in registers) from start to end and walks boxes of queries (Q, dO; dq is
// added in memory). Both are boxes of one dilation group: run-time shape, innermost axis fastest. Tiles have one shape,
// boxes one of several: at the edges of the axes tiles need fewer queries than elsewhere, and other boxes fit these better.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/problem.h"
#include "backward_plan_sm90.h"
#include "fixed_point_sm90.h"
#include "geometry.h"
#include "token_map_sm90.h"
#include "token_window_sm90.h"

namespace jax_na::hopper {

// What becomes of the dq of a box: it is added to float32 sums; to sums whose order cannot matter (fixed_point_sm90.h); or
// written, because one tile holds every key of a dilation group.
enum class DqOutput : int32_t { kSum, kFixedSum, kFinal };

// The first words of the workspace, zero at the start: tiles handed out; is there a NaN in what was written? Behind them
// BackwardParams::no_stats.
enum Counter { kTiles, kNanFound, kNumCounters };
constexpr float kNoLse = 1e38f;

struct BackwardAxis {
  int32_t dilation;
  int32_t key_length, query_length;  // tokens
  int32_t key_box;
  int32_t table_row;         // first row of this axis in BackwardParams::intervals
  int32_t key_token_stride;  // tokens of memory between neighbours of the axis
  int32_t query_token_stride;
  FastDivisor tiles;   // key tiles of the longest group
  FastDivisor groups;  // dilation
};

// A shape of query boxes.
struct QueryShape {
  CUtensorMap query, grad_out;
  TokenLayout layout;
  FastDivisor box[kMaxRank];
  int32_t prefix_row[kMaxRank + 1];  // first row of each axis in BackwardShared::prefix, and of the next shape
  int32_t volume;
};

struct BackwardParams {
  CUtensorMap key, value;
  QueryShape shape[kMostQueryShapes];  // a tile takes the one with the fewest boxes, the first of those
  int32_t num_shapes;
  int32_t least_query_volume;  // of the shapes
  TokenLayout key_layout;
  BackwardAxis axis[kMaxRank];
  FastDivisor kv_heads;
  FastDivisor key_box1, key_box2;
  uint32_t num_tiles;
  uint32_t* tile_counter;  // zero at launch
  int32_t key_volume;
  int32_t rank;
  int32_t sharded;
  int32_t heads;
  int32_t group_heads;           // query heads per key/value head
  int64_t q_tokens, key_tokens;  // per batch entry
  DqOutput dq;
  float scale;
  float scale_log2;        // scale * log2(e)
  const Shard* halo;       // [rank], read only if sharded
  const int2* intervals;   // [axis][key token]: the query ordinals that see it (backward_around_sm90.cuh)
  const float2* stats;     // [batch, heads, q tokens]: lse * log2(e), delta
  const float2* no_stats;  // the same of no query: nothing weighs anything for it
  float* grad_norms;       // [batch, heads, q tokens]: Euclidean norm of dO, NaN once dq has one; kFixedSum, as the next
  const Extrema* extrema;  // [batch, kv heads]
  void* grad_query;        // [batch, q tokens, heads, dim]
  void* grad_query_sums;   // [batch, q tokens, heads, dim], not yet scaled: float32, or pairs of kFixedSum
  void* grad_key;          // [batch, key tokens, kv heads, dim]
  void* grad_value;
  uint32_t* nan_found;  // set where a NaN is written: backward_finish_kernel then looks for its rows
};

static_assert(sizeof(BackwardParams) <= 4096, "kernel parameters");

}  // namespace jax_na::hopper
