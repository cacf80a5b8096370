// The XLA FFI handlers: one per custom-call target.
#pragma once

#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_na {

// jax_na_forward: (query, key, value[, bias][, extra_key, extra_value], halo) -> (out, lse, workspace)
XLA_FFI_Error* forward_handler(XLA_FFI_CallFrame* call_frame);

// jax_na_backward: (query, key, value[, bias][, extra_key, extra_value], out, lse, grad_out[, grad_lse], halo)
//   -> (grad_query, grad_key, grad_value[, grad_bias][, grad_extra_key, grad_extra_value], workspace)
XLA_FFI_Error* backward_handler(XLA_FFI_CallFrame* call_frame);

// jax_na_product (common/product.h): pointwise (per_query, per_key, halo) -> weights; neighborhood (weights, per_key, halo)
// -> per_query; inverse (weights, per_query, halo) -> per_key
XLA_FFI_Error* product_handler(XLA_FFI_CallFrame* call_frame);

// The families that compute the products in this module.
std::vector<std::string> product_families();

}  // namespace jax_na
