// The Hopper backward mainloop: gradients of tiles of keys over the boxes of queries that see them, and its launch.
//
// One producer warp (backward_producer_sm90.cuh), one or two consumer warpgroups (backward_consumer_sm90.cuh), and with two
// of them the rest of the producer's warpgroup (backward_helper_sm90.cuh), in CTAs that stay and claim tile after tile.
#pragma once

#include <string>

#include "backward_consumer_sm90.cuh"
#include "backward_helper_sm90.cuh"
#include "backward_producer_sm90.cuh"
#include "backward_sm90.h"

namespace jax_na::hopper {

// Word q of a row of BackwardShared::prefix.
template <class C>
__device__ __forceinline__ uint32_t prefix_word(const BackwardParams& params, const BackwardShared<C>& shared, int row,
                                                int q) {
  int shape = 0, axis = 0, first = 0;
  for (int s = 0; s < params.num_shapes; ++s) {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (row >= params.shape[s].prefix_row[a]) shape = s, axis = a, first = params.shape[s].prefix_row[a];
    }
  }
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < C::kQueries / 4; ++i) {
    const uint32_t packed = shared.query_row[shape][i / 2 * 8 + 2 * q + i % 2].x;
    bits |= uint32_t(coordinate(packed, axis) < row - first) << i;
  }
  return bits;
}

// The tables that are the same for every tile, by the consumer threads.
template <class C>
__device__ __forceinline__ void fill_query_rows(const BackwardParams& params, BackwardShared<C>& shared) {
  for (int s = 0; s < params.num_shapes; ++s) {
    if (threadIdx.x < C::kQueries) shared.query_row[s][threadIdx.x] = query_row(params, params.shape[s], threadIdx.x);
  }
}

template <class C>
__device__ __forceinline__ void fill_prefix(const BackwardParams& params, BackwardShared<C>& shared) {
  const int words = 4 * params.shape[params.num_shapes - 1].prefix_row[kMaxRank];
  for (int i = threadIdx.x; i < words; i += C::kConsumerThreads) {
    shared.prefix[i / 4][i % 4] = prefix_word(params, shared, i / 4, i % 4);
  }
}

// Rows that no TMA box ever covers are zero for good: products with them must stay finite. (Of those that only some boxes
// cover, what an earlier box left there is as good.)
template <class C, int kTiles, int kBytes>
__device__ __forceinline__ void zero_uncovered_rows(uint8_t (&tiles)[kTiles][kBytes], int32_t volume, int32_t rows) {
  const int32_t chunks = (rows - volume) * (C::kRowBytes / 16);
#pragma unroll 1
  for (int block = 0; block < kTiles * C::kChannelBlocks; ++block) {
    uint4* target = reinterpret_cast<uint4*>(tiles[0] + (block * rows + volume) * C::kRowBytes);
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks; i += C::kConsumerThreads) target[i] = make_uint4(0, 0, 0, 0);
  }
}

template <class C>
__device__ __forceinline__ void init_barriers(BackwardShared<C>& shared) {
  constexpr int kConsumerWarps = C::kConsumerThreads / 32;
  for (int i = 0; i < C::kStages; ++i) {
    // TMA, and the cp.async of the producer's lanes or the helpers, and these' masks.
    sm90::mbarrier_init(&shared.full[i], 1 + (C::kHelperThreads > 0 ? C::kHelperThreads + C::kHelperWarps : 32));
    sm90::mbarrier_init(&shared.described[i], 1);
    sm90::mbarrier_init(&shared.empty[i], kConsumerWarps);
  }
  for (int i = 0; i < C::kKeyStages; ++i) {
    sm90::mbarrier_init(&shared.key_full[i], 1);
    sm90::mbarrier_init(&shared.key_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < C::kTileStages; ++i) {
    sm90::mbarrier_init(&shared.tile_full[i], 32);
    sm90::mbarrier_init(&shared.tile_empty[i], kConsumerWarps + C::kHelperWarps);
  }
  sm90::fence_barrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas) backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ uint8_t shared_memory[];
  BackwardShared<C>& shared =
      *reinterpret_cast<BackwardShared<C>*>(shared_memory + ((1024 - (sm90::smem_address(shared_memory) & 1023)) & 1023));
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == C::kConsumers) {
    if constexpr (C::kReallocateRegisters) sm90::decrease_registers<C::kProducerRegisters>();
    if (C::kHelperThreads > 0 && threadIdx.x / 32 != C::kConsumerThreads / 32) {
      Helper<C>{params, shared, int(threadIdx.x) - (C::kConsumerThreads + 32)}.run();
      return;
    }
    if (threadIdx.x % 32 == 0) init_barriers(shared);
    __syncwarp();
    Producer<C>(params, shared).run();
  } else {
    if constexpr (C::kReallocateRegisters) sm90::increase_registers<C::kConsumerRegisters>();
    fill_query_rows(params, shared);
    zero_uncovered_rows<C>(shared.key, params.key_volume, C::kKeys);
    zero_uncovered_rows<C>(shared.value, params.key_volume, C::kKeys);
    zero_uncovered_rows<C>(shared.query, params.least_query_volume, C::kQueries);
    zero_uncovered_rows<C>(shared.grad_out, params.least_query_volume, C::kQueries);
    sm90::fence_proxy_async();
    sm90::named_barrier_sync(kStartBarrier, C::kStartThreads);
    fill_prefix(params, shared);  // while the first box is loaded
    sm90::named_barrier_sync(kTableBarrier, C::kTableThreads);
    const int row = warpgroup * 64 + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4;
    Consumer<C>{params, shared, warpgroup, row}.run();
  }
}

template <class C>
Status launch_config(const BackwardLaunch& launch, cudaStream_t stream) {
  // The attribute is per device and cheap to set; a cache would need one entry per device.
  constexpr int kBytes = sizeof(BackwardShared<C>) + 1024;
  static_assert(kBytes <= 227 * 1024, "shared memory");
  cudaError_t error = cudaFuncSetAttribute(backward_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    const uint32_t resident = uint32_t(launch.num_sms) * C::kMinCtas;
    const uint32_t grid = launch.params->num_tiles < resident ? launch.params->num_tiles : resident;
    backward_kernel<C><<<grid, C::kThreads, kBytes, stream>>>(*launch.params);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return {};
  return Status::error(std::string("Hopper backward, head dimension ") + std::to_string(C::kDim) + ": " +
                       cudaGetErrorString(error));
}

// Config<T> for both element types.
template <template <typename> class Config>
Status launch_any(const BackwardLaunch& launch, cudaStream_t stream) {
  return launch.dtype == DType::kF16 ? launch_config<Config<__half>>(launch, stream)
                                     : launch_config<Config<__nv_bfloat16>>(launch, stream);
}

}  // namespace jax_na::hopper
