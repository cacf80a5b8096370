// The consumers of the Hopper backward mainloop: one or two warpgroups of 64 keys each.
//
//   S^T = K Q^T, dP^T = V dO^T with keys on rows, P = exp2(S scale log2e - lse log2e), dS = P (dP - delta);
//   dV += P^T dO and dK += dS^T Q take P and dS from registers; dS goes through shared memory for dQ = dS K, which is added
//   in memory box by box.
// Source of the schedule: FlashAttention-3 (arXiv 2407.08608), backward; own: masks, dq path, run-time boxes.
#pragma once

#include "../arch/sm90/wgmma.h"
#include "../arch/sm90/wgmma_first.h"
#include "backward_epilogue_sm90.cuh"
#include "backward_mask_sm90.cuh"

namespace jax_na::hopper {

template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kScores = C::kQueries / 2;  // accumulator registers of S and dP
  using Grads = sm90::Wgmma<T, C::kDim>;
  using Stats = typename BackwardShared<C>::Stats;

  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int warpgroup;
  const int row;  // the thread's first key of the tile; the second is eight further

  // S^T or dP^T = keys or values (64 rows of this warpgroup) times queries or dO transposed, over the channels.
  __device__ __forceinline__ void issue_scores(float (&acc)[kScores], const uint8_t* keys, const uint8_t* queries) const {
    const uint64_t a = sm90::descriptor_k_major<C::kRowBytes>(sm90::smem_address(keys) + warpgroup * 64 * C::kRowBytes);
    const uint64_t b = sm90::descriptor_k_major<C::kRowBytes>(sm90::smem_address(queries));
    constexpr int kStepsPerBlock = C::kRowBytes / 32;
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int block = k / kStepsPerBlock, within = k % kStepsPerBlock * 32;
      const uint64_t a_step = sm90::descriptor_advance(a, block * C::kKeyBlockBytes + within);
      const uint64_t b_step = sm90::descriptor_advance(b, block * C::kQueryBlockBytes + within);
      if (k == 0) {
        sm90::WgmmaFirst<T, C::kQueries>::template ss<false, false>(acc, a_step, b_step);
      } else {
        sm90::Wgmma<T, C::kQueries>::template ss<false, false>(acc, a_step, b_step, true);
      }
    }
    sm90::wgmma_commit();
  }

  // dv or dk += P^T or dS^T (registers: 64 keys x queries) times dO or Q (queries x channels).
  __device__ __forceinline__ void issue_grads(float (&acc)[C::kDim / 2], const uint32_t (&a)[C::kQueries / 16][4],
                                              const uint8_t* queries) const {
    const uint64_t b = sm90::descriptor_mn_major<C::kRowBytes>(sm90::smem_address(queries), C::kQueryBlockBytes);
#pragma unroll
    for (int k = 0; k < C::kQueries / 16; ++k) {
      Grads::template rs<true>(acc, a[k], sm90::descriptor_advance(b, k * 16 * C::kRowBytes), true);
    }
    sm90::wgmma_commit();
  }

  // dq of 64 queries = dS (all keys of the tile) times K, this warpgroup's queries or channels.
  __device__ __forceinline__ void issue_dq(float (&acc)[C::kDqChannels / 2], const uint8_t* ds, const uint8_t* keys) const {
    const int query_block = C::kSplitChannels ? 0 : warpgroup;
    const uint64_t a = sm90::descriptor_mn_major<128>(sm90::smem_address(ds) + query_block * C::kKeys * 128, 0);
    const int channel = C::kSplitChannels ? warpgroup * C::kDqChannels : 0;
    const uint32_t offset = channel / C::kBlockChannels * C::kKeyBlockBytes + channel % C::kBlockChannels * 2;
    const uint64_t b = sm90::descriptor_mn_major<C::kRowBytes>(sm90::smem_address(keys) + offset, C::kKeyBlockBytes);
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      const uint64_t a_step = sm90::descriptor_advance(a, k * 16 * 128);
      const uint64_t b_step = sm90::descriptor_advance(b, k * 16 * C::kRowBytes);
      if (k == 0) {
        sm90::WgmmaFirst<T, C::kDqChannels>::template ss<true, true>(acc, a_step, b_step);
      } else {
        sm90::Wgmma<T, C::kDqChannels>::template ss<true, true>(acc, a_step, b_step, true);
      }
    }
    sm90::wgmma_commit();
  }

  // Of the thread's two rows.
  __device__ __forceinline__ RowMask rows_mask(const BoxRecord& record, uint32_t slot, uint32_t tile_slot) const {
    RowMask mask;
    if constexpr (C::kHelperThreads > 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) mask.word[h] = shared.mask[slot][row + 8 * h][threadIdx.x % 4];
    } else {
      mask_rows(mask.word, params, shared, shared.tile[tile_slot], record, row, threadIdx.x % 4);
    }
    return mask;
  }

  template <bool kMasked>
  __device__ __forceinline__ void probabilities(float (&s)[kScores], const Stats& stats, const RowMask& mask) const {
    const float scale_log2 = params.scale_log2;
#pragma unroll
    for (int j = 0; j < C::kQueries / 8; ++j) {
      const float2 lse = stats.lse_pair(8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[4 * j + i] = exp2f_approximate(fmaf(s[4 * j + i], scale_log2, -(i % 2 ? lse.y : lse.x)));
      }
    }
    if constexpr (kMasked) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // bits in order, so that seven become predicates at once
#pragma unroll
        for (int bit = 0; bit < C::kQueries / 4; ++bit) {
          if ((mask.word[h] >> bit & 1) == 0) s[bit / 2 * 4 + 2 * h + bit % 2] = 0.0f;
        }
      }
    }
  }

  static __device__ __forceinline__ float exp2f_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // dp becomes dS.
  __device__ __forceinline__ void score_grads(float (&dp)[kScores], const float (&p)[kScores], const Stats& stats) const {
#pragma unroll
    for (int j = 0; j < C::kQueries / 8; ++j) {
      const float2 delta = stats.delta_pair(8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - (i % 2 ? delta.y : delta.x));
    }
  }

  static __device__ __forceinline__ void pack_fragments(uint32_t (&out)[C::kQueries / 16][4], const float (&in)[kScores]) {
#pragma unroll
    for (int k = 0; k < C::kQueries / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[k][i] = sm90::pack_pair<T>(in[8 * k + 2 * i], in[8 * k + 2 * i + 1]);
    }
  }

  // dS to shared memory: [64-query block][key row][64 queries], 128-byte swizzle.
  __device__ __forceinline__ void store_ds(uint8_t* ds, const uint32_t (&fragments)[C::kQueries / 16][4]) const {
    const int lane = threadIdx.x % 32;
    const int matrix_row = row - lane / 4 + (lane / 8 % 2) * 8 + lane % 8;
    const uint32_t base = sm90::smem_address(ds) + matrix_row * 128;
#pragma unroll
    for (int k = 0; k < C::kQueries / 16; ++k) {
      const int chunk = (2 * k + lane / 16) % 8;
      const uint32_t address = base + k / 4 * (C::kKeys * 128) + ((chunk ^ matrix_row % 8) * 16);
      sm90::stmatrix_x4(address, fragments[k][0], fragments[k][1], fragments[k][2], fragments[k][3]);
    }
  }

  // Where the two dq rows of this thread go, in elements of dq.
  struct DqTarget {
    int64_t offset;
    bool valid;
  };

  // The first of the thread's two dq rows in a box; the second is eight further.
  __device__ __forceinline__ int dq_row() const {
    return (C::kSplitChannels ? 0 : 64 * warpgroup) + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  // columns: of the shape of the tile's boxes.
  __device__ __forceinline__ void dq_targets(DqTarget (&target)[2], const BoxRecord& record,
                                             const int2 (&columns)[C::kQueries]) const {
    const int channel = C::kSplitChannels ? warpgroup * C::kDqChannels : 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 at = columns[dq_row() + 8 * h];
      target[h].offset = record.dq_offset + channel + int64_t(at.y) * (params.heads * C::kDim);
      target[h].valid = not_beyond(at.x, record.last);
    }
  }

  __device__ __forceinline__ void write_dq(const float (&acc)[C::kDqChannels / 2], const DqTarget (&target)[2],
                                           uint32_t slot, uint32_t tile_slot) const {
    if (params.dq == DqOutput::kFinal) {
      T* out[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        out[h] = target[h].valid ? static_cast<T*>(params.grad_query) + target[h].offset + 8 * (threadIdx.x % 4) : nullptr;
      }
      store_rows<T, C::kDqChannels>(out, acc, params.scale, params.nan_found);
    } else if (params.dq == DqOutput::kFixedSum) {
      add_fixed_dq(acc, target, slot, tile_slot);
    } else {
      add_dq(acc, target);
    }
  }

  __device__ __forceinline__ void add_dq(const float (&acc)[C::kDqChannels / 2], const DqTarget (&target)[2]) const {
    const int quad_lane = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Lane q of a quad: columns 2 q .. of the left block (even q), 2 (q - 1) .. of the right one (odd).
      float* const out =
          static_cast<float*>(params.grad_query_sums) + target[h].offset + quad_lane / 2 * 4 + quad_lane % 2 * 8;
#pragma unroll
      for (int j = 0; j < C::kDqChannels / 8; j += 2) {
        const float4 x =
            four_neighbours(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1], acc[4 * j + 4 + 2 * h], acc[4 * j + 5 + 2 * h]);
        sm90::reduce_add_x4(out + 8 * j, x, target[h].valid);
      }
    }
  }

  __device__ __forceinline__ void add_fixed_dq(const float (&acc)[C::kDqChannels / 2], const DqTarget (&target)[2],
                                               uint32_t slot, uint32_t tile_slot) const {
    const TileRecord<C>& tile = shared.tile[tile_slot];
    const Extrema extrema = params.extrema[int64_t(tile.batch) * params.kv_heads.divisor + tile.head];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = dq_row() + 8 * h;
      const float unit =
          power_of_two(30 - fixed_point_exponent(shared.grad_norm[slot][query], shared.stats[slot].delta(query), extrema));
      uint64_t* const out =
          reinterpret_cast<uint64_t*>(static_cast<int32_t*>(params.grad_query_sums) + target[h].offset) + threadIdx.x % 4;
      float not_finite = 0.0f;
#pragma unroll
      for (int j = 0; j < C::kDqChannels / 8; ++j) {
        const float even = acc[4 * j + 2 * h], odd = acc[4 * j + 2 * h + 1];
        not_finite = fmaf(even, 0.0f, fmaf(odd, 0.0f, not_finite));
        sm90::reduce_add(out + 4 * j, pack_fixed(even * unit, odd * unit), target[h].valid);
      }
      if (target[h].valid && isnan(not_finite)) {
        params.grad_norms[shared.box[slot].stats_row + shared.query_row[tile.shape][query].y] = not_finite;
      }
    }
  }

  // One arrival per warp, for what all of its lanes have read.
  static __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) sm90::mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void store_tile(void* target, const TileRecord<C>& tile, const float (&acc)[C::kDim / 2],
                                             float factor) const {
    T* out[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t token = tile.token[row + 8 * h];
      const int64_t at = (tile.batch * params.key_tokens + token) * params.kv_heads.divisor + tile.head;
      out[h] = token >= 0 ? static_cast<T*>(target) + at * C::kDim + 8 * (threadIdx.x % 4) : nullptr;
    }
    store_rows<T, C::kDim>(out, acc, factor, params.nan_found);
  }

  // dk and dv leave, and start again at zero.
  __device__ __forceinline__ void finish_tile(float (&dk)[C::kDim / 2], float (&dv)[C::kDim / 2],
                                              uint32_t tile_slot) const {
    const TileRecord<C>& tile = shared.tile[tile_slot];
    store_tile(params.grad_key, tile, dk, params.scale);
    store_tile(params.grad_value, tile, dv, 1.0f);
    release(&shared.tile_empty[tile_slot]);
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;
  }

  // The number of boxes of the tile in this slot.
  __device__ __forceinline__ int32_t next_tile(const sm90::RingPosition<C::kTileStages>& tile_ring) const {
    sm90::mbarrier_wait(&shared.tile_full[tile_ring.slot], tile_ring.parity);
    return shared.tile[tile_ring.slot].boxes;
  }

  __device__ __forceinline__ void run() {
    sm90::RingPosition<C::kStages> ring;
    sm90::RingPosition<C::kKeyStages> key_ring;
    sm90::RingPosition<C::kTileStages> tile_ring;
    uint32_t ds_buffer = 0;
    int32_t left = next_tile(tile_ring);  // boxes of the tile
    if (left == kNoTile) return;
    float dk[C::kDim / 2], dv[C::kDim / 2], s[kScores], dp[kScores];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;
    sm90::mbarrier_wait(&shared.key_full[key_ring.slot], key_ring.parity);
    sm90::mbarrier_wait(&shared.full[ring.slot], ring.parity);
    sm90::wgmma_fence();
    issue_scores(s, shared.key[key_ring.slot], shared.query[ring.slot]);
    issue_scores(dp, shared.value[key_ring.slot], shared.grad_out[ring.slot]);
    // The only way out is the break where nothing is in flight: a path that leaves with products in flight would make the
    // compiler serialize all of them.
#pragma unroll 1
    for (;;) {
      const Stats& stats = shared.stats[ring.slot];
      const BoxRecord& record = shared.box[ring.slot];
      uint32_t p_fragments[C::kQueries / 16][4], ds_fragments[C::kQueries / 16][4];
      if (record.full) {
        sm90::wgmma_wait<1>();
        sm90::pin_registers(s);
        probabilities<false>(s, stats, RowMask());
      } else {
        const RowMask mask = rows_mask(record, ring.slot, tile_ring.slot);
        sm90::wgmma_wait<1>();
        sm90::pin_registers(s);
        probabilities<true>(s, stats, mask);
      }
      // PERF: dV runs behind dP while dS is made, dK behind dQ while dq leaves (dV and dK together: 5 to 10 % at D 128).
      pack_fragments(p_fragments, s);
      sm90::wgmma_fence();
      issue_grads(dv, p_fragments, shared.grad_out[ring.slot]);
      sm90::wgmma_wait<1>();
      sm90::pin_registers(dp);
      score_grads(dp, s, stats);
      pack_fragments(ds_fragments, dp);

      // Two buffers in turn make one barrier per box enough: whoever passes it has read the buffer of the box before.
      uint8_t* ds = shared.ds[C::kDsBuffers > 1 ? ds_buffer : 0];
      ds_buffer ^= 1;
      store_ds(ds, ds_fragments);
      sm90::fence_proxy_async();
      sm90::named_barrier_sync(kDsBarrier, C::kConsumerThreads);
      float dq[C::kDqChannels / 2];
      sm90::wgmma_fence();
      issue_dq(dq, ds, shared.key[key_ring.slot]);
      issue_grads(dk, ds_fragments, shared.query[ring.slot]);
      DqTarget target[2];
      dq_targets(target, record, shared.query_row[shared.tile[tile_ring.slot].shape]);
      sm90::wgmma_wait<1>();
      sm90::pin_registers(dq);
      write_dq(dq, target, ring.slot, tile_ring.slot);
      sm90::wgmma_wait<0>();
      sm90::pin_registers(dk);
      sm90::pin_registers(dv);
      release(&shared.empty[ring.slot]);
      ring.advance();

      // PERF: dk and dv leave while the first products of the next tile run, if these can start at once.
      const uint32_t tile_slot = tile_ring.slot;
      const bool tile_done = --left == 0;
      bool at_once = false;
      if (tile_done) {
        release(&shared.key_empty[key_ring.slot]);
        key_ring.advance();
        tile_ring.advance();
        if constexpr (C::kOverlapTiles) {
          at_once = __all_sync(~0u, sm90::mbarrier_test_wait(&shared.full[ring.slot], ring.parity));
        }
        if (!at_once) finish_tile(dk, dv, tile_slot);
        left = next_tile(tile_ring);
        if (left == kNoTile) break;
        sm90::mbarrier_wait(&shared.key_full[key_ring.slot], key_ring.parity);
      }
      sm90::mbarrier_wait(&shared.full[ring.slot], ring.parity);
      sm90::wgmma_fence();
      issue_scores(s, shared.key[key_ring.slot], shared.query[ring.slot]);
      issue_scores(dp, shared.value[key_ring.slot], shared.grad_out[ring.slot]);
      if constexpr (C::kOverlapTiles) {
        if (at_once) finish_tile(dk, dv, tile_slot);
      }
    }
  }
};

}  // namespace jax_na::hopper
