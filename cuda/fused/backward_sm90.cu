// Host side of the Hopper backward: what it serves, tile choice, tensor maps, the launches.
#include "backward_sm90.h"

#include <mutex>
#include <string>
#include <tuple>

#include "backward_around_sm90.cuh"
#include "backward_plan_sm90.h"

namespace jax_na::hopper {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Regimes by head dimension and pass; times measured on an H200 (see DESIGN.md, "Hopper, backward").
std::vector<BackwardRegime> backward_regimes(int32_t dim, BackwardPass pass) {
  if (pass == BackwardPass::kQueries) {
    if (dim == 128) return {{128, 64, 2000, 60, 800}};
    if (dim == 64) return {{128, 128, 2200, 90, 1500}};
    return {{64, 64, 400, 0, 500}};
  }
  if (dim == 128) return {{128, 64, 3000, 60, 800}};
  if (dim == 64) return {{128, 128, 3200, 90, 1500}, {64, 64, 1100, 30, 500}};
  return {{64, 64, 560, 0, 500}};
}

struct BackwardPlan {
  int32_t regime = 0;
  BackwardBoxes boxes;
};

using PlanKey = std::array<int64_t, 6 * kMaxRank + 5>;

PlanKey plan_key(const Problem& problem, BackwardPass pass) {
  PlanKey key{};
  int i = 0;
  for (const Axis& axis : problem.axis) {
    for (const int32_t value : {axis.q_len, axis.kv_len, axis.window, axis.stride, axis.dilation, axis.causal})
      key[i++] = value;
  }
  for (const int64_t value :
       {problem.batch, int64_t(problem.heads), int64_t(problem.kv_heads), int64_t(problem.dim), int64_t(pass)}) {
    key[i++] = value;
  }
  return key;
}

// The search takes milliseconds: once per problem and process.
BackwardPlan backward_plan(const Problem& problem, BackwardPass pass) {
  static std::mutex mutex;
  static auto* const cache = new std::map<PlanKey, BackwardPlan>;
  const PlanKey key = plan_key(problem, pass);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = cache->find(key); found != cache->end()) return found->second;
  BackwardPlan plan;
  const auto regimes = backward_regimes(problem.dim, pass);
  for (size_t i = 0; i < regimes.size(); ++i) {
    const BackwardBoxes boxes = pass == BackwardPass::kKeys
                                    ? choose_backward_boxes<BackwardPass::kKeys>(problem, regimes[i])
                                    : choose_backward_boxes<BackwardPass::kQueries>(problem, regimes[i]);
    if (boxes.found && (!plan.boxes.found || boxes.cost_ns < plan.boxes.cost_ns)) plan = {int32_t(i), boxes};
  }
  return cache->emplace(key, plan).first->second;
}

