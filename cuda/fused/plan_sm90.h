// The forward tile plan of the Hopper kernels: which kernel, and the shapes of its query and key boxes. Host only, no CUDA.
//
// A kernel fixes three volumes at compile time: query rows per consumer, key tokens per tile, the number of consumers.
// The shapes of those boxes are run-time numbers, chosen here by a cost model over the exact windows of every tile of the
// problem.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace jax_na::hopper {

// How a CTA's consumers share the work.
enum class Sharing : int32_t {
  kShared,   // warpgroups of 64 queries split one query tile and read the same key tiles
  kPrivate,  // each warpgroup has query tiles and key tiles of its own
  kWarps,    // warps of 16 queries split one query tile; each multiplies with its own keys only (forward_small_sm90.h)
};

// What a forward kernel fixes.
struct KernelShape {
  int32_t dim;
  int32_t num_columns;    // key tokens of a tile
  int32_t num_consumers;  // warpgroups, or warps
  Sharing sharing;

  constexpr int32_t rows_per_consumer() const { return sharing == Sharing::kWarps ? 16 : 64; }
};

// Every forward kernel; instantiated in forward_sm90_d*.cu, once per element type.
constexpr KernelShape kForwardKernels[] = {
    {32, 112, 3, Sharing::kPrivate},  // small tiles: the accumulators of three independent warpgroups fit
    {64, 128, 3, Sharing::kShared},   // large windows: three warpgroups keep the exponentials busy
    {64, 208, 2, Sharing::kShared},   // thin slabs of 14x14 keys
    {128, 128, 2, Sharing::kShared},  // the FlashAttention-3 shape
    {256, 64, 2, Sharing::kShared},   // output accumulators leave no room for more columns
    {32, 208, 4, Sharing::kWarps},    // NAT: 4x4 queries and their 10x10 keys, of 14x14 in the tile
    {64, 208, 12, Sharing::kWarps},   // small windows of videos
};
constexpr int kNumForwardKernels = sizeof(kForwardKernels) / sizeof(kForwardKernels[0]);

// Keys of a tile that one warp of a kWarps kernel can multiply with.
constexpr int kWarpColumns = 112;

struct ForwardPlan {
  int32_t kernel = -1;                      // index in kForwardKernels
  int32_t unit[kMaxRank] = {1, 1, 1};       // queries of one consumer per axis, group coordinates
  int32_t grid[kMaxRank] = {1, 1, 1};       // consumers of a query tile per axis; a shared kernel splits one axis
  int32_t kv_box[kMaxRank] = {1, 1, 1};     // keys of a tile
  bool take_turns = true;                   // at the tensor cores: forward_sm90.h
  int32_t warp_keys[kMaxRank] = {1, 1, 1};  // kWarps: keys of a tile that one consumer multiplies with, at most
  // Of one batch entry and head, predicted:
  double cost = 0;     // key columns of 64 rows
  double visited = 0;  // products computed / useful ones
};

// Null if the forward kernels serve the problem, else why not. Element types are the caller's to check.
const char* why_not_forward(const Problem& problem);

// The cheapest plan, remembered per problem. kernel < 0: no plan (see why_not_forward). JAX_NA_EXPLAIN=1 prints it, once
// per problem; JAX_NA_HOPPER_PLAN=kernel:u0,u1,u2:g0,g1,g2:n0,n1,n2 overrides it in experiments.
ForwardPlan plan_forward(const Problem& problem);

std::string describe(const ForwardPlan& plan);

}  // namespace jax_na::hopper
