// The attributes of the custom calls, decoded from what jax_na/_cuda.py (`_attributes`) writes: one struct for every
// target. Members, names and types must match it in number: XLA refuses a call that has more or fewer.
#pragma once

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace jax_na {

struct Attributes {
  // One entry per spatial axis, outermost first: their number is the rank.
  xla::ffi::Span<const int64_t> window;
  xla::ffi::Span<const int64_t> stride;
  xla::ffi::Span<const int64_t> dilation;
  xla::ffi::Span<const int64_t> is_causal;
  double scale;
  int64_t precision;  // enum Precision
  bool deterministic;
  bool sharded;   // the halo operand holds real offsets
  bool has_bias;  // which optional operands are there
  bool has_extra;
  bool has_grad_lse;
  std::string_view candidates;  // families in order of preference, separated by commas: "hopper,fused,naive"
};

}  // namespace jax_na

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_na::Attributes, ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("window"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("stride"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("dilation"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("is_causal"), ::xla::ffi::StructMember<double>("scale"),
    ::xla::ffi::StructMember<int64_t>("precision"), ::xla::ffi::StructMember<bool>("deterministic"),
    ::xla::ffi::StructMember<bool>("sharded"), ::xla::ffi::StructMember<bool>("has_bias"),
    ::xla::ffi::StructMember<bool>("has_extra"), ::xla::ffi::StructMember<bool>("has_grad_lse"),
    ::xla::ffi::StructMember<std::string_view>("candidates"));
