// Handlers: from XLA's buffers and attributes to Problem, buffers and CallOptions, then to the family that serves.
//
// Every argument was checked in Python at trace time; what is checked here guards the contract between the two sides (and
// programs that were exported by another version), and says so with numbers. A handler never allocates, synchronizes or
// prints: it is safe under CUDA graph capture.
#include "ffi/handlers.h"

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "ffi/attributes.h"
#include "ffi/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_na {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(std::string text) { return ffi::Error::InvalidArgument("jax_na: " + std::move(text)); }

std::string to_string(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

int64_t product(ffi::AnyBuffer::Dimensions dims, size_t begin, size_t end) {
  int64_t result = 1;
  for (size_t i = begin; i < end; ++i) result *= dims[i];
  return result;
}

// Hands out the operands or the results of a call in order.
template <typename Remaining>
class Reader {
 public:
  explicit Reader(const Remaining& remaining) {
    for (size_t i = 0; i < remaining.size(); ++i) {
      auto value = remaining.template get<ffi::AnyBuffer>(i);
      if (value.has_error()) return;  // fewer than the attributes explain: reported by the count
      if constexpr (std::is_same_v<Remaining, ffi::RemainingRets>) {
        buffers_.push_back(**value);
      } else {
        buffers_.push_back(*value);
      }
    }
  }

  size_t size() const { return buffers_.size(); }
  ffi::AnyBuffer next() { return buffers_[index_++]; }
  std::optional<ffi::AnyBuffer> next_if(bool present) { return present ? std::optional(next()) : std::nullopt; }

 private:
  std::vector<ffi::AnyBuffer> buffers_;
  size_t index_ = 0;
};

using Args = Reader<ffi::RemainingArgs>;
using Rets = Reader<ffi::RemainingRets>;

void* data(const std::optional<ffi::AnyBuffer>& buffer) { return buffer ? buffer->untyped_data() : nullptr; }

// The operands that forward and backward begin with; backward's results begin with their gradients.
struct Operands {
  ffi::AnyBuffer query, key, value;
  std::optional<ffi::AnyBuffer> bias, extra_key, extra_value;

  template <typename Source>
  Operands(Source& args, const Attributes& attributes)
      : query(args.next()),
        key(args.next()),
        value(args.next()),
        bias(args.next_if(attributes.has_bias)),
        extra_key(args.next_if(attributes.has_extra)),
        extra_value(args.next_if(attributes.has_extra)) {}

  static size_t count(const Attributes& attributes) { return 3 + attributes.has_bias + 2 * attributes.has_extra; }
};

ffi::Error make_problem(const Attributes& attributes, const Operands& operands, Problem* problem) {
  const size_t rank = attributes.window.size();
  if (rank < 1 || rank > kMaxRank || attributes.stride.size() != rank || attributes.dilation.size() != rank ||
      attributes.is_causal.size() != rank) {
    return invalid("window, stride, dilation and is_causal need one entry for each of 1 to 3 axes, got " +
                   std::to_string(rank) + " windows");
  }
  const auto query = operands.query.dimensions(), key = operands.key.dimensions(), value = operands.value.dimensions();
  if (query.size() < rank + 2 || key.size() != query.size() || value.size() != query.size()) {
    return invalid("query " + to_string(query) + ", key " + to_string(key) + ", value " + to_string(value) +
                   ": expected [..., " + std::to_string(rank) + " spatial axes, heads, head_dim]");
  }
  const size_t lead = query.size() - rank - 2;
  for (const auto& dims : {query, key, value}) {
    for (size_t i = lead; i < dims.size(); ++i) {
      if (dims[i] > std::numeric_limits<int32_t>::max())
        return invalid("an axis of " + to_string(dims) + " exceeds 2^31 - 1");
    }
  }
  problem->rank = static_cast<int32_t>(rank);
  problem->batch = product(query, 0, lead);
  for (size_t i = 0; i < rank; ++i) {
    Axis& axis = problem->axis[kMaxRank - rank + i];
    axis.q_len = static_cast<int32_t>(query[lead + i]);
    axis.kv_len = static_cast<int32_t>(key[lead + i]);
    axis.window = static_cast<int32_t>(attributes.window[i]);
    axis.stride = static_cast<int32_t>(attributes.stride[i]);
    axis.dilation = static_cast<int32_t>(attributes.dilation[i]);
    axis.causal = attributes.is_causal[i] != 0;
    if (axis.kv_len != value[lead + i] || axis.window < 1 || axis.stride < 1 || axis.stride > axis.window ||
        axis.dilation < 1 || (!attributes.sharded && int64_t(axis.window) * axis.dilation > axis.q_len) ||
        (!attributes.sharded && axis.kv_len != axis.q_len)) {
      return invalid("spatial axis " + std::to_string(i) + " of query " + to_string(query) + ", key " + to_string(key) +
                     " does not allow window " + std::to_string(axis.window) + ", stride " + std::to_string(axis.stride) +
                     ", dilation " + std::to_string(axis.dilation));
    }
  }
  problem->heads = static_cast<int32_t>(query[lead + rank]);
  problem->dim = static_cast<int32_t>(query[lead + rank + 1]);
  problem->kv_heads = static_cast<int32_t>(key[lead + rank]);
  problem->dim_v = static_cast<int32_t>(value[lead + rank + 1]);
  if (problem->kv_heads < 1 || problem->heads % problem->kv_heads != 0 || value[lead + rank] != problem->kv_heads ||
      key[lead + rank + 1] != problem->dim || product(key, 0, lead) != problem->batch ||
      product(value, 0, lead) != problem->batch) {
    return invalid("query " + to_string(query) + ", key " + to_string(key) + " and value " + to_string(value) +
                   " do not belong together");
  }
  if (operands.bias) {
    const auto bias = operands.bias->dimensions();
    const size_t bias_lead = bias.size() - rank - 1;
    bool matches = bias.size() >= rank + 1 && bias[bias_lead] == problem->heads;
    for (size_t i = 0; matches && i < rank; ++i) matches = bias[bias_lead + 1 + i] == 2 * attributes.window[i] - 1;
    problem->bias_batch = matches ? product(bias, 0, bias_lead) : 0;
    if (!matches || (problem->batch > 0 && (problem->bias_batch < 1 || problem->batch % problem->bias_batch != 0))) {
      return invalid("bias " + to_string(bias) + " does not belong to query " + to_string(query));
    }
  }
  if (operands.extra_key) {
    if (operands.extra_key->dimensions().size() != lead + 3) {
      return invalid("extra_key " + to_string(operands.extra_key->dimensions()) +
                     ": expected [..., tokens, heads, head_dim]");
    }
    problem->num_extra = static_cast<int32_t>(operands.extra_key->dimensions()[lead]);
  }
  problem->sharded = attributes.sharded;
  problem->scale = static_cast<float>(attributes.scale);
  return ffi::Error::Success();
}

ffi::Error make_options(const Attributes& attributes, const ffi::AnyBuffer& query, const Device& device,
                        CallOptions* options) {
  switch (query.element_type()) {
    case ffi::F16: options->dtype = DType::kF16; break;
    case ffi::BF16: options->dtype = DType::kBF16; break;
    case ffi::F32: options->dtype = DType::kF32; break;
    default:
      return invalid("element type " + std::to_string(static_cast<int>(query.element_type())) +
                     " has no CUDA kernel (float16, bfloat16, float32 have)");
  }
  options->precision = static_cast<Precision>(attributes.precision);
  options->deterministic = attributes.deterministic;
  options->device = device.ordinal;
  options->capability = device.capability;
  options->num_sms = device.num_sms;
  return ffi::Error::Success();
}

// Runs `call(family)` on the device of the call; turns its status and a failed launch into an error.
template <typename Call>
ffi::Error run(std::string_view candidates, const Device& device, const char* pass, Call call) {
  Status status;
  const Family* family = choose_family(candidates, device.capability, &status);
  if (family == nullptr) return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_na: " + status.message);
  const DeviceGuard guard(device.ordinal);
  if (!guard.status().ok()) return ffi::Error::Internal("jax_na: " + guard.status().message);
  (void)cudaGetLastError();  // an earlier, foreign error is not this call's
  status = call(*family);
  const cudaError_t error = cudaGetLastError();
  if (status.ok() && error != cudaSuccess) {
    status =
        Status::error(std::string("launch failed: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
  }
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_na: ") + pass + " of family " + family->name + ", device " +
                              std::to_string(device.ordinal) + ": " + status.message);
}

// What both passes do before they differ.
struct Call {
  Problem problem;
  Device device;
  CallOptions options;

  ffi::Error prepare(const Attributes& attributes, const Operands& operands, int32_t ordinal) {
    ffi::Error error = make_problem(attributes, operands, &problem);
    if (error.failure() || problem.batch == 0) return error;
    const Status status = read_device(ordinal, &device);
    if (!status.ok()) return ffi::Error::Internal("jax_na: " + status.message);
    return make_options(attributes, operands.query, device, &options);
  }
};

// A buffer that must hold `count` elements of `type`.
struct Expected {
  const char* name;
  const ffi::AnyBuffer* buffer;  // null: the call has no such operand
  ffi::DataType type;
  int64_t count;
};

ffi::Error check_buffers(std::initializer_list<Expected> list) {
  for (const Expected& expected : list) {
    if (expected.buffer == nullptr) continue;
    const ffi::AnyBuffer& buffer = *expected.buffer;
    if (static_cast<int64_t>(buffer.element_count()) != expected.count || buffer.element_type() != expected.type) {
      return invalid(std::string(expected.name) + " is " + to_string(buffer.dimensions()) + " of element type " +
                     std::to_string(static_cast<int>(buffer.element_type())) + ", expected " +
                     std::to_string(expected.count) + " elements of type " +
                     std::to_string(static_cast<int>(expected.type)));
    }
  }
  return ffi::Error::Success();
}

const ffi::AnyBuffer* pointer(const std::optional<ffi::AnyBuffer>& buffer) { return buffer ? &*buffer : nullptr; }

// The sizes that follow from the problem: of operands, or of their gradients.
ffi::Error check_operands(const Problem& problem, const Operands& operands, ffi::DataType type) {
  const int64_t keys = problem.batch * problem.kv_tokens() * problem.kv_heads;
  const int64_t extra = problem.batch * problem.num_extra * problem.kv_heads;
  int64_t entries = problem.bias_batch * problem.heads;
  for (const Axis& axis : problem.axis) entries *= 2 * axis.window - 1;
  return check_buffers({{"query", &operands.query, type, problem.batch * problem.q_tokens() * problem.heads * problem.dim},
                        {"key", &operands.key, type, keys * problem.dim},
                        {"value", &operands.value, type, keys * problem.dim_v},
                        {"bias", pointer(operands.bias), type, entries},
                        {"extra_key", pointer(operands.extra_key), type, extra * problem.dim},
                        {"extra_value", pointer(operands.extra_value), type, extra * problem.dim_v}});
}

ForwardBuffers forward_buffers(const Operands& operands, const ffi::AnyBuffer& halo, const ffi::AnyBuffer& out,
                               const ffi::AnyBuffer& lse, const ffi::AnyBuffer& workspace) {
  ForwardBuffers buffers;
  buffers.query = operands.query.untyped_data();
  buffers.key = operands.key.untyped_data();
  buffers.value = operands.value.untyped_data();
  buffers.bias = data(operands.bias);
  buffers.extra_key = data(operands.extra_key);
  buffers.extra_value = data(operands.extra_value);
  buffers.halo = static_cast<const Shard*>(halo.untyped_data());
  buffers.out = out.untyped_data();
  buffers.lse = static_cast<float*>(lse.untyped_data());
  buffers.workspace = workspace.untyped_data();
  buffers.workspace_bytes = workspace.size_bytes();
  return buffers;
}

ffi::Error wrong_count(const Args& args, const Rets& rets) {
  return invalid("the call has " + std::to_string(args.size()) + " operands and " + std::to_string(rets.size()) +
                 " results, which its attributes do not explain: was it exported by another version of jax_na?");
}

ffi::Error forward(cudaStream_t stream, int32_t ordinal, ffi::RemainingArgs remaining_args,
                   ffi::RemainingRets remaining_rets, Attributes attributes) {
  Args args(remaining_args);
  Rets rets(remaining_rets);
  if (args.size() != Operands::count(attributes) + 1 || rets.size() != 3) return wrong_count(args, rets);
  const Operands operands(args, attributes);
  const ffi::AnyBuffer halo = args.next();
  const ffi::AnyBuffer out = rets.next(), lse = rets.next(), workspace = rets.next();

  Call call;
  const ffi::Error error = call.prepare(attributes, operands, ordinal);
  if (error.failure() || call.problem.batch == 0) return error;
  const ffi::DataType type = operands.query.element_type();
  const int64_t rows = call.problem.batch * call.problem.q_tokens() * call.problem.heads;
  for (const ffi::Error& checked :
       {check_operands(call.problem, operands, type), check_buffers({{"out", &out, type, rows * call.problem.dim_v},
                                                                     {"lse", &lse, ffi::F32, rows},
                                                                     {"halo", &halo, ffi::S32, 3 * call.problem.rank}})}) {
    if (checked.failure()) return checked;
  }
  const ForwardBuffers buffers = forward_buffers(operands, halo, out, lse, workspace);
  return run(attributes.candidates, call.device, "forward",
             [&](const Family& family) { return family.forward(call.problem, buffers, call.options, stream); });
}

ffi::Error backward(cudaStream_t stream, int32_t ordinal, ffi::RemainingArgs remaining_args,
                    ffi::RemainingRets remaining_rets, Attributes attributes) {
  Args args(remaining_args);
  Rets rets(remaining_rets);
  const size_t count = Operands::count(attributes);
  if (args.size() != count + 4 + attributes.has_grad_lse || rets.size() != count + 1) return wrong_count(args, rets);
  const Operands operands(args, attributes);
  const ffi::AnyBuffer out = args.next(), lse = args.next(), grad_out = args.next();
  const std::optional<ffi::AnyBuffer> grad_lse = args.next_if(attributes.has_grad_lse);
  const ffi::AnyBuffer halo = args.next();
  const Operands gradients(rets, attributes);
  const ffi::AnyBuffer workspace = rets.next();

  Call call;
  const ffi::Error error = call.prepare(attributes, operands, ordinal);
  if (error.failure() || call.problem.batch == 0) return error;
  const ffi::DataType type = operands.query.element_type();
  const int64_t rows = call.problem.batch * call.problem.q_tokens() * call.problem.heads;
  for (const ffi::Error& checked :
       {check_operands(call.problem, operands, type), check_operands(call.problem, gradients, type),
        check_buffers({{"out", &out, type, rows * call.problem.dim_v},
                       {"grad_out", &grad_out, type, rows * call.problem.dim_v},
                       {"lse", &lse, ffi::F32, rows},
                       {"grad_lse", pointer(grad_lse), ffi::F32, rows},
                       {"halo", &halo, ffi::S32, 3 * call.problem.rank}})}) {
    if (checked.failure()) return checked;
  }
  BackwardBuffers buffers;
  buffers.forward = forward_buffers(operands, halo, out, lse, workspace);
  buffers.grad_out = grad_out.untyped_data();
  buffers.grad_lse = static_cast<const float*>(data(grad_lse));
  buffers.grad_query = gradients.query.untyped_data();
  buffers.grad_key = gradients.key.untyped_data();
  buffers.grad_value = gradients.value.untyped_data();
  buffers.grad_bias = data(gradients.bias);
  buffers.grad_extra_key = data(gradients.extra_key);
  buffers.grad_extra_value = data(gradients.extra_value);
  return run(attributes.candidates, call.device, "backward",
             [&](const Family& family) { return family.backward(call.problem, buffers, call.options, stream); });
}

auto bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<Attributes>();
}

}  // namespace

XLA_FFI_Error* forward_handler(XLA_FFI_CallFrame* call_frame) {
  static const auto* const handler = bind().To(forward, {ffi::Traits::kCmdBufferCompatible}).release();
  return handler->Call(call_frame);
}

XLA_FFI_Error* backward_handler(XLA_FFI_CallFrame* call_frame) {
  static const auto* const handler = bind().To(backward, {ffi::Traits::kCmdBufferCompatible}).release();
  return handler->Call(call_frame);
}

}  // namespace jax_na
