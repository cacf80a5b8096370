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

using PlanKey = std::array<int64_t, 6 * kMaxRank + 4>;

PlanKey plan_key(const Problem& problem) {
  PlanKey key{};
  int i = 0;
  for (const Axis& axis : problem.axis) {
    for (const int32_t value : {axis.q_len, axis.kv_len, axis.window, axis.stride, axis.dilation, axis.causal})
      key[i++] = value;
  }
  for (const int64_t value : {problem.batch, int64_t(problem.heads), int64_t(problem.kv_heads), int64_t(problem.dim)}) {
    key[i++] = value;
  }
  return key;
}

// The search takes milliseconds: once per problem and process.
BackwardPlan backward_plan(const Problem& problem) {
  static std::mutex mutex;
  static auto* const cache = new std::map<PlanKey, BackwardPlan>;
  const PlanKey key = plan_key(problem);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = cache->find(key); found != cache->end()) return found->second;
  return cache->emplace(key, choose_backward_plan(problem)).first->second;
}

RowShape row_shape(const Problem& problem, DType dtype) {
  return {dtype, problem.dim == 128 ? 4 : problem.dim == 64 ? 3 : 2};
}

// One side's tensors, keys and values or queries and dO.
Status encode_side(const Problem& problem, DType dtype, const void* tensor0, const void* tensor1, int32_t heads, bool keys,
                   const Box& shape, TokenLayout* layout, CUtensorMap* map0, CUtensorMap* map1) {
  const int32_t box[kMaxRank] = {shape[0], shape[1], shape[2]};
  int32_t lengths[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) lengths[a] = keys ? problem.axis[a].kv_len : problem.axis[a].q_len;
  if (!make_token_layout(layout, problem, lengths, box, heads, problem.dim)) {
    return Status::error("Hopper backward: TMA cannot walk this dilation (above 8 it must divide the length of its axis)");
  }
  const CUtensorMapDataType type =
      dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle = problem.dim == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  for (const auto& [map, tensor] : {std::pair{map0, tensor0}, std::pair{map1, tensor1}}) {
    const char* failure = make_token_map(map, *layout, tensor, type, 2, problem.batch, lengths, heads, problem.dim, box,
                                         std::min(problem.dim, 64), swizzle);
    if (failure != nullptr) return Status::error(std::string("Hopper backward: ") + failure);
  }
  return {};
}

// The workspace, divided.
struct BackwardMemory {
  uint32_t* counters;  // kNumCounters
  float2* stats;
  int2* intervals;
  float* grad_norms;
  Extrema* extrema;
  void* grad_query_sums;

  BackwardMemory(void* workspace, const BackwardWorkspace& bytes) {
    char* at = static_cast<char*>(workspace);
    counters = reinterpret_cast<uint32_t*>(at);
    stats = reinterpret_cast<float2*>(at += bytes.counter_bytes);
    intervals = reinterpret_cast<int2*>(at += bytes.stats_bytes);
    grad_norms = reinterpret_cast<float*>(at += bytes.intervals_bytes);
    extrema = reinterpret_cast<Extrema*>(at += bytes.norm_bytes);
    grad_query_sums = at += bytes.extrema_bytes;
  }

  float2* no_stats() const { return reinterpret_cast<float2*>(counters + kNumCounters); }
};

int32_t num_key_tiles(const Problem& problem, const BackwardBoxes& boxes, int a) {
  const Axis& axis = problem.axis[a];
  const int32_t longest = (axis.kv_len + axis.dilation - 1) / axis.dilation;
  return (longest + boxes.keys[a] - 1) / boxes.keys[a];
}

Status launch_status(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(std::string("Hopper backward, ") + what + ": " + cudaGetErrorString(error));
}

