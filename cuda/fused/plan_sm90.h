// The forward tile plan of the Hopper kernels: which kernel, and the shapes of its query and key boxes. Host only, no CUDA.
//
// A kernel fixes three volumes at compile time: 64 query rows per consumer warpgroup, kN key columns per tile, the number of consumers.
// The shapes of those boxes are run-time numbers, chosen here by a cost model over the exact windows of every tile of the problem.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace jax_na::hopper {

constexpr int kRowsPerWarpgroup = 64;

// What a forward kernel fixes. shared: the consumers of a CTA split one query tile and read the same key tiles; otherwise each consumer
// has query tiles and key tiles of its own.
struct KernelShape {
  int32_t dim;
  int32_t num_columns;    // kN
  int32_t num_consumers;  // warpgroups
  bool shared;
};

// Every forward kernel; instantiated in forward_sm90_d*.cu, once per element type.
constexpr KernelShape kForwardKernels[] = {
    {32, 112, 3, false},   // small windows: the 14x14 keys of an 8x8 query box and a 7x7 window are two tiles
    {64, 128, 3, true},    // large windows: three warpgroups keep the exponentials busy
    {64, 208, 2, true},    // thin slabs of 14x14 keys: 3x7x7 and 11x11x11 windows
    {128, 128, 2, true},   //
    {256, 64, 2, true},    // output accumulators leave no room for more columns
};

struct ForwardPlan {
  int32_t kernel = -1;          // index in kForwardKernels
  int32_t q_box[kMaxRank] = {1, 1, 1};  // queries of one warpgroup per axis, group coordinates
  int32_t split_axis = 2;       // along which the consumers' boxes follow one another (shared kernels)
  int32_t kv_box[kMaxRank] = {1, 1, 1};
  // Of one batch entry and head, predicted:
  double cost = 0;              // key columns of 64 rows
  double visited = 0;           // products computed / useful ones
};

// Null if the forward kernels serve the problem, else why not. Element types are the caller's to check.
const char* why_not_forward(const Problem& problem);

// The cheapest plan, remembered per problem. kernel < 0: no plan (see why_not_forward). JAX_NA_EXPLAIN=1 prints it, once per problem;
// JAX_NA_HOPPER_PLAN=kernel:q0,q1,q2:axis:n0,n1,n2 overrides it in experiments.
ForwardPlan plan_forward(const Problem& problem);

std::string describe(const Problem& problem, const ForwardPlan& plan);

}  // namespace jax_na::hopper