// Column bits of the inner box: see BackwardParams::prefix.
void fill_prefix(BackwardParams* params, const std::array<int32_t, kMaxRank>& box) {
  int32_t row = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    params->axis[a].prefix_row = row;
    for (int32_t t = 0; t <= box[a]; ++t, ++row) {
      uint32_t bits[4] = {0, 0, 0, 0};
      for (int32_t column = 0; column < params->inner_volume; ++column) {
        const int32_t coordinates[kMaxRank] = {column / (box[1] * box[2]), column / box[2] % box[1], column % box[2]};
        if (coordinates[a] < t) bits[column % 8 / 2] |= 1u << (column / 8 * 2 + column % 2);
      }
      params->prefix[row] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
}

struct Side {
  const void* tensor0;
  const void* tensor1;
  int32_t heads;
  int32_t lengths[kMaxRank];
};

Status encode_side(const Problem& problem, DType dtype, const Side& side, const std::array<int32_t, kMaxRank>& shape,
                   TokenLayout* layout, CUtensorMap* map0, CUtensorMap* map1) {
  const int32_t box[kMaxRank] = {shape[0], shape[1], shape[2]};
  if (!make_token_layout(layout, problem, side.lengths, box, side.heads, problem.dim)) {
    return Status::error("Hopper backward: TMA cannot walk this dilation (above 8 it must divide the length of its axis)");
  }
  const CUtensorMapDataType type =
      dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle = problem.dim == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  for (const auto& [map, tensor] : {std::pair{map0, side.tensor0}, std::pair{map1, side.tensor1}}) {
    const char* failure = make_token_map(map, *layout, tensor, type, 2, problem.batch, side.lengths, side.heads,
                                         problem.dim, box, std::min(problem.dim, 64), swizzle);
    if (failure != nullptr) return Status::error(std::string("Hopper backward: ") + failure);
  }
  return {};
}

// What the passes share.
struct BackwardMemory {
  uint32_t* counters;  // kNumCounters
  float2* stats;
  int2* queries_of_keys;
  int2* keys_of_queries;
  float* grad_query_f32;  // or null
};

int64_t num_outer_tiles(const Problem& problem, BackwardPass pass, const BackwardBoxes& boxes, int a) {
  const Axis& axis = problem.axis[a];
  const int32_t length = pass == BackwardPass::kKeys ? axis.kv_len : axis.q_len;
  const int32_t longest = (length + axis.dilation - 1) / axis.dilation;
  return (longest + boxes.outer[a] - 1) / boxes.outer[a];
}

Status run_pass(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options, BackwardPass pass,
                const BackwardPlan& plan, const BackwardMemory& memory, DqOutput dq, cudaStream_t stream) {
  const bool keys_pass = pass == BackwardPass::kKeys;
  const auto &outer = plan.boxes.outer, &inner = plan.boxes.inner;

  Side queries{buffers.forward.query, buffers.grad_out, problem.heads, {}};
  Side keys{buffers.forward.key, buffers.forward.value, problem.kv_heads, {}};
  for (int a = 0; a < kMaxRank; ++a) {
    queries.lengths[a] = problem.axis[a].q_len;
    keys.lengths[a] = problem.axis[a].kv_len;
  }
  const Side &outer_side = keys_pass ? keys : queries, &inner_side = keys_pass ? queries : keys;

  BackwardParams params;
  if (Status s =
          encode_side(problem, options.dtype, outer_side, outer, &params.outer_layout, &params.outer0, &params.outer1);
      !s.ok())
    return s;
  if (Status s =
          encode_side(problem, options.dtype, inner_side, inner, &params.inner_layout, &params.inner0, &params.inner1);
      !s.ok())
    return s;

  int64_t num_tiles = problem.batch * outer_side.heads;
  int32_t outer_stride = 1, inner_stride = 1;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    BackwardAxis& axis = params.axis[a];
    const int32_t dilation = problem.axis[a].dilation;
    axis.dilation = dilation;
    axis.outer_length = outer_side.lengths[a];
    axis.inner_length = inner_side.lengths[a];
    axis.outer_box = outer[a];
    axis.inner_box = inner[a];
    axis.table_row = 0;
    for (int before = 0; before < a; ++before) axis.table_row += outer_side.lengths[before];
    axis.outer_token_stride = outer_stride;
    axis.inner_token_stride = inner_stride;
    outer_stride *= outer_side.lengths[a];
    inner_stride *= inner_side.lengths[a];
    axis.inner_box_divisor = FastDivisor(inner[a]);
    axis.tiles = FastDivisor(uint32_t(num_outer_tiles(problem, pass, plan.boxes, a)));
    axis.groups = FastDivisor(dilation);
    num_tiles *= int64_t(axis.tiles.divisor) * dilation;
  }
  if (num_tiles >= (int64_t(1) << 31)) return Status::error("Hopper backward: too many tiles for one launch");
  params.outer_heads = FastDivisor(outer_side.heads);
  params.outer_box1 = FastDivisor(outer[1]);
  params.outer_box2 = FastDivisor(outer[2]);
  params.inner_box1 = FastDivisor(inner[1]);
  params.inner_box2 = FastDivisor(inner[2]);
  params.outer_volume = outer[0] * outer[1] * outer[2];
  params.inner_volume = inner[0] * inner[1] * inner[2];
  params.rank = problem.rank;
  params.sharded = problem.sharded;
  params.heads = problem.heads;
  params.group_heads = problem.heads / problem.kv_heads;
  params.q_tokens = problem.q_tokens();
  params.outer_tokens = keys_pass ? problem.kv_tokens() : problem.q_tokens();
  params.dq = dq;
  params.scale = problem.scale;
  params.scale_log2 = float(problem.scale * kLog2e);
  params.halo = buffers.forward.halo;
  params.num_tiles = uint32_t(num_tiles);
  params.tile_counter = memory.counters + (keys_pass ? kKeyTiles : kQueryTiles);
  params.nan_found = memory.counters + kNanFound;
  params.intervals = keys_pass ? memory.queries_of_keys : memory.keys_of_queries;
  params.stats = memory.stats;
  params.grad_query = buffers.grad_query;
  params.grad_query_f32 = memory.grad_query_f32;
  params.grad_outer0 = keys_pass ? buffers.grad_key : buffers.grad_query;
  params.grad_outer1 = keys_pass ? buffers.grad_value : nullptr;
  fill_prefix(&params, inner);

  const BackwardLaunch launch{pass, options.dtype, plan.regime, options.num_sms, &params};
  if (problem.dim == 128) return launch_backward<128>(launch, stream);
  if (problem.dim == 64) return launch_backward<64>(launch, stream);
  return launch_backward<32>(launch, stream);
}