Status launch_prepare(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options,
                      const BackwardMemory& memory, DqOutput dq, cudaStream_t stream) {
  PrepareParams params{};
  params.shape = row_shape(problem, options.dtype);
  params.out = buffers.forward.out;
  params.grad_out = buffers.grad_out;
  params.lse = buffers.forward.lse;
  params.grad_lse = buffers.grad_lse;
  params.stats = memory.stats;
  params.grad_query_sums = dq == DqOutput::kFinal ? nullptr : memory.grad_query_sums;
  params.num_rows = problem.batch * problem.q_tokens() * problem.heads;
  params.heads = FastDivisor(problem.heads);
  params.q_tokens = FastDivisor(uint32_t(problem.q_tokens()));
  params.counters = memory.counters;
  params.no_stats = memory.no_stats();
  params.rank = problem.rank;
  params.sharded = problem.sharded;
  int64_t axis_tokens = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    params.axis[a] = problem.axis[a];
    axis_tokens += problem.axis[a].kv_len;
  }
  params.halo = buffers.forward.halo;
  params.intervals = memory.intervals;
  const auto blocks = [](int64_t threads) { return uint32_t((threads + kAroundThreads - 1) / kAroundThreads); };
  params.table_block = blocks(params.num_rows << params.shape.lane_shift);
  params.extrema_block = params.table_block + blocks(axis_tokens);
  uint32_t grid = params.extrema_block;
  if (dq == DqOutput::kFixedSum) {
    params.grad_norms = memory.grad_norms;
    params.key = buffers.forward.key;
    params.value = buffers.forward.value;
    params.key_tokens = int32_t(problem.kv_tokens());
    params.kv_heads = problem.kv_heads;
    params.extrema = memory.extrema;
    // About four blocks an SM, each with more than one step to do.
    const int64_t entries = problem.batch * problem.kv_heads;
    const int64_t wanted = (4 * options.num_sms + entries - 1) / entries;
    const int64_t most = (problem.kv_tokens() << params.shape.lane_shift) / (4 * kAroundThreads);
    params.extrema_splits = FastDivisor(uint32_t(std::max<int64_t>(1, std::min(wanted, most))));
    grid += uint32_t(entries * params.extrema_splits.divisor);
    const cudaError_t error = cudaMemsetAsync(memory.extrema, 0, entries * sizeof(Extrema), stream);
    if (error != cudaSuccess) return Status::error(std::string("Hopper backward: ") + cudaGetErrorString(error));
  }
  backward_prepare_kernel<<<grid, kAroundThreads, 0, stream>>>(params);
  return launch_status("preparation");
}

Status launch_mainloop(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options,
                       const BackwardPlan& plan, const BackwardMemory& memory, DqOutput dq, cudaStream_t stream) {
  const Box& keys = plan.boxes.keys;
  BackwardParams params;
  if (Status s = encode_side(problem, options.dtype, buffers.forward.key, buffers.forward.value, problem.kv_heads, true,
                             keys, &params.key_layout, &params.key, &params.value);
      !s.ok())
    return s;
  params.num_shapes = int32_t(plan.boxes.queries.size());
  int32_t prefix_row = 0;
  for (int32_t i = 0; i < params.num_shapes; ++i) {
    QueryShape& shape = params.shape[i];
    const Box& box = plan.boxes.queries[i];
    if (Status s = encode_side(problem, options.dtype, buffers.forward.query, buffers.grad_out, problem.heads, false, box,
                               &shape.layout, &shape.query, &shape.grad_out);
        !s.ok())
      return s;
    for (int a = 0; a < kMaxRank; ++a) {
      shape.box[a] = FastDivisor(box[a]);
      shape.prefix_row[a] = prefix_row;
      prefix_row += box[a] + 1;
    }
    shape.prefix_row[kMaxRank] = prefix_row;
    shape.volume = box[0] * box[1] * box[2];
    params.least_query_volume = i == 0 ? shape.volume : std::min(params.least_query_volume, shape.volume);
  }

  int64_t num_tiles = problem.batch * problem.kv_heads;
  int32_t key_stride = 1, query_stride = 1;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    BackwardAxis& axis = params.axis[a];
    const Axis& given = problem.axis[a];
    axis.dilation = given.dilation;
    axis.key_length = given.kv_len;
    axis.query_length = given.q_len;
    axis.key_box = keys[a];
    axis.table_row = 0;
    for (int before = 0; before < a; ++before) axis.table_row += problem.axis[before].kv_len;
    axis.key_token_stride = key_stride;
    axis.query_token_stride = query_stride;
    key_stride *= given.kv_len;
    query_stride *= given.q_len;
    axis.tiles = FastDivisor(num_key_tiles(problem, plan.boxes, a));
    axis.groups = FastDivisor(given.dilation);
    num_tiles *= int64_t(axis.tiles.divisor) * given.dilation;
  }
  if (num_tiles >= (int64_t(1) << 31)) return Status::error("Hopper backward: too many tiles for one launch");
  params.kv_heads = FastDivisor(problem.kv_heads);
  params.key_box1 = FastDivisor(keys[1]);
  params.key_box2 = FastDivisor(keys[2]);
  params.key_volume = keys[0] * keys[1] * keys[2];
  params.rank = problem.rank;
  params.sharded = problem.sharded;
  params.heads = problem.heads;
  params.group_heads = problem.heads / problem.kv_heads;
  params.q_tokens = problem.q_tokens();
  params.key_tokens = problem.kv_tokens();
  params.dq = dq;
  params.scale = problem.scale;
  params.scale_log2 = float(problem.scale * kLog2e);
  params.halo = buffers.forward.halo;
  params.num_tiles = uint32_t(num_tiles);
  params.tile_counter = memory.counters + kTiles;
  params.nan_found = memory.counters + kNanFound;
  params.intervals = memory.intervals;
  params.stats = memory.stats;
  params.no_stats = memory.no_stats();
  params.grad_norms = memory.grad_norms;
  params.extrema = memory.extrema;
  params.grad_query = buffers.grad_query;
  params.grad_query_sums = memory.grad_query_sums;
  params.grad_key = buffers.grad_key;
  params.grad_value = buffers.grad_value;

  const BackwardLaunch launch{options.dtype, plan.regime, options.num_sms, &params};
  if (problem.dim == 128) return launch_backward<128>(launch, stream);
  if (problem.dim == 64) return launch_backward<64>(launch, stream);
  return launch_backward<32>(launch, stream);
}

