// fused::forward and fused::backward: tile choice, workspace, launches.
//
// Environment, for experiments (read once per shape): JAX_NA_EXPLAIN=1 prints the choice to stderr; JAX_NA_FUSED_TILE sets
// it, e.g. "forward=128:8x16x1,grad_query=64:8x8x1,grad_key_value=64:8x8x1" (rows of the kernel, then the box, three axes).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../common/families.h"
#include "config_sm80.h"
#include "launch_sm80.h"
#include "tile_choice_sm80.h"
#include "workspace_sm80.h"

namespace jax_na::fused {
namespace {

// out[i] = sum over splits of partial[split][i], in order.
template <class E>
__global__ void sum_bias_kernel(const float* partial, typename E::Storage* out, int64_t size, int splits) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
  out[i] = E::from_float(sum);
}

// Rows of dim + dim_v elements to two tensors.
template <class E>
__global__ void sum_extra_kernel(const float* partial, typename E::Storage* grad_key, typename E::Storage* grad_value,
                                 int64_t rows, int dim, int dim_v, int splits) {
  const int64_t size = rows * (dim + dim_v);
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
  const int64_t row = i / (dim + dim_v);
  const int at = static_cast<int>(i % (dim + dim_v));
  if (at < dim) {
    grad_key[row * dim + at] = E::from_float(sum);
  } else {
    grad_value[row * dim_v + at - dim] = E::from_float(sum);
  }
}

constexpr int kSumThreads = 128;

// The gradient of one bias, `size` entries, from its partial sums.
template <class E>
cudaError_t sum_bias(const Params& p, void* grad_bias, int64_t size, int splits, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((size + kSumThreads - 1) / kSumThreads);
  sum_bias_kernel<E>
      <<<blocks, kSumThreads, 0, stream>>>(p.bias_partial, static_cast<typename E::Storage*>(grad_bias), size, splits);
  return cudaGetLastError();
}

// The gradients of the additional keys and values from their partial sums.
template <class E>
cudaError_t sum_extra(const Params& p, cudaStream_t stream) {
  using T = typename E::Storage;
  const Problem& problem = p.problem;
  const int64_t rows = problem.batch * problem.num_extra * problem.kv_heads;
  const int64_t size = rows * (problem.dim + problem.dim_v);
  const unsigned blocks = static_cast<unsigned>((size + kSumThreads - 1) / kSumThreads);
  sum_extra_kernel<E><<<blocks, kSumThreads, 0, stream>>>(p.extra_partial, static_cast<T*>(p.backward.grad_extra_key),
                                                          static_cast<T*>(p.backward.grad_extra_value), rows, problem.dim,
                                                          problem.dim_v, p.splits);
  return cudaGetLastError();
}

const LaunchTable& launches(const CallOptions& options, int bucket) {
  static const LaunchTable* const tables[4][4] = {
      {&kLaunch_f16_32, &kLaunch_f16_64, &kLaunch_f16_128, &kLaunch_f16_256},
      {&kLaunch_bf16_32, &kLaunch_bf16_64, &kLaunch_bf16_128, &kLaunch_bf16_256},
      {&kLaunch_tf32_32, &kLaunch_tf32_64, &kLaunch_tf32_128, &kLaunch_tf32_256},
      {&kLaunch_f32_32, &kLaunch_f32_64, &kLaunch_f32_128, &kLaunch_f32_256}};
  const int element = options.dtype == DType::kF16               ? 0
                      : options.dtype == DType::kBF16            ? 1
                      : options.precision == Precision::kDefault ? 2
                                                                 : 3;
  return *tables[element][bucket == 32 ? 0 : bucket == 64 ? 1 : bucket == 128 ? 2 : 3];
}

int head_dim_bucket(const Problem& problem) {
  const int dim = problem.dim > problem.dim_v ? problem.dim : problem.dim_v;
  return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

enum class Pass { kForward, kGradQuery, kGradKeyValue };
constexpr const char* kPassNames[] = {"forward", "grad_query", "grad_key_value"};

struct Choice {
  TileChoice tile;
  bool large = false;
};

// A row of "pass=rows:t0xt1xt2" in JAX_NA_FUSED_TILE, if there is one.
bool read_override(Pass pass, const Problem& problem, int* rows, TileChoice* tile) {
  const char* text = std::getenv("JAX_NA_FUSED_TILE");
  if (text == nullptr) return false;
  const std::string key = std::string(kPassNames[static_cast<int>(pass)]) + "=";
  const char* at = std::strstr(text, key.c_str());
  if (at == nullptr) return false;
  if (std::sscanf(at + key.size(), "%d:%dx%dx%d", rows, &tile->box[0], &tile->box[1], &tile->box[2]) != 4) return false;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t len = pass == Pass::kGradKeyValue ? axis.kv_len : axis.q_len;
    const int32_t longest = (len + axis.dilation - 1) / axis.dilation;
    tile->tiles[a] = (longest + tile->box[a] - 1) / tile->box[a];
  }
  return tile->box[0] >= 1 && tile->box[1] >= 1 && tile->box[2] >= 1 &&
         int64_t(tile->box[0]) * tile->box[1] * tile->box[2] <= *rows;
}

Shape shape_of(Pass pass, bool is_16_bit, int bucket, bool large) {
  return pass == Pass::kForward     ? forward_shape(is_16_bit, bucket, large)
         : pass == Pass::kGradQuery ? grad_query_shape(is_16_bit, bucket, large)
                                    : grad_key_value_shape(is_16_bit, bucket, large);
}

Choice make_choice(Pass pass, const Problem& problem, bool is_16_bit, int bucket) {
  const bool rows_are_keys = pass == Pass::kGradKeyValue;
  const Shape shape = shape_of(pass, is_16_bit, bucket, false);
  Choice choice;
  const auto choose_for = [&](const Shape& s) {
    return choose_tile(problem, rows_are_keys, s.rows(), s.cols, chunk_cost(s, pass != Pass::kForward), tile_cost(s));
  };
  choice.tile = choose_for(shape);
  const bool may_be_large =
      pass == Pass::kForward ? has_large_forward(is_16_bit, bucket) : has_large_backward(is_16_bit, bucket);
  const Shape large_shape = shape_of(pass, is_16_bit, bucket, may_be_large);
  if (may_be_large) {
    const TileChoice tile = choose_for(large_shape);
    if (tile.cost < choice.tile.cost) {
      choice.tile = tile;
      choice.large = true;
    }
  }
  int rows = 0;
  TileChoice forced;
  if (read_override(pass, problem, &rows, &forced)) {
    const int large_rows = may_be_large ? large_shape.rows() : 0;
    if (rows == shape.rows() || rows == large_rows) {
      choice.tile = forced;
      choice.large = rows == large_rows && rows != shape.rows();
    }
  }
  const char* explain = std::getenv("JAX_NA_EXPLAIN");
  if (explain != nullptr && explain[0] == '1') {
    const Shape used = choice.large ? large_shape : shape;
    std::fprintf(stderr, "jax_na fused %s: head dim %d, %d rows x %d columns, box %dx%dx%d, union %.0f of window %lld\n",
                 kPassNames[static_cast<int>(pass)], bucket, used.rows(), used.cols, choice.tile.box[0], choice.tile.box[1],
                 choice.tile.box[2], choice.tile.columns, static_cast<long long>(problem.window_volume()));
  }
  return choice;
}

// The choice depends on the shape alone and is made once.
Choice choose(Pass pass, const Problem& problem, bool is_16_bit, int bucket) {
  std::vector<int32_t> key{static_cast<int32_t>(pass), is_16_bit, bucket};
  for (const Axis& axis : problem.axis) {
    key.insert(key.end(), {axis.q_len, axis.kv_len, axis.window, axis.stride, axis.dilation, axis.causal});
  }
  static std::mutex mutex;
  static auto* const cache = new std::map<std::vector<int32_t>, Choice>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache->find(key);
  if (found != cache->end()) return found->second;
  return cache->emplace(std::move(key), make_choice(pass, problem, is_16_bit, bucket)).first->second;
}

Status check(const Problem& problem) {
  if (problem.dim > 256 || problem.dim_v > 256 || problem.dim % 8 != 0 || problem.dim_v % 8 != 0) {
    return Status::error("fused kernels: head dimensions " + std::to_string(problem.dim) + " and " +
                         std::to_string(problem.dim_v) + ", need multiples of 8 up to 256");
  }
  return Status{};
}

Status cuda_status(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status{};
  return Status::error(std::string("fused ") + what + ": " + cudaGetErrorString(error));
}

Params base_params(const Problem& problem, const ForwardBuffers& buffers) {
  Params p;
  p.problem = problem;
  p.forward = buffers;
  p.scale_log2 = problem.scale * 1.4426950408889634f;
  p.q_tokens = problem.q_tokens();
  p.kv_tokens = problem.kv_tokens();
  return p;
}

// Tiles of all batch entries, heads and dilation groups; an error where a grid cannot hold them.
Status set_tiles(const TileChoice& tile, const Problem& problem, bool rows_are_keys, int64_t batch, Params* p) {
  const int32_t heads = rows_are_keys ? problem.kv_heads : problem.heads;
  int64_t work = batch * heads;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& from = problem.axis[a];
    AxisParams& axis = p->axis[a];
    axis.box = tile.box[a];
    axis.window = from.window;
    axis.stride = from.stride;
    axis.dilation = from.dilation;
    axis.causal = from.causal;
    axis.row_len = rows_are_keys ? from.kv_len : from.q_len;
    axis.col_len = rows_are_keys ? from.q_len : from.kv_len;
    axis.row_tokens = axis.col_tokens = axis.bias_step = 1;
    for (int b = a + 1; b < kMaxRank; ++b) {
      axis.row_tokens *= rows_are_keys ? problem.axis[b].kv_len : problem.axis[b].q_len;
      axis.col_tokens *= rows_are_keys ? problem.axis[b].q_len : problem.axis[b].kv_len;
      axis.bias_step *= 2 * problem.axis[b].window - 1;
    }
    axis.group_len = from.q_len / from.dilation;
    axis.longer_groups = from.q_len % from.dilation;
    p->box_inverse[a] = (65536 + tile.box[a] - 1) / tile.box[a];
    p->tiles[a] = FastDivisor(tile.tiles[a]);
    p->groups[a] = FastDivisor(problem.axis[a].dilation);
    work *= int64_t(tile.tiles[a]) * problem.axis[a].dilation;
  }
  if (work > INT32_MAX) return Status::error("fused kernels: " + std::to_string(work) + " tiles exceed a grid");
  p->row_heads = FastDivisor(heads);
  p->num_work = static_cast<uint32_t>(work);
  return Status{};
}

}  // namespace

