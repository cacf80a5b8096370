#include "forward_sm90_kernels.h"

namespace jax_na::hopper {

JAX_NA_INSTANTIATE_FORWARD(1)
JAX_NA_INSTANTIATE_FORWARD(2)
JAX_NA_INSTANTIATE_FORWARD(6)

}  // namespace jax_na::hopper
