// Launches of one element type and head-dimension bucket. Included only by kernels_sm80_*.cu.
#pragma once

#include <atomic>
#include <cstddef>

#include "config_sm80.h"
#include "launch_sm80.h"

namespace jax_na::fused {

constexpr int kMaxSharedBytes = 99 * 1024;  // of SM 8.6 and 8.9; SM 8.0 and 9.0 have more

// The first launch of a kernel on a device raises its limit of dynamic shared memory.
template <auto kKernel>
cudaError_t launch(const Params& p, uint32_t blocks, int threads, size_t shared_bytes, size_t most_shared_bytes, int device,
                   cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};
  const uint64_t bit = uint64_t(1) << (device & 63);
  if ((prepared.load(std::memory_order_acquire) & bit) == 0) {
    const cudaError_t status =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes));
    if (status != cudaSuccess) return status;
    prepared.fetch_or(bit, std::memory_order_release);
  }
  kKernel<<<blocks, threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class C>
cudaError_t launch_forward(const Params& p, int device, cudaStream_t stream) {
  constexpr size_t bytes = sizeof(ForwardShared<C>);
  static_assert(bytes <= kMaxSharedBytes);
  return launch<forward_kernel<C>>(p, p.num_work, C::kThreads, bytes, bytes, device, stream);
}

template <class C>
cudaError_t launch_grad_key_value(const Params& p, int device, cudaStream_t stream) {
  constexpr size_t bytes = sizeof(GradKeyValueShared<C>);
  static_assert(bytes <= kMaxSharedBytes);
  return launch<grad_key_value_kernel<C>>(p, p.num_work, C::kThreads, bytes, bytes, device, stream);
}

template <class C>
cudaError_t launch_grad_query(const Params& p, uint32_t blocks, int device, cudaStream_t stream) {
  using Shared = GradQueryShared<C>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  // The staging area of the bias gradient lies at the end.
  const size_t bytes = p.bias_partial != nullptr ? sizeof(Shared) : offsetof(Shared, scores);
  return launch<grad_query_kernel<C>>(p, blocks, C::kThreads, bytes, sizeof(Shared), device, stream);
}

template <class E, int kDim>
struct Launch {
  static cudaError_t forward(const Params& p, bool large, int device, cudaStream_t stream) {
    if constexpr (has_large_forward(E::k16Bit, kDim)) {
      if (large) return launch_forward<typename ForwardOf<E, kDim, true>::Config>(p, device, stream);
    }
    return launch_forward<typename ForwardOf<E, kDim, false>::Config>(p, device, stream);
  }

  static cudaError_t grad_query(const Params& p, uint32_t blocks, bool large, int device, cudaStream_t stream) {
    if constexpr (has_large_backward(E::k16Bit, kDim)) {
      if (large) return launch_grad_query<typename GradQueryOf<E, kDim, true>::Config>(p, blocks, device, stream);
    }
    return launch_grad_query<typename GradQueryOf<E, kDim, false>::Config>(p, blocks, device, stream);
  }

  static cudaError_t grad_key_value(const Params& p, bool large, int device, cudaStream_t stream) {
    constexpr int kBoth = kPartValue | kPartKey;
    if constexpr (splits_gradients(kDim)) {
      const cudaError_t status =
          launch_grad_key_value<typename GradKeyValueOf<E, kDim, kPartValue, false>::Config>(p, device, stream);
      if (status != cudaSuccess) return status;
      return launch_grad_key_value<typename GradKeyValueOf<E, kDim, kPartKey, false>::Config>(p, device, stream);
    } else {
      if constexpr (has_large_backward(E::k16Bit, kDim)) {
        if (large) return launch_grad_key_value<typename GradKeyValueOf<E, kDim, kBoth, true>::Config>(p, device, stream);
      }
      return launch_grad_key_value<typename GradKeyValueOf<E, kDim, kBoth, false>::Config>(p, device, stream);
    }
  }
};

template <class E, int kDim>
constexpr LaunchTable launch_table() {
  using L = Launch<E, kDim>;
  return LaunchTable{L::forward, L::grad_query, L::grad_key_value};
}

}  // namespace jax_na::fused
