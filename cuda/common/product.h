// The three products of unfused neighborhood attention, as the FFI handler hands them to a kernel family.
//
// All derive from one trilinear form, T = scale * sum over (query q, slot w) of weights[q, w] <per_query[q], per_key[key(q,
// w)]>, by leaving one of its three tensors out: that one is the result. Slots are row-major from the first key of the
// window; slots outside a causal mask are zero in a result and ignored in an operand. jax_na/_unfused.py has the whole
// story.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "call.h"
#include "problem.h"

namespace jax_na {

enum class Product : int32_t {
  kPointwise = 0,     // weights: scores of qk, gradient of av by its weights
  kNeighborhood = 1,  // per_query: output of av, gradient of qk by its query
  kInverse = 2,       // per_key: gradient of qk by its key, gradient of av by its value
};

// Problem::dim is the head dimension of per_query and per_key; dim_v, bias and extra keys play no part.
struct ProductBuffers {
  void* weights = nullptr;      // [batch, q axes, heads, window volume]
  void* per_query = nullptr;    // [batch, q axes, heads, dim]
  void* per_key = nullptr;      // [batch, kv axes, kv_heads, dim]
  const Shard* halo = nullptr;  // [rank] in device memory; read only if Problem::sharded
};

namespace naive {
Status product(Product, const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);
}
namespace gemm {
Status product(Product, const Problem&, const ProductBuffers&, const CallOptions&, cudaStream_t);
}

}  // namespace jax_na