Status forward(const Problem& problem, const ForwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  if (Status status = check(problem); !status.ok()) return status;
  if (problem.batch == 0 || problem.q_tokens() == 0) return Status{};
  const int bucket = head_dim_bucket(problem);
  const Choice choice = choose(Pass::kForward, problem, options.dtype != DType::kF32, bucket);
  Params p = base_params(problem, buffers);
  if (Status status = set_tiles(choice.tile, problem, false, problem.batch, &p); !status.ok()) return status;
  return cuda_status("forward", launches(options, bucket).forward(p, choice.large, options.device, stream));
}

Status backward(const Problem& problem, const BackwardBuffers& buffers, const CallOptions& options, cudaStream_t stream) {
  if (Status status = check(problem); !status.ok()) return status;
  if (problem.batch == 0) return Status{};
  const Workspace workspace = backward_workspace(problem, buffers.grad_bias != nullptr);
  if (buffers.forward.workspace_bytes < workspace.bytes) {
    return Status::error("fused backward: " + std::to_string(buffers.forward.workspace_bytes) +
                         " bytes of workspace, needs " + std::to_string(workspace.bytes));
  }
  const int bucket = head_dim_bucket(problem);
  const bool is_16_bit = options.dtype != DType::kF32;
  const LaunchTable& launch = launches(options, bucket);
  const auto add_bias = options.dtype == DType::kF16    ? sum_bias<F16>
                        : options.dtype == DType::kBF16 ? sum_bias<BF16>
                                                        : sum_bias<F32>;
  const auto add_extra = options.dtype == DType::kF16    ? sum_extra<F16>
                         : options.dtype == DType::kBF16 ? sum_extra<BF16>
                                                         : sum_extra<F32>;
  char* base = static_cast<char*>(buffers.forward.workspace);

  Params p = base_params(problem, buffers.forward);
  p.backward = buffers;
  p.stats = reinterpret_cast<float2*>(base + workspace.stats);

  const Choice grad_query = choose(Pass::kGradQuery, problem, is_16_bit, bucket);
  if (buffers.grad_bias == nullptr) {
    if (Status status = set_tiles(grad_query.tile, problem, false, problem.batch, &p); !status.ok()) return status;
    if (Status s = cuda_status("grad_query", launch.grad_query(p, p.num_work, grad_query.large, options.device, stream));
        !s.ok())
      return s;
  } else {
    // One launch per bias: a block keeps its head, and so its partial sums.
    Params q = p;
    const int64_t batch = problem.batch / problem.bias_batch;
    q.heads_first = 1;
    q.bias_partial = reinterpret_cast<float*>(base + workspace.bias_partial);
    q.bias_entries = static_cast<int32_t>(workspace.bias_entries);
    if (Status status = set_tiles(grad_query.tile, problem, false, batch, &q); !status.ok()) return status;
    const int64_t size = workspace.bias_entries * problem.heads;
    const size_t element_bytes = is_16_bit ? 2 : 4;
    for (int64_t bias = 0; bias < problem.bias_batch; ++bias) {
      q.batch_begin = bias * batch;
      const uint32_t blocks = static_cast<uint32_t>(problem.heads * workspace.bias_splits);
      if (Status s = cuda_status("grad_query", launch.grad_query(q, blocks, grad_query.large, options.device, stream));
          !s.ok())
        return s;
      char* grad_bias = static_cast<char*>(buffers.grad_bias) + bias * size * element_bytes;
      if (Status s = cuda_status("grad_bias", add_bias(q, grad_bias, size, workspace.bias_splits, stream)); !s.ok()) {
        return s;
      }
    }
  }

  const Choice grad_key_value = choose(Pass::kGradKeyValue, problem, is_16_bit, bucket);
  if (Status status = set_tiles(grad_key_value.tile, problem, true, problem.batch, &p); !status.ok()) {
    return status;
  }
  if (Status s = cuda_status("grad_key_value", launch.grad_key_value(p, grad_key_value.large, options.device, stream));
      !s.ok())
    return s;

  if (problem.num_extra > 0) {
    Params e = p;
    const int rows = grad_key_value_shape(is_16_bit, bucket, false).rows();
    e.extra_rows = 1;
    e.splits = workspace.extra_splits;
    e.extra_partial = reinterpret_cast<float*>(base + workspace.extra_partial);
    TileChoice tile;
    tile.box[2] = rows;
    tile.tiles[2] = (problem.num_extra + rows - 1) / rows;
    if (Status status = set_tiles(tile, problem, true, problem.batch, &e); !status.ok()) return status;
    for (int a = 0; a < kMaxRank; ++a) e.groups[a] = FastDivisor(a == 2 ? e.splits : 1);
    const int64_t work = problem.batch * problem.kv_heads * tile.tiles[2] * e.splits;
    if (work > INT32_MAX) return Status::error("fused kernels: " + std::to_string(work) + " tiles exceed a grid");
    e.num_work = static_cast<uint32_t>(work);
    if (Status s = cuda_status("grad_extra", launch.grad_key_value(e, false, options.device, stream)); !s.ok()) return s;
    if (Status s = cuda_status("grad_extra", add_extra(e, stream)); !s.ok()) return s;
  }
  return Status{};
}

}  // namespace jax_na::fused
