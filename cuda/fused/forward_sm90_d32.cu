#include "forward_sm90_kernels.h"

namespace jax_na::hopper {

JAX_NA_INSTANTIATE_FORWARD(0)
JAX_NA_INSTANTIATE_FORWARD(5)

}  // namespace jax_na::hopper
