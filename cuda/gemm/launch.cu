#include "gemm/launch.h"

#include <algorithm>
#include <set>
#include <string>

namespace jax_na::gemm {
namespace {

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// Tokens of the longest local dilation group: of keys for the inverse product, else of queries.
int32_t group_size(Product pass, const Axis& axis) {
  return ceil_div(pass == Product::kInverse ? axis.kv_len : axis.q_len, axis.dilation);
}

// Tokens that the windows of `tile` neighbours span, or that reach a tile of `tile` keys: at most.
int32_t union_extent(const Axis& axis, int32_t tile) { return axis.window + ceil_div(tile - 1, axis.stride) * axis.stride; }

// The cost of a box: chunks of the union, and for the inverse product the sectors of its short runs of weights (a run is as
// long as the box's innermost axis). Units: one chunk's product.
double cost(Product pass, const Problem& problem, const int32_t (&box)[kMaxRank], int element_bytes) {
  double tiles = 1, columns = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t group = group_size(pass, axis);
    tiles *= double(axis.dilation) * ceil_div(group, box[a]);
    columns *= std::min(union_extent(axis, box[a]), std::max(group, axis.window));
  }
  const double chunks = (columns + kChunk - 1) / kChunk;  // a part of a chunk costs nearly a whole one
  double each = 0.5 + double(int64_t(chunks));
  if (pass == Product::kInverse) {
    const double sectors = columns * box[0] * box[1] * (box[2] * element_bytes / 32.0 + 1);
    each += sectors / 512;
  }
  return tiles * each;
}

void choose_box(Product pass, const Problem& problem, int element_bytes, int32_t (&best)[kMaxRank]) {
  std::set<int32_t> sizes[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t group = group_size(pass, problem.axis[a]);
    for (int32_t n = 1; n <= kTile && n < 2 * group; n *= 2) sizes[a].insert(std::min(n, group));
    for (int32_t n = 1; n <= 8; ++n) {
      if (ceil_div(group, n) <= kTile) sizes[a].insert(ceil_div(group, n));
    }
    best[a] = 1;
  }
  double best_cost = -1;
  for (int32_t b0 : sizes[0]) {
    for (int32_t b1 : sizes[1]) {
      for (int32_t b2 : sizes[2]) {
        if (int64_t(b0) * b1 * b2 > kTile) break;
        const int32_t box[kMaxRank] = {b0, b1, b2};
        const double c = cost(pass, problem, box, element_bytes);
        if (best_cost < 0 || c < best_cost) {
          best_cost = c;
          std::copy(box, box + kMaxRank, best);
        }
      }
    }
  }
}

Status make_params(Product pass, const Problem& problem, int32_t columns_per_block, int element_bytes, Params* params,
                   int64_t* num_blocks) {
  params->problem = problem;
  choose_box(pass, problem, element_bytes, params->box);
  int64_t blocks = problem.batch;
  int32_t bits = 0;
  params->guard = 0;
  params->any_causal = 0;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const Axis& axis = problem.axis[a];
    const int32_t tiles = ceil_div(group_size(pass, axis), params->box[a]);
    params->tiles[a] = FastDivisor(tiles);
    params->groups[a] = FastDivisor(axis.dilation * tiles);
    blocks *= int64_t(axis.dilation) * tiles;
    params->any_causal |= axis.causal;
    // Coordinates lie below the extent of the union (inverse: of the tile), so the field's largest value is free.
    const int64_t extent = pass == Product::kInverse ? params->box[a] : union_extent(axis, params->box[a]);
    int32_t field = 1;
    while ((int64_t(1) << field) <= extent) ++field;
    params->shift[a] = bits;
    bits += field + 1;
    if (bits > 32) break;
    params->guard |= uint32_t(1) << (bits - 1);
    params->nowhere = ((uint32_t(1) << field) - 1) << params->shift[a];  // ends as that of axis 0
  }
  const int64_t volume = problem.window_volume();
  if (bits > 32 || volume >= int64_t(1) << 31) {
    return Status::error("a window of " + std::to_string(volume) + " keys is too large for the GEMM kernels");
  }
  if (int64_t(problem.heads) * problem.dim * element_bytes >= int64_t(1) << 31) {
    return Status::error(std::to_string(problem.heads) + " heads of " + std::to_string(problem.dim) +
                         " elements: a token is limited to 2^31 - 1 bytes");
  }
  params->volume = int32_t(volume);
  const int32_t heads = pass == Product::kInverse ? problem.kv_heads : problem.heads;
  const int32_t column_blocks = columns_per_block == 0 ? 1 : ceil_div(problem.dim, columns_per_block);
  params->heads = FastDivisor(heads);
  params->column_blocks = FastDivisor(column_blocks);
  blocks *= int64_t(heads) * column_blocks;
  if (blocks >= int64_t(1) << 31) {
    return Status::error(std::to_string(blocks) + " tiles: the limit of one launch is 2^31 - 1");
  }
  params->aligned = int64_t(problem.dim) * element_bytes % 16 == 0;
  *num_blocks = blocks;
  return {};
}

}  // namespace

Status launch(Product pass, const Problem& problem, const ProductBuffers& buffers, int32_t columns_per_block,
              void (*kernel)(const Params), int shared_bytes, int element_bytes, cudaStream_t stream) {
  Params params{};
  int64_t num_blocks = 0;
  const Status status = make_params(pass, problem, columns_per_block, element_bytes, &params, &num_blocks);
  if (!status.ok() || num_blocks == 0) return status;
  params.weights = buffers.weights;
  params.per_query = buffers.per_query;
  params.per_key = buffers.per_key;
  params.halo = buffers.halo;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    kernel<<<dim3(unsigned(num_blocks)), dim3(kThreads), shared_bytes, stream>>>(params);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return {};
  return Status::error(std::string("a GEMM product did not launch: ") + cudaGetErrorName(error) + " (" +
                       cudaGetErrorString(error) + ")");
}

Status product(Product pass, const Problem& problem, const ProductBuffers& buffers, const CallOptions& options,
               cudaStream_t stream) {
  switch (pass) {
    case Product::kPointwise: return pointwise(problem, buffers, options, stream);
    case Product::kNeighborhood: return neighborhood(problem, buffers, options, stream);
    case Product::kInverse: return inverse(problem, buffers, options, stream);
  }
  return Status::error("unknown product");
}

}  // namespace jax_na::gemm
