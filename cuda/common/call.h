// What crosses from the FFI handlers to a kernel family: element types, buffers, the device, the result.
//
// A family (naive, fused, hopper, gemm) offers plain functions `Status family::forward(const Problem&, const
// ForwardBuffers&, const CallOptions&, cudaStream_t)`; the handlers know nothing else of it. Pointers are device memory,
// dense, in the layouts given here, 16-byte aligned; null where the call has no such operand. A family never allocates,
// never synchronizes and never prints: what goes wrong is returned, and the handler turns it into an XLA error.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "problem.h"

namespace jax_na {

enum class DType : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2 };
enum class Precision : int32_t { kDefault = 0, kHighest = 1 };  // of fp32 products: TF32 tensor cores, or full float32

struct CallOptions {
  DType dtype = DType::kF32;
  Precision precision = Precision::kDefault;
  bool deterministic = false;  // bitwise reproducible gradients were asked for
  int32_t device = 0;          // CUDA device ordinal of the call
  int32_t capability = 0;      // 10 * major + minor of that device
  int32_t num_sms = 0;
};

struct ForwardBuffers {
  const void* query = nullptr;        // [batch, q axes, heads, dim]
  const void* key = nullptr;          // [batch, kv axes, kv_heads, dim]
  const void* value = nullptr;        // [batch, kv axes, kv_heads, dim_v]
  const void* bias = nullptr;         // [bias_batch, heads, 2 window - 1 per axis], or null
  const void* extra_key = nullptr;    // [batch, num_extra, kv_heads, dim], or null
  const void* extra_value = nullptr;  // [batch, num_extra, kv_heads, dim_v], or null
  const Shard* halo = nullptr;        // [rank] in device memory; read only if Problem::sharded
  void* out = nullptr;                // [batch, q axes, heads, dim_v]
  float* lse = nullptr;               // [batch, q axes, heads], natural log
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct BackwardBuffers {
  ForwardBuffers forward;            // out and lse are inputs here
  const void* grad_out = nullptr;    // like out
  const float* grad_lse = nullptr;   // like lse, or null: zero
  void* grad_query = nullptr;        // like query; every element is written
  void* grad_key = nullptr;          // like key
  void* grad_value = nullptr;        // like value
  void* grad_bias = nullptr;         // like bias, or null
  void* grad_extra_key = nullptr;    // like extra_key, or null
  void* grad_extra_value = nullptr;  // like extra_value, or null
};

struct Status {
  std::string message;  // empty: success
  bool ok() const { return message.empty(); }
  static Status error(std::string text) { return Status{std::move(text)}; }
};

}  // namespace jax_na
