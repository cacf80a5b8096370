// A consumer of a Hopper forward kernel, a warpgroup of 64 queries: S = Q K^T, online softmax, O += P V.
#pragma once

#include "../arch/sm90/wgmma.h"
#include "forward_epilogue_sm90.cuh"

namespace jax_na::hopper {

// S (64 x kN) = Q (64 x kDim) K^T, with a mask + A B^T, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_qk(float (&s)[Config::kN / 2], uint64_t q, uint64_t k, uint64_t a, uint64_t b) {
  constexpr int kStepsPerBlock = Config::kRowElements / 16;
  q = sm90::descriptor_uniform(q);
  k = sm90::descriptor_uniform(k);
  sm90::pin_registers(s);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kDim / 16; ++i) {
    const int block = i / kStepsPerBlock, bytes = i % kStepsPerBlock * 32;
    sm90::Wgmma<typename Config::T, Config::kN>::template ss<false, false>(
        s, sm90::descriptor_advance(q, block * Config::kM * Config::kRowBytes + bytes),
        sm90::descriptor_advance(k, block * Config::kN * Config::kRowBytes + bytes), i != 0);
  }
  if constexpr (Config::kMaskProduct) {
    sm90::Wgmma<__nv_bfloat16, Config::kN>::template ss<false, false>(s, a, sm90::descriptor_uniform(b), true);
  }
  sm90::wgmma_commit();
}

// O (64 x kDim) += P (64 x kN) V, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_pv(float (&o)[Config::kDim / 2], uint32_t (&p)[Config::kSteps][4], uint64_t v) {
  v = sm90::descriptor_uniform(v);
  sm90::pin_registers(o);
#pragma unroll
  for (int i = 0; i < Config::kSteps; ++i) sm90::pin_registers(p[i]);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kSteps; ++i) {
    sm90::Wgmma<typename Config::T, Config::kDim>::template rs<true>(
        o, p[i], sm90::descriptor_advance(v, i * 16 * Config::kRowBytes), true);
  }
  sm90::wgmma_commit();
}

