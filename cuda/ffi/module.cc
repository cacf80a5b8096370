// The Python extension jax_na._cuda_kernels: capsules of the FFI handlers, and what jax_na/_cuda.py needs to know of this
// build.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "ffi/dispatch.h"
#include "ffi/handlers.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

NB_MODULE(_cuda_kernels, module) {
  module.doc() = "CUDA kernels of jax_na, as XLA FFI handlers. Private: use jax_na.";
  module.def(
      "targets",
      [] {
        nb::dict targets;
        targets["jax_na_forward"] = nb::capsule(reinterpret_cast<void*>(jax_na::forward_handler));
        targets["jax_na_backward"] = nb::capsule(reinterpret_cast<void*>(jax_na::backward_handler));
        targets["jax_na_product"] = nb::capsule(reinterpret_cast<void*>(jax_na::product_handler));
        return targets;
      },
      "Custom-call target names and handlers.");
  module.def(
      "ffi_api_version", [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the FFI API this module was compiled with.");
  module.def(
      "families",
      [] {
        std::vector<std::string> names;
        for (const jax_na::Family& family : jax_na::families()) names.emplace_back(family.name);
        return names;
      },
      "The kernel families in this build.");
  module.def("product_families", &jax_na::product_families, "The families of the unfused products in this build.");
}
