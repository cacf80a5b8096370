// Host side of the GEMM products: the tile's shape, the launch, and the few template axes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "gemm/tile.cuh"

namespace jax_na::gemm {

Status pointwise(const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);
Status neighborhood(const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);
Status inverse(const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);

// Starts `kernel` on a tile per block. `columns_per_block`: output columns a block computes, 0 for all of them.
Status launch(Product pass, const Problem& problem, const ProductBuffers& buffers, int32_t columns_per_block,
              void (*kernel)(const Params), int shared_bytes, int element_bytes, cudaStream_t stream);

// Calls `f(element, precise)` with a value of the element type and whether float32 is multiplied in full.
template <typename F>
Status with_element(const CallOptions& options, F f) {
  switch (options.dtype) {
    case DType::kF16: return f(__half{}, std::false_type{});
    case DType::kBF16: return f(__nv_bfloat16{}, std::false_type{});
    case DType::kF32:
      return options.precision == Precision::kHighest ? f(0.0f, std::true_type{}) : f(0.0f, std::false_type{});
  }
  return Status::error("unknown element type");
}

// Calls `f` with the bucket of output columns a block computes. kWidest: 64 where the sums take twice the registers.
template <int kWidest, typename F>
Status with_columns(int32_t dim, F f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>{});
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, kWidest>{});
}

}  // namespace jax_na::gemm