template <typename T>
void launch_prepare(PrepareParams& params, int32_t dim, cudaStream_t stream) {
  int64_t q_rows = 0, kv_rows = 0;
  for (const Axis& axis : params.axis) q_rows += axis.q_len, kv_rows += axis.kv_len;
  const auto blocks = [&](int64_t lanes) {
    params.table_block = uint32_t((params.num_rows * lanes + kAroundThreads - 1) / kAroundThreads);
    return dim3(params.table_block + uint32_t((std::max(q_rows, kv_rows) + kAroundThreads - 1) / kAroundThreads));
  };
  if (dim == 128) {
    backward_prepare_kernel<T, 128><<<blocks(16), kAroundThreads, 0, stream>>>(params);
  } else if (dim == 64) {
    backward_prepare_kernel<T, 64><<<blocks(8), kAroundThreads, 0, stream>>>(params);
  } else {
    backward_prepare_kernel<T, 32><<<blocks(4), kAroundThreads, 0, stream>>>(params);
  }
}

Status launch_status(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(std::string("Hopper backward, ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

Status backward(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  if (options.dtype != DType::kF16 && options.dtype != DType::kBF16)
    return Status::error("Hopper backward: fp16 and bf16 only");
  if (problem.dim != problem.dim_v || (problem.dim != 32 && problem.dim != 64 && problem.dim != 128)) {
    return Status::error("Hopper backward: head dimensions 32, 64 and 128 only, equal for keys and values");
  }
  if (problem.num_extra > 0 || buffers.forward.bias != nullptr) {
    return Status::error("Hopper backward: no additional keys, no bias");
  }
  if (problem.batch == 0) return {};
  const BackwardWorkspace workspace = backward_workspace(problem, options.deterministic);
  if (buffers.forward.workspace_bytes < workspace.total()) {
    return Status::error("Hopper backward: the workspace is smaller than backward_workspace(problem).total()");
  }
  const int64_t num_rows = problem.batch * problem.q_tokens() * problem.heads;
  if (num_rows >= (int64_t(1) << 31) || problem.q_tokens() >= (int64_t(1) << 31)) {
    return Status::error("Hopper backward: more than 2^31 queries and heads in one call");
  }
  // One key tile per dilation group: dq is complete in it. Then nothing is summed in memory, and the result is
  // deterministic anyway.
  const BackwardPlan plan = backward_plan(problem, BackwardPass::kKeys);
  if (!plan.boxes.found) return Status::error("Hopper backward: no tile shape fits this dilation");
  bool one_tile = !problem.sharded;
  for (int a = 0; a < kMaxRank; ++a) one_tile &= num_outer_tiles(problem, BackwardPass::kKeys, plan.boxes, a) == 1;
  const DqOutput dq = one_tile ? DqOutput::kFinal : options.deterministic ? DqOutput::kNone : DqOutput::kSum;

  char* at = static_cast<char*>(buffers.forward.workspace);
  BackwardMemory memory{};
  memory.counters = reinterpret_cast<uint32_t*>(at);
  at += workspace.counter_bytes;
  memory.stats = reinterpret_cast<float2*>(at);
  at += workspace.stats_bytes;
  memory.queries_of_keys = reinterpret_cast<int2*>(at);
  memory.keys_of_queries = memory.queries_of_keys;
  for (const Axis& axis : problem.axis) memory.keys_of_queries += axis.kv_len;
  at += workspace.intervals_bytes;
  if (dq == DqOutput::kSum) memory.grad_query_f32 = reinterpret_cast<float*>(at);

  const bool half = options.dtype == DType::kF16;
  PrepareParams prepare{};
  prepare.out = buffers.forward.out;
  prepare.grad_out = buffers.grad_out;
  prepare.lse = buffers.forward.lse;
  prepare.grad_lse = buffers.grad_lse;
  prepare.stats = memory.stats;
  prepare.grad_query_f32 = memory.grad_query_f32;
  prepare.counters = memory.counters;
  prepare.num_rows = num_rows;
  prepare.heads = FastDivisor(problem.heads);
  prepare.q_tokens = FastDivisor(uint32_t(problem.q_tokens()));
  prepare.rank = problem.rank;
  prepare.sharded = problem.sharded;
  for (int a = 0; a < kMaxRank; ++a) prepare.axis[a] = problem.axis[a];
  prepare.halo = buffers.forward.halo;
  prepare.queries_of_keys = memory.queries_of_keys;
  prepare.keys_of_queries = dq == DqOutput::kNone ? memory.keys_of_queries : nullptr;
  half ? launch_prepare<__half>(prepare, problem.dim, stream) : launch_prepare<__nv_bfloat16>(prepare, problem.dim, stream);
  if (Status s = launch_status("preparation"); !s.ok()) return s;

  if (Status s = run_pass(problem, buffers, options, BackwardPass::kKeys, plan, memory, dq, stream); !s.ok()) return s;
  if (dq == DqOutput::kNone) {
    const BackwardPlan queries_plan = backward_plan(problem, BackwardPass::kQueries);
    if (!queries_plan.boxes.found) return Status::error("Hopper backward: no tile shape fits this dilation");
    const Status s = run_pass(problem, buffers, options, BackwardPass::kQueries, queries_plan, memory, dq, stream);
    if (!s.ok()) return s;
  }

  FinishParams finish{};
  finish.grad_query_f32 = memory.grad_query_f32;
  finish.rows = make_row_problem(problem, buffers.forward);
  finish.rows.grad_out = buffers.grad_out;
  finish.rows.stats = memory.stats;
  finish.rows.grad_query = buffers.grad_query;
  finish.rows.grad_key = buffers.grad_key;
  finish.rows.grad_value = buffers.grad_value;
  finish.nan_found = memory.counters + kNanFound;
  finish.num_chunks = dq == DqOutput::kSum ? num_rows * problem.dim / kChannelsPerThread : 0;
  finish.repair_block = uint32_t((finish.num_chunks + kAroundThreads - 1) / kAroundThreads);
  finish.num_query_rows = num_rows;
  finish.num_key_rows = problem.batch * problem.kv_tokens() * problem.kv_heads;
  const dim3 blocks(finish.repair_block + uint32_t(options.num_sms));
  if (half) {
    backward_finish_kernel<__half><<<blocks, kAroundThreads, 0, stream>>>(finish);
  } else {
    backward_finish_kernel<__nv_bfloat16><<<blocks, kAroundThreads, 0, stream>>>(finish);
  }
  return launch_status("finish");
}

}  // namespace jax_na::hopper
