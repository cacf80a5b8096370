// Host side of the Hopper forward pass: plan, tensor maps, parameters, launch.
#include "forward_params_sm90.h"

#include <algorithm>

#include "forward_sm90_kernels.h"
#include "hopper.h"
#include "plan_sm90.h"

namespace jax_na::hopper {
namespace {

const char* launch(int32_t kernel, DType dtype, const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  switch (kernel) {
    case 0: return launch_forward_kernel<0>(dtype, params, num_sms, stream);
    case 1: return launch_forward_kernel<1>(dtype, params, num_sms, stream);
    case 2: return launch_forward_kernel<2>(dtype, params, num_sms, stream);
    case 3: return launch_forward_kernel<3>(dtype, params, num_sms, stream);
    case 4: return launch_forward_kernel<4>(dtype, params, num_sms, stream);
    case 5: return launch_forward_kernel<5>(dtype, params, num_sms, stream);
    case 6: return launch_forward_kernel<6>(dtype, params, num_sms, stream);
    default: return "no such Hopper forward kernel";
  }
}

KeyBox key_box(const int32_t (&extent)[kMaxRank], const KernelShape& kernel, const Problem& problem,
               const TokenLayout& layout) {
  KeyBox box{};
  for (int a = 0; a < kMaxRank; ++a) {
    box.extent[a] = extent[a];
    box.map_step[a] = extent[a] * (layout.fold[a] != 0 ? 1 : problem.axis[a].dilation);
  }
  box.volume = extent[0] * extent[1] * extent[2];
  box.classes = can_be_full(kernel, extent) ? ~0u : ~0u / 3 * kInside;  // of every consumer
  return box;
}

SmallForwardParams small_params(const ForwardPlan& plan) {
  const SmallLayout layout = small_layout(plan);
  SmallForwardParams small;
  order_columns(plan, small.column);
  small.boxes = plan.grid[0] * plan.grid[1] * plan.grid[2];
  small.warps = plan.small.warps;
  small.stages = plan.small.stages;
  small.q_stages = plan.small.q_stages;
  small.q_slot_bytes = layout.q_slot_bytes;
  small.kv_slot_bytes = layout.kv_slot_bytes;
  small.ctas = plan.small.ctas;
  small.shared_bytes = layout.total_bytes;
  return small;
}

}  // namespace

Status forward(const Problem& problem, const ForwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  if (options.dtype == DType::kF32) return Status::error("the Hopper kernels serve float16 and bfloat16");
  if (options.capability / 10 != 9) return Status::error("the Hopper kernels need compute capability 9.0");
  if (buffers.bias != nullptr) return Status::error("the Hopper kernels have no bias");
  if (const char* reason = why_not_forward(problem)) return Status::error(reason);
  const ForwardPlan plan = plan_forward(problem, options.num_sms);
  if (plan.kernel < 0) return Status::error("the Hopper kernels have no tile plan for this problem");
  const KernelShape& kernel = kForwardKernels[plan.kernel];

  ForwardParams params{};
  int32_t q_len[kMaxRank], kv_len[kMaxRank];
  int32_t largest_kv_box[kMaxRank];
  int32_t q_box[kMaxRank];  // of one load
  int64_t num_items = problem.batch * problem.heads;
  int64_t tiles_of_group = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    params.axis[a] = axis;
    params.shard[a] = {0, 0, axis.q_len};
    params.unit[a] = plan.unit[a];
    params.grid[a] = plan.grid[a];
    params.warp_keys[a] = plan.warp_keys[a];
    q_box[a] = kernel.sharing == Sharing::kWarps ? plan.unit[a] * plan.grid[a] : plan.unit[a];
    largest_kv_box[a] = std::max(plan.kv_box[a], plan.edge_box[a]);
    q_len[a] = axis.q_len;
    kv_len[a] = axis.kv_len;
    const int32_t extent = plan.unit[a] * plan.grid[a];
    const int32_t queries = (axis.q_len + axis.dilation - 1) / axis.dilation;
    const int32_t tiles = (queries + extent - 1) / extent;
    params.tiles[a] = FastDivisor(tiles);
    params.groups[a] = FastDivisor(axis.dilation);
    tiles_of_group *= tiles;
    num_items *= int64_t(tiles) * axis.dilation;
  }
  num_items /= plan.small.item_heads;
  if (num_items == 0) return Status();
  if (num_items >= int64_t(1) << 31) return Status::error("the Hopper kernels count query tiles in 31 bits");
  params.num_items = int32_t(num_items);
  const int64_t instances = num_items / tiles_of_group;
  params.schedule = Schedule(instances, plan.layers, tiles_of_group / plan.layers, plan.short_layers);
  params.halo = problem.sharded ? buffers.halo : nullptr;
  params.rank = problem.rank;
  params.heads = FastDivisor(problem.heads);
  params.item_heads = plan.small.item_heads;
  params.head_groups = FastDivisor(problem.heads / plan.small.item_heads);
  params.heads_per_kv = FastDivisor(problem.heads / problem.kv_heads);
  params.take_turns = plan.take_turns;
  params.scale = problem.scale;
  params.out = buffers.out;
  params.lse = buffers.lse;
  params.rows = make_row_problem(problem, buffers);
  if (kernel.sharing == Sharing::kWarps) params.small = small_params(plan);

  if (!make_token_layout(&params.q_layout, problem, q_len, q_box, problem.heads, problem.dim) ||
      !make_token_layout(&params.kv_layout, problem, kv_len, largest_kv_box, problem.kv_heads, problem.dim)) {
    return Status::error("the Hopper kernels cannot address this dilation");
  }
  params.edge_axis = plan.edge_axis;
  params.kv[0] = key_box(plan.kv_box, kernel, problem, params.kv_layout);
  params.kv[1] = key_box(plan.edge_box, kernel, problem, params.kv_layout);
  const CUtensorMapDataType type =
      options.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int32_t row_elements = std::min(problem.dim * plan.small.item_heads, 64);
  const CUtensorMapSwizzle swizzle = row_elements == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const auto map = [&](CUtensorMap* result, const TokenLayout& layout, const void* base, const int32_t (&lengths)[kMaxRank],
                       int32_t heads, const int32_t (&box)[kMaxRank]) {
    return make_token_map(result, layout, base, type, 2, problem.batch, lengths, heads, problem.dim, box, row_elements,
                          swizzle);
  };
  const char* failure = map(&params.q_map, params.q_layout, buffers.query, q_len, problem.heads, q_box);
  for (int shape = 0; shape < (plan.edge_axis < 0 ? 1 : kTileShapes); ++shape) {
    const int32_t (&box)[kMaxRank] = shape == 0 ? plan.kv_box : plan.edge_box;
    if (failure == nullptr)
      failure = map(&params.k_map[shape], params.kv_layout, buffers.key, kv_len, problem.kv_heads, box);
    if (failure == nullptr)
      failure = map(&params.v_map[shape], params.kv_layout, buffers.value, kv_len, problem.kv_heads, box);
  }
  if (failure == nullptr) failure = launch(plan.kernel, options.dtype, params, plan.ctas, stream);
  return failure == nullptr ? Status() : Status::error(failure);
}

}  // namespace jax_na::hopper
