// The forward kernels that exist: index in kForwardKernels (plan_sm90.h) -> configuration -> launch. One .cu per head
// dimension instantiates them, so that they compile side by side.
#pragma once

#include "forward_kernel_sm90.cuh"
#include "forward_small_kernel_sm90.cuh"
#include "plan_sm90.h"

namespace jax_na::hopper {

//                                                     dim, columns, consumers, sharing, stages, query stages, mask slots
template <typename T, int kKernel>
struct ForwardKernel;
template <typename T>
struct ForwardKernel<T, 0> : ForwardConfig<T, 32, 112, 3, Sharing::kPrivate, 4, 2> {};
template <typename T>
struct ForwardKernel<T, 1> : ForwardConfig<T, 64, 128, 3, Sharing::kShared, 5, 2> {};
template <typename T>
struct ForwardKernel<T, 2> : ForwardConfig<T, 64, 160, 2, Sharing::kShared, 3, 2, 4> {};
template <typename T>
struct ForwardKernel<T, 3> : ForwardConfig<T, 128, 128, 2, Sharing::kShared, 2, 2> {};
template <typename T>
struct ForwardKernel<T, 4> : ForwardConfig<T, 256, 64, 2, Sharing::kShared, 2, 1> {};
// Small windows:
template <typename T>
struct ForwardKernel<T, 5> : SmallForwardConfig<T, 32> {};
template <typename T>
struct ForwardKernel<T, 6> : SmallForwardConfig<T, 64> {};

template <typename Config>
constexpr bool config_matches(const KernelShape& shape) {
  return Config::kDim == shape.dim && Config::kN == shape.num_columns && Config::kConsumers == shape.num_consumers &&
         Config::kSharing == shape.sharing && Config::kMaskProduct == shape.mask_product;
}

template <typename Config>
const char* launch_config(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  if constexpr (Config::kSharing == Sharing::kWarps) {
    return launch_small<Config>(params, num_sms, stream);
  } else {
    return launch_forward<Config>(params, num_sms, stream);
  }
}

// Null on success, else what failed.
template <int kKernel>
const char* launch_forward_kernel(DType dtype, const ForwardParams& params, int32_t num_sms, cudaStream_t stream);

#define JAX_NA_INSTANTIATE_FORWARD(kKernel)                                                                      \
  static_assert(config_matches<ForwardKernel<__half, kKernel>>(kForwardKernels[kKernel]),                        \
                "kForwardKernels and ForwardKernel disagree");                                                   \
  template <>                                                                                                    \
  const char* launch_forward_kernel<kKernel>(DType dtype, const ForwardParams& params, int32_t num_sms,          \
                                             cudaStream_t stream) {                                              \
    return dtype == DType::kF16 ? launch_config<ForwardKernel<__half, kKernel>>(params, num_sms, stream)         \
                                : launch_config<ForwardKernel<__nv_bfloat16, kKernel>>(params, num_sms, stream); \
  }

}  // namespace jax_na::hopper
