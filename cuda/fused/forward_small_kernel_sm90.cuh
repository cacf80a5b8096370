// Forward neighborhood attention for small windows on Hopper: TMA for the tiles, mma.sync per warp.
//
// With a 7x7 window, 64 queries see a union four times their window, and wgmma multiplies and the softmax exponentiates all
// of it. Here the unit is a warp with 16 queries (a 2x7 or 4x4 box): it picks the keys of its own union out of the CTA's
// tile, row by row, because every lane of ldmatrix names the row it wants. The union is less than twice the window and the
// warps need no barrier among themselves. What is left is short of instructions and long in latency, so everything that
// does not depend on the elements is done once per coordinate of the tile, by the producer: windows, tokens, masks. At head
// dimension 32 two heads lie side by side in a row of 128 bytes: TMA takes as long for 64.
#pragma once

#include "forward_kernel_sm90.cuh"
#include "forward_small_consumer_sm90.cuh"
#include "forward_small_producer_sm90.cuh"

namespace jax_na::hopper {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads) forward_small_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  extern __shared__ unsigned char dynamic_smem[];
  const SmallForwardShared shared(params, dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warps = params.small.warps;

  // The first loads run while the consumers make the tables.
  if (warp == warps) {
    if (threadIdx.x % 32 == 0) shared.records->init_barriers(warps);
    __syncwarp();
    produce_small<Config>(params, shared);
    return;
  }
  shared.records->build_coordinates(params, threadIdx.x, 32 * warps);
  shared.records->keys.build(params, threadIdx.x, 32 * warps);
  named_barrier_sync(kTablesBarrier, blockDim.x);
  consume_small<Config>(params, shared, warp);
}

// Null on success, else what failed.
template <typename Config>
const char* launch_small(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  if (const char* failure = allow_shared_memory<forward_small_sm90<Config>, kMostSharedBytes>()) return failure;
  int places = 1;
  for (int a = 0; a < kMaxRank; ++a) places *= params.tiles[a].divisor * params.groups[a].divisor;
  const int ctas = scheduled_ctas(
      params.num_items < num_sms * params.small.ctas ? params.num_items : num_sms * params.small.ctas, places);
  forward_small_sm90<Config><<<ctas, 32 * (params.small.warps + 1), params.small.shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