Status launch_finish(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options,
                     const BackwardMemory& memory, DqOutput dq, cudaStream_t stream) {
  FinishParams params{};
  params.shape = row_shape(problem, options.dtype);
  params.rows = make_row_problem(problem, buffers.forward);
  params.rows.grad_out = buffers.grad_out;
  params.rows.stats = memory.stats;
  params.rows.grad_query = buffers.grad_query;
  params.rows.grad_key = buffers.grad_key;
  params.rows.grad_value = buffers.grad_value;
  params.nan_found = memory.counters + kNanFound;
  params.num_query_rows = problem.batch * problem.q_tokens() * problem.heads;
  params.num_key_rows = problem.batch * problem.kv_tokens() * problem.kv_heads;
  if (dq != DqOutput::kFinal) {
    params.sums = memory.grad_query_sums;
    params.num_chunks = params.num_query_rows << params.shape.lane_shift;
  }
  if (dq == DqOutput::kFixedSum) {
    params.grad_norms = memory.grad_norms;
    params.extrema = memory.extrema;
    params.heads = FastDivisor(problem.heads);
    params.q_tokens = FastDivisor(uint32_t(problem.q_tokens()));
    params.group_heads = FastDivisor(problem.heads / problem.kv_heads);
  }
  params.repair_block = uint32_t((params.num_chunks + kAroundThreads - 1) / kAroundThreads);
  backward_finish_kernel<<<params.repair_block + options.num_sms, kAroundThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(std::string("Hopper backward, finish: ") + cudaGetErrorString(error));
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
  if (problem.batch * problem.q_tokens() * problem.heads >= (int64_t(1) << 31)) {
    return Status::error("Hopper backward: more than 2^31 queries and heads in one call");
  }
  const BackwardPlan plan = backward_plan(problem);
  if (plan.boxes.queries.empty()) return Status::error("Hopper backward: no tile shape fits this dilation");
  // One key tile per dilation group: dq is complete in it. Then nothing is summed in memory, and the result is
  // deterministic anyway.
  bool one_tile = !problem.sharded;
  for (int a = 0; a < kMaxRank; ++a) one_tile &= num_key_tiles(problem, plan.boxes, a) == 1;
  const DqOutput dq = one_tile ? DqOutput::kFinal : options.deterministic ? DqOutput::kFixedSum : DqOutput::kSum;
  const BackwardMemory memory(buffers.forward.workspace, workspace);
  if (Status s = launch_prepare(problem, buffers, options, memory, dq, stream); !s.ok()) return s;
  if (Status s = launch_mainloop(problem, buffers, options, plan, memory, dq, stream); !s.ok()) return s;
  return launch_finish(problem, buffers, options, memory, dq, stream);
}

}  // namespace jax_na::hopper
