// What the host tells the Hopper forward kernels. Everything about the problem is a run-time number; see plan_sm90.h for
// the tile shapes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/call.h"
#include "../common/problem.h"
#include "geometry.h"
#include "key_tiles_sm90.h"
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

// The keys of a tile.
struct KeyBox {
  int32_t extent[kMaxRank];
  int32_t map_step[kMaxRank];  // map coordinates from one box to the next
  int32_t volume;
  uint32_t classes;  // that are possible: columns past the box need a mask, or, if they are few, apply_tail
};

struct ForwardParams {
  CUtensorMap q_map;                                   // boxes of one warpgroup's queries, or of a tile's (kWarps)
  CUtensorMap k_map[kTileShapes], v_map[kTileShapes];  // boxes of one key tile
  TokenLayout q_layout, kv_layout;
  Axis axis[kMaxRank];
  Shard shard[kMaxRank];  // if halo is null
  const Shard* halo;      // device memory, [rank], or null
  int32_t rank;
  int32_t unit[kMaxRank];  // queries of one consumer
  int32_t grid[kMaxRank];  // consumers of a query tile
  KeyBox kv[kTileShapes];
  int32_t edge_axis;             // of the second shape, or -1
  int32_t warp_keys[kMaxRank];   // kWarps kernels: keys of a key tile that a warp multiplies with
  FastDivisor tiles[kMaxRank];   // query tiles per dilation group
  FastDivisor groups[kMaxRank];  // dilation
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
