// The forward tile plan of the Hopper kernels: which kernel, and the shapes of its query and key boxes. Host only, no CUDA.
//
// A kernel fixes three volumes at compile time: query rows per consumer, key tokens per tile, the number of consumers.
// The shapes of those boxes are run-time numbers, chosen here by a cost model over the exact windows of every tile of the
// problem.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"
#include "key_tiles_sm90.h"

namespace jax_na::hopper {

// How a CTA's consumers share the work.
enum class Sharing : int32_t {
  kShared,   // warpgroups of 64 queries split one query tile and read the same key tiles
  kPrivate,  // each warpgroup has query tiles and key tiles of its own
  kWarps,    // warps of 16 queries split one query tile; each multiplies with its own keys only
             // (forward_small_kernel_sm90.cuh)
};

// Keys of a box that needs no mask where every row sees all of them. Those past the box are hidden column by column: at
// most two groups of eight.
constexpr int32_t shortest_full_box(int32_t num_columns, bool mask_product) {
  return mask_product ? num_columns : num_columns - 16;
}

// Shapes of key tiles, at most: key_tiles_sm90.h.
constexpr int tile_shapes(Sharing sharing, bool mask_product) {
  return sharing == Sharing::kShared && !mask_product ? kTileShapes : 1;
}

// What a forward kernel fixes.
struct KernelShape {
  int32_t dim;
  int32_t num_columns;    // key tokens of a tile; kWarps: of a warp
  int32_t num_consumers;  // warpgroups; kWarps: warps, at most
  Sharing sharing;
  bool mask_product = false;  // tiles are masked by the tensor cores: mask_product_sm90.h

  constexpr int32_t rows_per_consumer() const { return sharing == Sharing::kWarps ? 16 : 64; }
};

// Whether a tile of these keys can do without a mask.
constexpr bool can_be_full(const KernelShape& kernel, const int32_t (&box)[kMaxRank]) {
  return box[0] * box[1] * box[2] >= shortest_full_box(kernel.num_columns, kernel.mask_product);
}

// Every forward kernel; instantiated in forward_sm90_d*.cu, once per element type.
constexpr KernelShape kForwardKernels[] = {
    {32, 112, 3, Sharing::kPrivate},       // small tiles: the accumulators of three independent warpgroups fit
    {64, 128, 3, Sharing::kShared},        // large windows: three warpgroups keep the exponentials busy
    {64, 160, 2, Sharing::kShared, true},  // boxes of queries, whose edge tiles are masked by the tensor cores
    {128, 128, 2, Sharing::kShared},       // the FlashAttention-3 shape
    {256, 64, 2, Sharing::kShared},        // output accumulators leave no room for more columns
    {32, 112, 15, Sharing::kWarps},        // NAT: 2x7 or 4x4 queries and their 8x10 or 10x10 keys, out of any tile
    {64, 112, 15, Sharing::kWarps},        // small windows of videos
};
constexpr int kNumForwardKernels = sizeof(kForwardKernels) / sizeof(kForwardKernels[0]);

// Limits of the kWarps kernels.
constexpr int kWarpColumns = 112;          // keys of a tile that one warp can multiply with
constexpr int kMostSmallWarps = 15;        // consumers of a CTA
constexpr int kSmallWarpsOfSm = 16;        // all warps of an SM, for want of registers
constexpr int kMostSmallStages = 4;        // query tiles, key tiles under way
constexpr int kMostSmallCoordinates = 96;  // extents of a query tile, added up
constexpr int kSmallRecordBytes = 7424;    // sizeof(SmallForwardRecords) or more

constexpr int kMostSharedBytes = 232448;  // of a CTA
constexpr int kSharedBytesOfSm = 233472;  // 1 KiB of which every CTA needs for itself

// Of an H100 or H200, for which plans are chosen on any GPU.
constexpr int32_t kSms = 132;

// Weights of the cost model, in key columns of 64 rows, that a schedule depends on too.
constexpr double kTileOverhead = 16;   // per key tile: barriers, row maximum, rescaling
constexpr double kItemOverhead = 100;  // per query tile: prologue and epilogue

// What else the plan of a kWarps kernel holds.
struct SmallPlan {
  int32_t item_heads = 1;  // heads of a query tile: 2 share rows of 128 bytes at head dimension 32
  int32_t warps = 1;       // consumers of a CTA: one for a box, or one for a box and head
  int32_t q_stages = 0;    // query tiles in flight
  int32_t stages = 0;      // key tiles in flight
  int32_t ctas = 1;        // of an SM
};

// Of a mask by the tensor cores (its codes: mask_codes.h): coordinates of the keys that a query tile visits, over all axes.
constexpr int kMaskCoordinates = 192;

struct ForwardPlan {
  int32_t kernel = -1;                      // index in kForwardKernels
  int32_t unit[kMaxRank] = {1, 1, 1};       // queries of one consumer per axis, group coordinates
  int32_t grid[kMaxRank] = {1, 1, 1};       // consumers of a query tile per axis; a shared kernel splits one axis
  int32_t kv_box[kMaxRank] = {1, 1, 1};     // keys of a tile
  int32_t edge_box[kMaxRank] = {0, 0, 0};   // of the second shape: key_tiles_sm90.h
  int32_t edge_axis = -1;                   // -1: none
  bool take_turns = true;                   // at the tensor cores: forward_consumer_sm90.cuh
  int32_t warp_keys[kMaxRank] = {1, 1, 1};  // kWarps: keys of a tile that one consumer multiplies with, at most
  SmallPlan small;                          // kWarps
  int32_t layers = 1, short_layers = 0;     // of query tiles: schedule_sm90.h
  int32_t ctas = 0;                         // of the GPU; kWarps: its SMs
  // Of one batch entry and head, predicted:
  double cost = 0;     // key columns of 64 rows
  double visited = 0;  // products computed / useful ones
};

// Null if the forward kernels serve the problem, else why not. Element types are the caller's to check.
const char* why_not_forward(const Problem& problem);

// The cheapest plan, remembered per problem and number of SMs. kernel < 0: no plan (see why_not_forward). JAX_NA_EXPLAIN=1
// prints it, once per problem; JAX_NA_HOPPER_PLAN=kernel:u0,u1,u2:g0,g1,g2:n0,n1,n2[:e0,e1,e2,axis | :heads,warps,stages,
// CTAs] overrides it in experiments.
ForwardPlan plan_forward(const Problem& problem, int32_t num_sms = kSms);

// Shared memory of a CTA of a kWarps kernel.
struct SmallLayout {
  int32_t q_slot_bytes, kv_slot_bytes;  // of a query tile; of a key tile, keys or values
  int32_t total_bytes;                  // 1 KiB for the alignment included
};
SmallLayout small_layout(const ForwardPlan& plan);

// CTAs of a kWarps kernel, of so many that the GPU holds, for a number of places (query tiles of all dilation groups): a
// multiple of it, if that leaves few out, so that a CTA's items all lie at the same place; else without a common divisor,
// so that every CTA comes to all places and none to the full tiles alone.
int32_t scheduled_ctas(int32_t ctas, int32_t places);

// The order of a warp's keys in its columns: eight bits an axis, 1 << 24 behind the last key. Eight keys that are read
// together lie in eight different groups of banks as far as possible.
void order_columns(const ForwardPlan& plan, uint32_t (&column)[kWarpColumns]);

std::string describe(const ForwardPlan& plan);

}  // namespace jax_na::hopper