template <typename Config>
__device__ __forceinline__ void consume(const ForwardParams& params, ForwardStorage<Config>& smem, int wg) {
  using namespace sm90;
  using T = typename Config::T;
  constexpr int kN = Config::kN, kDim = Config::kDim;
  constexpr int kWords = ColumnMask<kN>::kWords;
  constexpr int kRows = Config::kRingConsumers * Config::kM;
  const int ring = Config::kShared ? 0 : wg;
  const int member = Config::kShared ? wg : 0;  // of the ring's consumers
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const float scale_log2 = params.scale * 1.4426950408889634f;
  auto& record = smem.record;
  // The rows of this warp, and of this thread (0 and 8): of the query tile of the last product, other_rows apart from those
  // of the one before.
  RowInfo* warp_rows = &record.row[ring][0][64 * member + 16 * warp];
  ptrdiff_t other_rows = kRows;
  if (lane < 16) warp_rows[lane].token = warp_rows[lane + kRows].token = -1;
  __syncwarp();

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kMaskSlots> mask_at;
  bool masked_by_product = false;  // the product with the keys at k_at reads the mask at mask_at
  int ahead = 0;                   // the keys at k_at belong to the tile so many after the values at v_at
  int left = 0;                    // key tiles of the query tile still to be taken; < 0: no more query tiles
  bool first = false;              // no product yet with the query tile
  const auto arrive = [lane](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto release_k = [&]() {
    arrive(&record.k_empty[ring][k_at.slot]);
    k_at.advance();
    if constexpr (Config::kMaskProduct) {
      if (masked_by_product) {
        arrive(&smem.mask_product.empty[member][mask_at.slot]);
        mask_at.advance();
        masked_by_product = false;
      }
    }
    ++ahead;
    if (--left == 0) {  // the last product with Q is done: the next queries may come
      arrive(&record.q_empty[ring][q_at.slot]);
      q_at.advance();
    }
  };
  const auto release_v = [&]() {
    arrive(&record.v_empty[ring][v_at.slot]);
    v_at.advance();
    --ahead;
  };
  // Gives back the values of tiles that were passed over, until `keep` tiles are left.
  const auto drain_v = [&](int keep) {
    while (ahead > keep) {
      mbarrier_wait(&record.v_full[ring][v_at.slot], v_at.parity);
      release_v();
    }
  };
  // Every consumer takes one turn per tile, also at those it passes over: the token then goes round without counting.
  const auto await_turn = [&]() {
    if (Config::kShared && params.take_turns) named_barrier_sync(1 + wg, 256);
  };
  const auto pass_turn = [&]() {
    if (Config::kShared && params.take_turns) named_barrier_arrive(1 + (wg + 1 == Config::kConsumers ? 0 : wg + 1), 256);
  };
  // Passes over tiles outside this warpgroup's windows, and from one query tile to the next. True if there is another one,
  // now loaded, at k_at; false if there is none, or none that can be waited for while values are held (`pending`).
  const auto find_tile = [&](bool pending) {
    for (;;) {
      if (pending && ahead > Config::kStages) return false;  // the producer can get no further
      if (!pending) drain_v(0);
      if (left == 0) {
        mbarrier_wait(&record.q_full[ring][q_at.slot], q_at.parity);
        left = __shfl_sync(~0u, record.item[ring][q_at.slot].num_tiles, 0);
        first = true;
      }
      if (left < 0) return false;
      mbarrier_wait(&record.k_full[ring][k_at.slot], k_at.parity);
      const uint32_t classes = __shfl_sync(~0u, record.tile[ring][k_at.slot].classes, 0) >> (2 * member);
      if (classes & kInside) {
        masked_by_product = Config::kMaskProduct && (classes & kFull) == 0;
        return true;
      }
      release_k();
      await_turn();
      pass_turn();
    }
  };
  const auto last_rows = [&]() { return warp_rows + other_rows + lane / 4; };  // of this thread
  // Windows and tokens of the warp's rows, by its first lanes.
  const auto describe_rows = [&]() {
    warp_rows += other_rows;
    other_rows = -other_rows;
    __syncwarp();  // the reads of two query tiles ago
    if (lane < 16) {
      const RowInfo row = describe_row(params, record.item[ring][q_at.slot], member, record.row_offset[16 * warp + lane]);
      if constexpr (Config::kMaskProduct) {  // its window is of no use here
        warp_rows[lane].token = row.token;
        warp_rows[lane].head = row.head;
      } else {
        warp_rows[lane] = row;
      }
    }
    __syncwarp();
  };
  // What the rows of the warp do not see of the tile at k_at, with masks of the thread's rows where these are needed. The
  // part of the outer axes is kept, since tiles vary fastest along the innermost.
  uint32_t mask[2][kWords], outer_mask[2][kWords];
  int32_t outer[2] = {INT32_MIN, INT32_MIN};  // which tiles that is: their shape and places on these axes
  const auto read_mask = [&]() {
    if constexpr (Config::kMaskProduct) {
      return kNothing;
    } else {
      const TileInfo tile = record.tile[ring][k_at.slot];
      if ((tile.classes >> (2 * member)) & kFull) return Hidden(tile.classes >> kTailBit);
      const int shape = Config::kShapes == 1 ? 0 : tile.classes >> kShapeBit & 1;
      const auto& columns = smem.mask[shape];
      const int32_t (&kv_box)[kMaxRank] = params.kv[shape].extent;
      const int quad = lane % 4;
      const RowInfo* const rows = warp_rows + lane / 4;
      const int32_t line = Config::kShapes * tile.begin[0] + shape;
      if (line != outer[0] || tile.begin[1] != outer[1]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) outer_mask[half][w] = ~0u;
          columns.restrict_axis(outer_mask[half], 0, rows[8 * half].keys[0], tile.begin[0], kv_box, quad);
          columns.restrict_axis(outer_mask[half], 1, rows[8 * half].keys[1], tile.begin[1], kv_box, quad);
        }
        outer[0] = line;
        outer[1] = tile.begin[1];
      }
      bool all = true;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) mask[half][w] = outer_mask[half][w];
        columns.restrict_axis(mask[half], 2, rows[8 * half].keys[2], tile.begin[2], kv_box, quad);
#pragma unroll
        for (int w = 0; w < kWords; ++w) all = all && mask[half][w] == ColumnMask<kN>::all(w);
      }
      return __any_sync(~0u, !all) ? kSome : kNothing;
    }
  };

  SoftmaxState state;
  bool nan_seen = false;
  float o[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
  const auto multiply_keys = [&](float (&s)[kN / 2]) {
    uint64_t a = 0, b = 0;
    if constexpr (Config::kMaskProduct) {
      auto& product = smem.mask_product;
      if (masked_by_product) mbarrier_wait(&product.full[member][mask_at.slot], mask_at.parity);
      a = descriptor_plain(smem_address(product.row), 64 * 16);
      b = masked_by_product ? descriptor_plain(smem_address(product.tile_of(member, mask_at.slot)), kN * 16)
                            : descriptor_plain(smem_address(product.nothing), 0);
    }
    multiply_qk<Config>(s, descriptor_k_major<Config::kRowBytes>(smem_address(smem.q[wg][q_at.slot])),
                        descriptor_k_major<Config::kRowBytes>(smem_address(smem.k[ring][k_at.slot])), a, b);
  };
  const auto multiply_values = [&](uint32_t (&p)[Config::kSteps][4]) {
    mbarrier_wait(&record.v_full[ring][v_at.slot], v_at.parity);
    multiply_pv<Config>(o, p,
                        descriptor_mn_major<Config::kRowBytes>(smem_address(smem.v[ring][v_at.slot]),
                                                               16 * Config::kSteps * Config::kRowBytes));
  };
  // What can be done before the scores are there.
  const auto prepare = [&]() {
    if (first) {
      describe_rows();
      outer[0] = outer[1] = INT32_MIN;
    }
    return read_mask();
  };
  const auto finish = [&](const RowInfo* rows, float (&inverse)[2]) {
    finish_softmax<Config::kMaskProduct>(params, state, {rows[0].token, rows[8].token}, rows[0].head, lane, inverse);
  };
  const auto store = [&](const RowInfo* rows, const float (&inverse)[2]) {
    uint32_t nan[2];
    store_output<Config>(params, o, inverse, {rows[0].token, rows[8].token}, rows[0].head, lane, nan);
    nan_seen |= (nan[0] | nan[1]) != 0;
  };
  // The rows' maxima. True if the outputs have to be multiplied with factor, or, if `first`, leave.
  const auto begin_softmax = [&](float (&s)[kN / 2], Hidden hidden, float (&factor)[2]) {
    pin_registers(s);
    release_k();
    if (hidden != kNothing) {
      hidden == kSome ? apply_mask<kN>(s, mask) : apply_tail<kN>(s, hidden);
    }
    float inverse[2];
    if (first) {
      finish(last_rows(), inverse);
      state = SoftmaxState();
    }
    const bool rescale = update_max<kN, Config::kMaskProduct>(state, s, scale_log2, factor);
    if (first) {
      factor[0] = inverse[0];
      factor[1] = inverse[1];
    }
    return rescale | first;
  };
  const auto settle_output = [&](const float (&factor)[2]) {
    if (first) {
      store(last_rows(), factor);
      first = false;
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] *= factor[i / 2 % 2];
    }
  };

  if (Config::kShared && params.take_turns && wg == Config::kConsumers - 1)
    named_barrier_arrive(1, 256);  // the first turn is consumer 0's
  while (find_tile(false)) {
    uint32_t p[Config::kSteps][4];
    {
      float s[kN / 2];
      float factor[2];
      await_turn();
      multiply_keys(s);
      pass_turn();
      const Hidden hidden = prepare();
      wgmma_wait<0>();
      if (begin_softmax(s, hidden, factor)) settle_output(factor);
      exponentiate<kN, 0, kN / 8>(state, s, scale_log2);
      pack_probabilities<T, kN>(p, s);
    }
    while (find_tile(true)) {
      float s[kN / 2];
      float factor[2];
      await_turn();
      multiply_keys(s);
      multiply_values(p);
      pass_turn();
      const Hidden hidden = prepare();
      wgmma_wait<1>();
      bool rescale = begin_softmax(s, hidden, factor);
      // The product of the values runs on under the maxima and kEarly of the exponentials. The sums are in the condition
      // because the compiler would otherwise move these behind the branch. It must be false for every sum there is, a NaN
      // too: a warp that parts here waits for ever.
      constexpr int kEarly = Config::kEarlyGroups;
      exponentiate<kN, 0, kEarly>(state, s, scale_log2);
      if (kEarly > 0) rescale |= state.row_sum[0] + state.row_sum[1] < 0.0f;
      if (rescale) {
        wgmma_wait<0>();
        pin_registers(o);
        settle_output(factor);
      }
      wgmma_wait<0>();
      pin_registers(o);
      release_v();
      drain_v(1);  // or the producer could not get kStages further than the tile of p
      exponentiate<kN, kEarly, kN / 8>(state, s, scale_log2);
      pack_probabilities<T, kN>(p, s);
    }
    multiply_values(p);
    wgmma_wait<0>();
    pin_registers(o);
    release_v();
  }
  float inverse[2];
  finish(warp_rows + lane / 4, inverse);
  store(warp_rows + lane / 4, inverse);
  if (nan_seen) {
    recompute_nan_rows<T, kDim, Config::kMaskProduct>(params, member, &record.row_offset[16 * warp], 0,
                                                      blockIdx.x * Config::kRings + ring, gridDim.x * Config::kRings);
  }
}

}  // namespace jax_na::hopper
