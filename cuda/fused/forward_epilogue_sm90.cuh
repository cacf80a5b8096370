// What leaves a Hopper forward kernel: lse, outputs, and the rows that came out with a NaN, computed again.
#pragma once

#include "forward_describer_sm90.cuh"
#include "forward_softmax_sm90.cuh"
#include "recompute_sm90.cuh"

namespace jax_na::hopper {

// Beyond this a hidden score may be among what a row has summed up (mask_product_sm90.h).
constexpr float kLargestScore = 1e25f;

// Ends the softmax of a thread's two rows: lse to global memory; inverse: what the outputs are to be multiplied with.
// tokens: of the rows, -1 where there is none. kMaskProduct: hidden scores are below kHiddenScore, else infinite.
template <bool kMaskProduct = false>
__device__ __forceinline__ void finish_softmax(const ForwardParams& params, const SoftmaxState& state,
                                               const int32_t (&tokens)[2], int32_t head, int lane, float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = quad_sum(state.row_sum[half]);
    if (kMaskProduct && !(fabsf(state.row_max[half]) < kLargestScore)) sum = NAN;  // the row is computed again
    inverse[half] = __fdividef(1.0f, sum);
    if (tokens[half] >= 0 && lane % 4 == 0 && params.lse != nullptr) {
      params.lse[int64_t(tokens[half]) * params.heads.divisor + head] = state.row_max[half] * params.scale + __logf(sum);
    }
  }
}

// O * inverse to global memory, 16 bytes a thread: quads transpose 4x4 registers, so that four lanes hold 64 contiguous
// bytes. nan: of each half a ballot of the rows that come out with a NaN: they are to be computed again, unless their
// weights are NaN and no hidden score can be the cause.
template <typename Config>
__device__ __forceinline__ void store_output(const ForwardParams& params, const float (&o)[Config::kDim / 2],
                                             const float (&inverse)[2], const int32_t (&tokens)[2], int32_t head, int lane,
                                             uint32_t (&nan)[2]) {
  using T = typename Config::T;
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t kept = 0;
    const int32_t token = tokens[half];
    const int64_t row = int64_t(token) * params.heads.divisor + head;
    T* const out = static_cast<T*>(params.out) + row * Config::kDim;
#pragma unroll
    for (int block = 0; block < Config::kDim / 32; ++block) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * block + i) + 2 * half;
        r[i] = sm90::pack_pair<T>(o[at] * inverse[half], o[at + 1] * inverse[half]);
        kept = keep_nan<T>(kept, r[i]);
      }
      // After both exchanges lane q holds what lanes 0..3 had in r[q].
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          const uint32_t got = __shfl_xor_sync(~0u, q & bit ? r[i] : r[i + bit], bit);
          if (q & bit)
            r[i] = got;
          else
            r[i + bit] = got;
        }
      }
      if (token >= 0) *reinterpret_cast<uint4*>(out + 32 * block + 8 * q) = make_uint4(r[0], r[1], r[2], r[3]);
    }
    nan[half] = __ballot_sync(~0u, token >= 0 && kept_nan<T>(kept) && (Config::kMaskProduct || !isnan(inverse[half])));
  }
}

// By a warp, when all its query tiles are done: computes its rows with a NaN again. A call of a function inside the loop
// over the tiles would cost the loop its registers, so the rows are not remembered but looked for, and only if there was
// one. PERF: all of it inlined. A kernel that has a call takes 2 to 3 us longer for every query tile, even if it is never
// made (H200: 1d-16k-w512 0.508 to 0.598 ms, causal D 128 0.493 to 0.531).
// row_offset: of the warp's 16 rows, more by `bases` than describe_row takes it; its items: from `first` on, in steps.
// kMaskProduct: a hidden key may have reached lse too.
template <typename T, int kDim, bool kMaskProduct = false>
__device__ __forceinline__ void recompute_nan_rows(const ForwardParams& params, int consumer, const uint32_t* row_offset,
                                                   uint32_t bases, int first, int step) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int index = first; index < params.num_items; index += step) {
    ItemInfo item;
    bool exists = true;
    for (int a = 0; a < kMaxRank; ++a) {
      const ItemPlace place = item_place(params, index, a);
      item.group[a] = group_axis(params.axis[a], shard_of_axis(params, a), place.residue, params.groups[a]);
      item.first[a] = place.tile * params.unit[a] * params.grid[a];
      item.head = place.head;
      item.batch = place.batch;
      exists = exists && item.first[a] < item.group[a].q_count;
    }
    for (int i = 0; exists && i < 16 * params.item_heads; ++i) {
      const int32_t token = describe_row(params, item, consumer, row_offset[i % 16] - bases).token;
      const int32_t head = item.head + i / 16;
      if (token < 0) continue;
      const int64_t row = int64_t(token) * params.heads.divisor + head;
      bool nan = false;
      for (int d = lane; d < kDim; d += 32) nan |= isnan(float(static_cast<const T*>(params.out)[row * kDim + d]));
      if (__any_sync(~0u, nan)) recompute_out<T>(params.rows, token, head, kMaskProduct ? params.lse : nullptr);
    }
  }
}

}  // namespace jax_na::hopper
