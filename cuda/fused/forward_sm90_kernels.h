// The forward kernels that exist: index in kForwardKernels (plan_sm90.h) -> configuration -> launch. One .cu per head dimension
// instantiates them, so that they compile side by side.
#pragma once

#include "forward_sm90.h"
#include "plan_sm90.h"

namespace jax_na::hopper {

//                       element, kernel            dim, columns, consumers, shared, stages, query stages
template <typename T, int kKernel>
struct ForwardKernel;
template <typename T>
struct ForwardKernel<T, 0> : ForwardConfig<T, 32, 112, 3, false, 4, 2> {};
template <typename T>
struct ForwardKernel<T, 1> : ForwardConfig<T, 64, 128, 3, true, 4, 1> {};
template <typename T>
struct ForwardKernel<T, 2> : ForwardConfig<T, 64, 208, 2, true, 3, 1> {};
template <typename T>
struct ForwardKernel<T, 3> : ForwardConfig<T, 128, 128, 2, true, 2, 1> {};
template <typename T>
struct ForwardKernel<T, 4> : ForwardConfig<T, 256, 64, 2, true, 2, 1> {};

// Null on success, else what failed.
template <int kKernel>
const char* launch_forward_kernel(DType dtype, const ForwardParams& params, int32_t num_sms, cudaStream_t stream);

#define JAX_NA_INSTANTIATE_FORWARD(kKernel)                                                                        \
  static_assert(ForwardKernel<__half, kKernel>::kDim == kForwardKernels[kKernel].dim &&                            \
                    ForwardKernel<__half, kKernel>::kN == kForwardKernels[kKernel].num_columns &&                  \
                    ForwardKernel<__half, kKernel>::kConsumers == kForwardKernels[kKernel].num_consumers &&        \
                    ForwardKernel<__half, kKernel>::kShared == kForwardKernels[kKernel].shared,                    \
                "kForwardKernels and ForwardKernel disagree");                                                     \
  template <>                                                                                                      \
  const char* launch_forward_kernel<kKernel>(DType dtype, const ForwardParams& params, int32_t num_sms,            \
                                             cudaStream_t stream) {                                                \
    return dtype == DType::kF16 ? launch_forward<ForwardKernel<__half, kKernel>>(params, num_sms, stream)          \
                                : launch_forward<ForwardKernel<__nv_bfloat16, kKernel>>(params, num_sms, stream);  \
  }

}  // namespace jax_na::hopper
