// The handler of jax_na_product: one of the three products of unfused neighborhood attention (common/product.h).
//
// Arguments were checked in Python at trace time; what is checked here guards the contract between the two sides. Never
// allocates, synchronizes or prints: safe under CUDA graph capture.
#include <cuda_runtime_api.h>

#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "common/product.h"
#include "ffi/dispatch.h"
#include "ffi/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace jax_na {

// As jax_na/_cuda_products.py writes them.
struct ProductAttributes {
  xla::ffi::Span<const int64_t> window;  // one entry per spatial axis, outermost first: their number is the rank
  xla::ffi::Span<const int64_t> stride;
  xla::ffi::Span<const int64_t> dilation;
  xla::ffi::Span<const int64_t> is_causal;
  double scale;
  int64_t precision;  // enum Precision
  int64_t product;    // enum Product
  bool sharded;       // the halo operand holds real offsets
  std::string_view family;
};

}  // namespace jax_na

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_na::ProductAttributes, ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("window"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("stride"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("dilation"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("is_causal"), ::xla::ffi::StructMember<double>("scale"),
    ::xla::ffi::StructMember<int64_t>("precision"), ::xla::ffi::StructMember<int64_t>("product"),
    ::xla::ffi::StructMember<bool>("sharded"), ::xla::ffi::StructMember<std::string_view>("family"));

namespace jax_na {
namespace {

namespace ffi = xla::ffi;

using ProductFunction = Status (*)(Product, const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);

struct ProductFamily {
  std::string_view name;
  ProductFunction product;
};

// Those compiled into this module, in order of preference.
constexpr ProductFamily kProductFamilies[] = {
#ifdef JAX_NA_WITH_GEMM
    {"gemm", &gemm::product},
#endif
#ifdef JAX_NA_WITH_NAIVE
    {"naive", &naive::product},
#endif
    {{}, nullptr},  // an array needs an entry
};

ProductFunction find_family(std::string_view name) {
  for (const ProductFamily& family : kProductFamilies) {
    if (family.name == name) return family.product;
  }
  return nullptr;
}

ffi::Error invalid(std::string text) { return ffi::Error::InvalidArgument("jax_na: " + std::move(text)); }

std::string to_string(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Problem from the three tensors by their roles, whichever of them is the result.
ffi::Error make_problem(const ProductAttributes& attributes, ffi::AnyBuffer::Dimensions weights,
                        ffi::AnyBuffer::Dimensions per_query, ffi::AnyBuffer::Dimensions per_key, Problem* problem) {
  const size_t rank = attributes.window.size();
  const std::string shapes =
      "weights " + to_string(weights) + ", per-query " + to_string(per_query) + ", per-key " + to_string(per_key);
  if (rank < 1 || rank > kMaxRank || attributes.stride.size() != rank || attributes.dilation.size() != rank ||
      attributes.is_causal.size() != rank || weights.size() < rank + 2 || per_query.size() != weights.size() ||
      per_key.size() != weights.size()) {
    return invalid(shapes + " with " + std::to_string(rank) + " windows: expected [..., 1 to 3 axes, heads, size]");
  }
  const size_t lead = weights.size() - rank - 2;
  for (const auto& dims : {weights, per_query, per_key}) {
    for (size_t i = lead; i < dims.size(); ++i) {
      if (dims[i] > std::numeric_limits<int32_t>::max()) return invalid("an axis of " + shapes + " exceeds 2^31 - 1");
    }
  }
  problem->rank = static_cast<int32_t>(rank);
  problem->sharded = attributes.sharded;
  problem->scale = static_cast<float>(attributes.scale);
  problem->batch = 1;
  bool matches = true;
  for (size_t i = 0; i < lead; ++i) {
    problem->batch *= weights[i];
    matches = matches && per_query[i] == weights[i] && per_key[i] == weights[i];
  }
  for (size_t i = 0; i < rank; ++i) {
    Axis& axis = problem->axis[kMaxRank - rank + i];
    axis.q_len = static_cast<int32_t>(weights[lead + i]);
    axis.kv_len = static_cast<int32_t>(per_key[lead + i]);
    axis.window = static_cast<int32_t>(attributes.window[i]);
    axis.stride = static_cast<int32_t>(attributes.stride[i]);
    axis.dilation = static_cast<int32_t>(attributes.dilation[i]);
    axis.causal = attributes.is_causal[i] != 0;
    matches = matches && per_query[lead + i] == axis.q_len && axis.window >= 1 && axis.stride >= 1 &&
              axis.stride <= axis.window && axis.dilation >= 1 &&
              (attributes.sharded || (axis.kv_len == axis.q_len && int64_t(axis.window) * axis.dilation <= axis.q_len));
  }
  problem->heads = static_cast<int32_t>(weights[lead + rank]);
  problem->kv_heads = static_cast<int32_t>(per_key[lead + rank]);
  problem->dim = problem->dim_v = static_cast<int32_t>(per_query[lead + rank + 1]);
  matches = matches && per_query[lead + rank] == problem->heads && problem->kv_heads >= 1 &&
            problem->heads % problem->kv_heads == 0 && per_key[lead + rank + 1] == problem->dim &&
            weights[lead + rank + 1] == problem->window_volume();
  return matches ? ffi::Error::Success() : invalid(shapes + " do not belong together with these windows");
}

ffi::Error product(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer halo,
                   ffi::Result<ffi::AnyBuffer> result, ProductAttributes attributes) {
  const Product pass = static_cast<Product>(attributes.product);
  const bool pointwise = pass == Product::kPointwise, inverse = pass == Product::kInverse;
  // pointwise: (per_query, per_key) -> weights; neighborhood: (weights, per_key) -> per_query;
  // inverse: (weights, per_query) -> per_key.
  const ffi::AnyBuffer weights = pointwise ? *result : a;
  const ffi::AnyBuffer per_query = pointwise ? a : inverse ? b : *result;
  const ffi::AnyBuffer per_key = inverse ? *result : b;

  Problem problem;
  const ffi::Error error =
      make_problem(attributes, weights.dimensions(), per_query.dimensions(), per_key.dimensions(), &problem);
  if (error.failure() || problem.batch == 0) return error;
  Device device;
  Status status = read_device(ordinal, &device);
  if (!status.ok()) return ffi::Error::Internal("jax_na: " + status.message);

  CallOptions options;
  switch (weights.element_type()) {
    case ffi::F16: options.dtype = DType::kF16; break;
    case ffi::BF16: options.dtype = DType::kBF16; break;
    case ffi::F32: options.dtype = DType::kF32; break;
    default:
      return invalid("element type " + std::to_string(static_cast<int>(weights.element_type())) +
                     " has no CUDA kernel (float16, bfloat16, float32 have)");
  }
  options.precision = static_cast<Precision>(attributes.precision);
  options.deterministic = true;  // every product is
  options.device = device.ordinal;
  options.capability = device.capability;
  options.num_sms = device.num_sms;

  const ProductFunction function = find_family(attributes.family);
  if (function == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_na: the unfused products of family " +
                                                          std::string(attributes.family) + " are not in this build");
  }
  if (device.capability < 80) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_na: the unfused products need compute capability 8.0 or newer, the device has " +
                          std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10));
  }
  const DeviceGuard guard(device.ordinal);
  if (!guard.status().ok()) return ffi::Error::Internal("jax_na: " + guard.status().message);
  (void)cudaGetLastError();  // an earlier, foreign error is not this call's
  ProductBuffers buffers;
  buffers.weights = weights.untyped_data();
  buffers.per_query = per_query.untyped_data();
  buffers.per_key = per_key.untyped_data();
  buffers.halo = static_cast<const Shard*>(halo.untyped_data());
  status = function(pass, problem, buffers, options, stream);
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error::Internal("jax_na: product " + std::to_string(attributes.product) + " of family " +
                              std::string(attributes.family) + ", device " + std::to_string(device.ordinal) + ": " +
                              status.message);
}

}  // namespace

std::vector<std::string> product_families() {
  std::vector<std::string> names;
  for (const ProductFamily& family : kProductFamilies) {
    if (family.product != nullptr) names.emplace_back(family.name);
  }
  return names;
}

XLA_FFI_Error* product_handler(XLA_FFI_CallFrame* call_frame) {
  static const auto* const handler = ffi::Ffi::Bind()
                                         .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                         .Ctx<ffi::DeviceOrdinal>()
                                         .Arg<ffi::AnyBuffer>()
                                         .Arg<ffi::AnyBuffer>()
                                         .Arg<ffi::AnyBuffer>()
                                         .Ret<ffi::AnyBuffer>()
                                         .Attrs<ProductAttributes>()
                                         .To(product, {ffi::Traits::kCmdBufferCompatible})
                                         .release();
  return handler->Call(call_frame);
}

}  // namespace jax_na
