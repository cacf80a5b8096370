// What the host tells the Hopper forward kernels. Everything about the problem is a run-time number; see plan_sm90.h for
// the tile shapes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/call.h"
#include "../common/problem.h"
#include "geometry.h"
#include "plan_sm90.h"
#include "recompute_sm90.cuh"
#include "schedule_sm90.h"
#include "token_map_sm90.h"

namespace jax_na::hopper {

// ---- parameters ----
// Of the kernels for small windows alone.
struct SmallForwardParams {
  uint32_t column[kWarpColumns];  // the key of a warp's box that stands there, eight bits an axis, or kNoRow
  int32_t boxes, warps;           // consumers of a query tile; consumer warps, one a box or one a box and head
  int32_t stages, q_stages;
  int32_t q_slot_bytes, kv_slot_bytes;
  int32_t ctas;  // of an SM
  int32_t shared_bytes;
};

struct ForwardParams {
  CUtensorMap q_map, k_map,
      v_map;  // q_map: boxes of one warpgroup's queries, or of a tile's (kWarps); k_map, v_map: boxes of one key tile
  TokenLayout q_layout, kv_layout;
  Axis axis[kMaxRank];
  Shard shard[kMaxRank];  // if halo is null
  const Shard* halo;      // device memory, [rank], or null
  int32_t rank;
  int32_t unit[kMaxRank];  // queries of one consumer
  int32_t grid[kMaxRank];  // consumers of a query tile
  int32_t kv_box[kMaxRank];
  int32_t kv_volume;              // of the box
  int32_t kv_map_step[kMaxRank];  // map coordinates from one key tile to the next
  int32_t warp_keys[kMaxRank];    // kWarps kernels: keys of a key tile that a warp multiplies with
  FastDivisor tiles[kMaxRank];    // query tiles per dilation group
  FastDivisor groups[kMaxRank];   // dilation
  FastDivisor heads;
  FastDivisor head_groups;  // heads / item_heads
  FastDivisor heads_per_kv;
  int32_t item_heads;  // heads of a query tile; more than one in the kernels for small windows only
  int32_t num_items;   // batch x heads x groups x tiles
  Schedule schedule;   // of the items
  // Consumers of a shared key tile take turns at the tensor cores, so that the softmax of one runs under the products of
  // another.
  int32_t take_turns;
  float scale;
  void* out;        // [batch, axes, heads, dim]
  float* lse;       // [batch, axes, heads]
  RowProblem rows;  // of the same call
  SmallForwardParams small;
};

}  // namespace jax_na::hopper
