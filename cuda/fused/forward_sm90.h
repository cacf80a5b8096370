// Forward neighborhood attention for Hopper: TMA loads of unpermuted tensors, wgmma, warp specialisation.
//
// One kernel, top to bottom: parameters, what lies in shared memory, the producer (one thread per ring of tiles: decides which tiles
// there are, loads them, says how each consumer has to treat them), the consumers (a warpgroup per 64 queries: S = Q K^T, online softmax,
// O += P V), the epilogue. Everything about the problem is a run-time number; see plan_sm90.h for the tile shapes and DESIGN.md for why.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/sm90/barrier.h"
#include "../arch/sm90/tma.h"
#include "../arch/sm90/wgmma.h"
#include "../common/call.h"
#include "geometry.h"
#include "mask_sm90.h"
#include "token_map_sm90.h"

namespace jax_na::hopper {

// ---- parameters ----
struct ForwardParams {
  CUtensorMap q_map, k_map, v_map;  // q_map: boxes of one warpgroup's queries; k_map, v_map: boxes of one key tile
  TokenLayout q_layout, kv_layout;
  Axis axis[kMaxRank];
  Shard shard[kMaxRank];   // if halo is null
  const Shard* halo;       // device memory, [rank], or null
  int32_t rank;
  int32_t q_box[kMaxRank];
  int32_t kv_box[kMaxRank];
  int32_t kv_map_step[kMaxRank];  // map coordinates from one key tile to the next
  int32_t split_axis;             // of the consumers of a shared tile
  FastDivisor tiles[kMaxRank];    // query tiles per dilation group
  FastDivisor groups[kMaxRank];   // dilation
  FastDivisor heads;
  FastDivisor heads_per_kv;
  FastDivisor q_box_1, q_box_2;
  int32_t num_items;  // batch x heads x groups x tiles
  float scale;
  void* out;   // [batch, axes, heads, dim]
  float* lse;  // [batch, axes, heads]
};

template <typename T_, int kDim_, int kN_, int kConsumers_, bool kShared_, int kStages_, int kQStages_>
struct ForwardConfig {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kN = kN_;                  // key columns of a tile
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries
  static constexpr bool kShared = kShared_;       // one ring of key tiles for all consumers, or one each
  static constexpr int kStages = kStages_;        // key tiles in flight per ring
  static constexpr int kQStages = kQStages_;
  static constexpr int kM = 64;
  static constexpr int kRings = kShared ? 1 : kConsumers;
  static constexpr int kRingConsumers = kShared ? kConsumers : 1;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kRowBytes = kDim == 32 ? 64 : 128;  // of a TMA row: the swizzle span
  static constexpr int kRowElements = kRowBytes / 2;
  static constexpr int kBlocks = kDim / kRowElements;  // column blocks of a token
  // Consumers of a shared tile take turns at the tensor cores, so that the softmax of one runs under the products of another.
  static constexpr bool kTakeTurns = kShared;
};

// ---- shared memory ----
// How a consumer has to treat a key tile: two bits. Neither: outside its windows; kInside alone: mask it; both: every row sees every key.
constexpr uint32_t kInside = 1, kFull = 2;

// The windows of a run of queries on one axis: every query's keys lie in `any`, and keys in `all` are seen by every query.
struct WindowRange {
  Interval any;
  Interval all;
};

// What the producer says about a key tile.
struct TileInfo {
  int32_t begin[kMaxRank];  // group coordinates
  uint32_t classes;         // kInside, kFull of consumer w in bits 2w, 2w + 1
};

// What the producer says about a query tile.
struct ItemInfo {
  GroupAxis group[kMaxRank];
  int32_t first[kMaxRank];  // first query, local ordinal in the group
  int32_t batch;
  int32_t head;
  int32_t num_tiles;  // < 0: no more items
};

// What a consumer's row needs until its item is done.
struct RowInfo {
  Interval keys[kMaxRank];
  int32_t token;  // in [batch, axes], or -1: no such query
  int32_t unused;
};

template <typename Config>
struct ForwardStorage {
  using T = typename Config::T;
  static constexpr int kRings = Config::kRings;
  alignas(1024) T q[Config::kConsumers][Config::kQStages][Config::kM * Config::kDim];
  alignas(1024) T k[kRings][Config::kStages][Config::kN * Config::kDim];
  alignas(1024) T v[kRings][Config::kStages][Config::kN * Config::kDim];
  alignas(16) RowInfo row[Config::kConsumers][Config::kM];
  alignas(16) TileInfo tile[kRings][Config::kStages];
  alignas(16) WindowRange range[kRings][kMaxRank][Config::kRingConsumers];  // the producer's own
  ItemInfo item[kRings][Config::kQStages];
  alignas(16) ColumnMask<Config::kN> mask;
  alignas(8) uint64_t q_full[kRings][Config::kQStages], q_empty[kRings][Config::kQStages];
  uint64_t k_full[kRings][Config::kStages], k_empty[kRings][Config::kStages];
  uint64_t v_full[kRings][Config::kStages], v_empty[kRings][Config::kStages];
};

// ---- producer ----
__device__ __forceinline__ WindowRange window_range(const Axis& axis, const GroupAxis& group, int32_t first, int32_t count) {
  const int32_t last = min(first + count, group.q_count) - 1;
  const Interval low = keys_of_query(axis, group.length, group.q_base + first);
  const Interval high = keys_of_query(axis, group.length, group.q_base + last);
  return {{low.begin, high.end}, {high.begin, low.end}};
}

template <typename Config>
__device__ __forceinline__ void produce(const ForwardParams& params, ForwardStorage<Config>& smem, int ring) {
  using namespace sm90;
  constexpr int kRingConsumers = Config::kRingConsumers;
  constexpr int kRowElements = Config::kRowElements;
  const uint32_t q_bytes = params.q_box[0] * params.q_box[1] * params.q_box[2] * Config::kDim * 2;
  const uint32_t kv_volume = params.kv_box[0] * params.kv_box[1] * params.kv_box[2];
  const uint32_t kv_bytes = kv_volume * Config::kDim * 2;
  Shard shard[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const int row = a - (kMaxRank - params.rank);
    shard[a] = params.halo != nullptr && row >= 0 ? params.halo[row] : params.shard[a];
  }

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> kv_at;
  const int step = gridDim.x * Config::kRings;
  for (int index = blockIdx.x * Config::kRings + ring; index < params.num_items; index += step) {
    // Which queries: spatial tiles vary fastest, then dilation groups, heads, batch, so that CTAs share keys in L2.
    uint32_t n = index;
    int32_t tile[kMaxRank], first[kMaxRank];
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) tile[a] = params.tiles[a].split(n);
    GroupAxis group[kMaxRank];
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) group[a] = group_axis(params.axis[a], shard[a], params.groups[a].split(n));
    const int32_t head = params.heads.split(n);
    const int32_t batch = n;
    bool empty = false;
    int32_t extent[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      extent[a] = a == params.split_axis ? params.q_box[a] * kRingConsumers : params.q_box[a];
      first[a] = tile[a] * extent[a];
      empty = empty || first[a] >= group[a].q_count;
    }
    if (empty) continue;

    // Which keys, for the tile and for each consumer.
    Interval any[kMaxRank];
    int32_t num_tiles[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const WindowRange range = window_range(params.axis[a], group[a], first[a], extent[a]);
      any[a] = range.any;
      num_tiles[a] = (any[a].end - any[a].begin + params.kv_box[a] - 1) / params.kv_box[a];
#pragma unroll
      for (int w = 0; w < kRingConsumers; ++w) {
        WindowRange own = range;
        if (kRingConsumers > 1 && a == params.split_axis) {
          const int32_t w_first = first[a] + w * params.q_box[a];
          own = {{0, 0}, {0, 0}};  // no queries: every tile is outside
          if (w_first < group[a].q_count) own = window_range(params.axis[a], group[a], w_first, params.q_box[a]);
        }
        smem.range[ring][a][w] = own;
      }
    }

    // Queries.
    mbarrier_wait(&smem.q_empty[ring][q_at.slot], q_at.parity ^ 1);
    ItemInfo& info = smem.item[ring][q_at.slot];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      info.group[a] = group[a];
      info.first[a] = first[a];
    }
    info.batch = batch;
    info.head = head;
    info.num_tiles = num_tiles[0] * num_tiles[1] * num_tiles[2];
    uint64_t* const q_full = &smem.q_full[ring][q_at.slot];
    mbarrier_arrive_expect_tx(q_full, q_bytes * kRingConsumers);
#pragma unroll
    for (int w = 0; w < kRingConsumers; ++w) {
      int32_t x[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t ordinal = first[a] + (a == params.split_axis ? w * params.q_box[a] : 0);
        x[a] = group[a].q_first + ordinal * params.axis[a].dilation;
      }
      const MapCoords m = map_coords(params.q_layout, head * Config::kDim, x, batch);
      const uint32_t q_smem = smem_address(smem.q[Config::kShared ? w : ring][q_at.slot]);
#pragma unroll
      for (int b = 0; b < Config::kBlocks; ++b) {
        tma_load_5d(q_smem + b * Config::kM * Config::kRowBytes, &params.q_map, q_full, m.c[0] + b * kRowElements, m.c[1],
                    m.c[2], m.c[3], m.c[4]);
      }
    }
    q_at.advance();

    // Keys and values.
    uint32_t kv_head = head;
    kv_head = params.heads_per_kv.divide(kv_head);
    int32_t x[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      x[a] = group[a].kv_first + (any[a].begin - group[a].kv_base) * params.axis[a].dilation;
    }
    const MapCoords m = map_coords(params.kv_layout, kv_head * Config::kDim, x, batch);
    const auto classes_on = [&](int a, int32_t begin) {  // of one axis; over the axes they AND
      const int32_t end = begin + params.kv_box[a];
      uint32_t classes = 0;
#pragma unroll
      for (int w = 0; w < kRingConsumers; ++w) {
        const WindowRange range = smem.range[ring][a][w];
        if (begin < range.any.end && end > range.any.begin) classes |= kInside << (2 * w);
        if (begin >= range.all.begin && end <= range.all.end) classes |= kFull << (2 * w);
      }
      return classes;
    };
    const uint32_t possible = kv_volume == Config::kN ? 0xFFFFFFFFu : 0x55555555u;  // columns past the box need a mask
    int32_t begin_0 = any[0].begin, c3 = m.c[3];
    for (int t0 = 0; t0 < num_tiles[0]; ++t0) {
      const uint32_t classes_0 = classes_on(0, begin_0) & possible;
      int32_t begin_1 = any[1].begin, c2 = m.c[2];
      for (int t1 = 0; t1 < num_tiles[1]; ++t1) {
        const uint32_t classes_1 = classes_on(1, begin_1) & classes_0;
        int32_t begin_2 = any[2].begin, c1 = m.c[1];
        for (int t2 = 0; t2 < num_tiles[2]; ++t2) {
          const uint32_t classes = classes_on(2, begin_2) & classes_1;
          mbarrier_wait(&smem.k_empty[ring][kv_at.slot], kv_at.parity ^ 1);
          smem.tile[ring][kv_at.slot] = {{begin_0, begin_1, begin_2}, classes};
          mbarrier_arrive_expect_tx(&smem.k_full[ring][kv_at.slot], kv_bytes);
          const uint32_t k_smem = smem_address(smem.k[ring][kv_at.slot]);
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            tma_load_5d(k_smem + b * Config::kN * Config::kRowBytes, &params.k_map, &smem.k_full[ring][kv_at.slot],
                        m.c[0] + b * kRowElements, c1, c2, c3, m.c[4]);
          }
          mbarrier_wait(&smem.v_empty[ring][kv_at.slot], kv_at.parity ^ 1);
          mbarrier_arrive_expect_tx(&smem.v_full[ring][kv_at.slot], kv_bytes);
          const uint32_t v_smem = smem_address(smem.v[ring][kv_at.slot]);
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            tma_load_5d(v_smem + b * Config::kN * Config::kRowBytes, &params.v_map, &smem.v_full[ring][kv_at.slot],
                        m.c[0] + b * kRowElements, c1, c2, c3, m.c[4]);
          }
          kv_at.advance();
          begin_2 += params.kv_box[2];
          c1 += params.kv_map_step[2];
        }
        begin_1 += params.kv_box[1];
        c2 += params.kv_map_step[1];
      }
      begin_0 += params.kv_box[0];
      c3 += params.kv_map_step[0];
    }
  }
  mbarrier_wait(&smem.q_empty[ring][q_at.slot], q_at.parity ^ 1);
  smem.item[ring][q_at.slot].num_tiles = -1;
  mbarrier_arrive(&smem.q_full[ring][q_at.slot]);
}

// ---- consumers ----
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// S (64 x kN) = Q (64 x kDim) K^T, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_qk(float (&s)[Config::kN / 2], uint64_t q, uint64_t k) {
  constexpr int kStepsPerBlock = Config::kRowElements / 16;
  sm90::pin_registers(s);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kDim / 16; ++i) {
    const int block = i / kStepsPerBlock, bytes = i % kStepsPerBlock * 32;
    sm90::Wgmma<typename Config::T, Config::kN>::template ss<false, false>(
        s, sm90::descriptor_advance(q, block * Config::kM * Config::kRowBytes + bytes),
        sm90::descriptor_advance(k, block * Config::kN * Config::kRowBytes + bytes), i != 0);
  }
  sm90::wgmma_commit();
}

// O (64 x kDim) += P (64 x kN) V, committed, not waited for.
template <typename Config>
__device__ __forceinline__ void multiply_pv(float (&o)[Config::kDim / 2], uint32_t (&p)[Config::kN / 16][4], uint64_t v) {
  sm90::pin_registers(o);
#pragma unroll
  for (int i = 0; i < Config::kN / 16; ++i) sm90::pin_registers(p[i]);
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kN / 16; ++i) {
    sm90::Wgmma<typename Config::T, Config::kDim>::template rs<true>(
        o, p[i], sm90::descriptor_advance(v, i * 16 * Config::kRowBytes), true);
  }
  sm90::wgmma_commit();
}

// Running maximum and sum of a thread's two rows, of scores not yet scaled.
struct SoftmaxState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // of this thread's columns
};

template <int kN>
__device__ __forceinline__ void apply_mask(float (&s)[kN / 2], const uint32_t (&mask)[2][ColumnMask<kN>::kWords]) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int half = i / 2 % 2, bit = i / 4 * 2 + i % 2;
    if (((mask[half][bit / 32] >> (bit % 32)) & 1) == 0) s[i] = -INFINITY;
  }
}

// Scores to probabilities relative to the new maximum; factor: what earlier sums and outputs are to be multiplied with.
template <int kN>
__device__ __forceinline__ void update_softmax(SoftmaxState& state, float (&s)[kN / 2], float scale_log2, float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float tile_max = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
    for (int j = 1; j < kN / 8; ++j) tile_max = fmaxf(tile_max, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    const float row_max = fmaxf(state.row_max[half], quad_max(tile_max));
    const float offset = row_max == -INFINITY ? 0.0f : row_max * scale_log2;  // a row that sees no key yet
    factor[half] = exp2_approx(state.row_max[half] * scale_log2 - offset);
    state.row_max[half] = row_max;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * half + e];
        x = exp2_approx(fmaf(x, scale_log2, -offset));
        sum += x;
      }
    }
    state.row_sum[half] = state.row_sum[half] * factor[half] + sum;
  }
}

template <typename T, int kN>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[kN / 16][4], const float (&s)[kN / 2]) {
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) p[i / 4][i % 4] = sm90::pack_pair<T>(s[2 * i], s[2 * i + 1]);
}

// Rows of this warp: windows and output tokens, by its first sixteen lanes.
template <typename Config>
__device__ __forceinline__ void prepare_rows(const ForwardParams& params, const ItemInfo& item, RowInfo* rows, int w, int warp,
                                             int lane) {
  __syncwarp();  // the previous item's reads
  if (lane < 16) {
    uint32_t n = warp * 16 + lane;
    int32_t c[kMaxRank];
    c[2] = params.q_box_2.split(n);
    c[1] = params.q_box_1.split(n);
    c[0] = n;
    bool exists = c[0] < params.q_box[0];
    RowInfo row;
    int64_t token = item.batch;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const GroupAxis& group = item.group[a];
      int32_t ordinal = item.first[a] + c[a] + (a == params.split_axis ? w * params.q_box[a] : 0);
      exists = exists && ordinal < group.q_count;
      ordinal = min(ordinal, group.q_count - 1);
      row.keys[a] = keys_of_query(params.axis[a], group.length, group.q_base + ordinal);
      token = token * params.axis[a].q_len + group.q_first + ordinal * params.axis[a].dilation;
    }
    row.token = exists ? int32_t(token) : -1;
    row.unused = 0;
    rows[warp * 16 + lane] = row;
  }
  __syncwarp();
}

// O / row_sum to global memory, 16 bytes a thread: quads transpose 4x4 registers, so that four lanes hold 64 contiguous bytes.
template <typename Config>
__device__ __forceinline__ void store_output(const ForwardParams& params, const SoftmaxState& state, const float (&o)[Config::kDim / 2],
                                             const RowInfo* rows, int32_t head, int warp, int lane) {
  using T = typename Config::T;
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(state.row_sum[half]);
    const float inverse = 1.0f / sum;
    const int32_t token = rows[warp * 16 + lane / 4 + 8 * half].token;
    const int64_t row = int64_t(token) * params.heads.divisor + head;
    T* const out = static_cast<T*>(params.out) + row * Config::kDim;
#pragma unroll
    for (int block = 0; block < Config::kDim / 32; ++block) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * block + i) + 2 * half;
        r[i] = sm90::pack_pair<T>(o[at] * inverse, o[at + 1] * inverse);
      }
      // After both exchanges lane q holds what lanes 0..3 had in r[q].
      uint32_t send = q & 1 ? r[0] : r[1];
      uint32_t got = __shfl_xor_sync(~0u, send, 1);
      if (q & 1) r[0] = got; else r[1] = got;
      send = q & 1 ? r[2] : r[3];
      got = __shfl_xor_sync(~0u, send, 1);
      if (q & 1) r[2] = got; else r[3] = got;
      send = q & 2 ? r[0] : r[2];
      got = __shfl_xor_sync(~0u, send, 2);
      if (q & 2) r[0] = got; else r[2] = got;
      send = q & 2 ? r[1] : r[3];
      got = __shfl_xor_sync(~0u, send, 2);
      if (q & 2) r[1] = got; else r[3] = got;
      if (token >= 0) *reinterpret_cast<uint4*>(out + 32 * block + 8 * q) = make_uint4(r[0], r[1], r[2], r[3]);
    }
    if (token >= 0 && q == 0 && params.lse != nullptr) {
      params.lse[row] = state.row_max[half] * params.scale + __logf(sum);
    }
  }
}

template <typename Config>
__device__ __forceinline__ void consume(const ForwardParams& params, ForwardStorage<Config>& smem, int wg) {
  using namespace sm90;
  using T = typename Config::T;
  constexpr int kN = Config::kN, kDim = Config::kDim;
  constexpr int kWords = ColumnMask<kN>::kWords;
  const int ring = Config::kShared ? 0 : wg;
  const int member = Config::kShared ? wg : 0;  // of the ring's consumers
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const float scale_log2 = params.scale * 1.4426950408889634f;
  const int32_t kv_box[kMaxRank] = {params.kv_box[0], params.kv_box[1], params.kv_box[2]};
  RowInfo* const rows = smem.row[wg];
  const RowInfo& row_low = rows[warp * 16 + lane / 4];
  const RowInfo& row_high = rows[warp * 16 + lane / 4 + 8];

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> k_at, v_at;
  const auto arrive = [lane](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };

  if (Config::kTakeTurns && wg == Config::kConsumers - 1) named_barrier_arrive(1, 256);  // the first turn is consumer 0's
  for (;;) {
    mbarrier_wait(&smem.q_full[ring][q_at.slot], q_at.parity);
    const ItemInfo& item = smem.item[ring][q_at.slot];
    const int num_tiles = item.num_tiles;
    if (num_tiles < 0) break;
    const int32_t head = item.head;
    prepare_rows<Config>(params, item, rows, member, warp, lane);
    const uint64_t q = descriptor_k_major<Config::kRowBytes>(smem_address(smem.q[wg][q_at.slot]));

    int k_tile = 0, v_tile = 0;  // of the item: the next ones to take from the rings
    const auto release_k = [&]() {
      arrive(&smem.k_empty[ring][k_at.slot]);
      k_at.advance();
      ++k_tile;
    };
    const auto release_v = [&]() {
      arrive(&smem.v_empty[ring][v_at.slot]);
      v_at.advance();
      ++v_tile;
    };
    // Gives back the values of tiles that were passed over.
    const auto drain_v = [&](int end) {
      while (v_tile < end) {
        mbarrier_wait(&smem.v_full[ring][v_at.slot], v_at.parity);
        release_v();
      }
    };
    // Every consumer takes one turn per tile, also at those it passes over: the token then goes round without counting.
    const auto await_turn = [&]() {
      if constexpr (Config::kTakeTurns) named_barrier_sync(1 + wg, 256);
    };
    const auto pass_turn = [&]() {
      if constexpr (Config::kTakeTurns) named_barrier_arrive(1 + (wg + 1 == Config::kConsumers ? 0 : wg + 1), 256);
    };
    // Passes over tiles outside this warpgroup's windows, up to tile `end`. True if there is another one, now loaded, at k_at.
    const auto find_tile = [&](int end, bool values_too) {
      while (k_tile < end) {
        if (values_too) drain_v(k_tile);
        mbarrier_wait(&smem.k_full[ring][k_at.slot], k_at.parity);
        if ((smem.tile[ring][k_at.slot].classes >> (2 * member)) & kInside) return true;
        release_k();
        await_turn();
        pass_turn();
      }
      return false;
    };
    uint32_t mask[2][kWords];
    // Masks of the tile at k_at; false if every row sees every key.
    const auto read_mask = [&]() {
      const TileInfo tile = smem.tile[ring][k_at.slot];
      if ((tile.classes >> (2 * member)) & kFull) return false;
      smem.mask.row(mask[0], row_low.keys, tile.begin, kv_box, lane % 4);
      smem.mask.row(mask[1], row_high.keys, tile.begin, kv_box, lane % 4);
      return true;
    };
    const auto k_descriptor = [&]() {
      return descriptor_k_major<Config::kRowBytes>(smem_address(smem.k[ring][k_at.slot]));
    };
    const auto v_descriptor = [&]() {
      return descriptor_mn_major<Config::kRowBytes>(smem_address(smem.v[ring][v_at.slot]), kN * Config::kRowBytes);
    };

    SoftmaxState state;
    float o[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    bool any = false, q_released = false;
    while (find_tile(num_tiles, true)) {
      any = true;
      uint32_t p[kN / 16][4];
      int p_tile = k_tile;  // whose probabilities p holds
      {
        float s[kN / 2];
        float factor[2];
        await_turn();
        multiply_qk<Config>(s, q, k_descriptor());
        pass_turn();
        const bool masked = read_mask();
        wgmma_wait<0>();
        pin_registers(s);
        release_k();
        if (masked) apply_mask<kN>(s, mask);
        update_softmax<kN>(state, s, scale_log2, factor);
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= factor[i / 2 % 2];
        pack_probabilities<T, kN>(p, s);
      }
      // While the values of p_tile are held, the producer can get as far as the keys of p_tile + kStages.
      while (find_tile(min(num_tiles, p_tile + Config::kStages + 1), false)) {
        float s[kN / 2];
        float factor[2];
        const int s_tile = k_tile;
        drain_v(p_tile);
        await_turn();
        multiply_qk<Config>(s, q, k_descriptor());
        mbarrier_wait(&smem.v_full[ring][v_at.slot], v_at.parity);
        multiply_pv<Config>(o, p, v_descriptor());
        pass_turn();
        const bool masked = read_mask();
        wgmma_wait<1>();
        pin_registers(s);
        release_k();
        if (masked) apply_mask<kN>(s, mask);
        update_softmax<kN>(state, s, scale_log2, factor);
        wgmma_wait<0>();
        pin_registers(o);
        release_v();
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= factor[i / 2 % 2];
        pack_probabilities<T, kN>(p, s);
        drain_v(s_tile);  // or the producer could not get to the keys of s_tile + kStages
        p_tile = s_tile;
      }
      if (k_tile == num_tiles) {  // the last product with Q is done: the next queries may come
        arrive(&smem.q_empty[ring][q_at.slot]);
        q_released = true;
      }
      drain_v(p_tile);
      mbarrier_wait(&smem.v_full[ring][v_at.slot], v_at.parity);
      multiply_pv<Config>(o, p, v_descriptor());
      wgmma_wait<0>();
      pin_registers(o);
      release_v();
    }
    if (!q_released) arrive(&smem.q_empty[ring][q_at.slot]);
    q_at.advance();
    drain_v(num_tiles);
    if (any) store_output<Config>(params, state, o, rows, head, warp, lane);
  }
}

// ---- kernel ----
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  using Storage = ForwardStorage<Config>;
  extern __shared__ unsigned char dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) % 4;

  if (threadIdx.x == 0) {
    constexpr int kArrivals = 4 * Config::kRingConsumers;  // one lane of every consumer warp
    for (int r = 0; r < Config::kRings; ++r) {
      for (int i = 0; i < Config::kQStages; ++i) {
        mbarrier_init(&smem.q_full[r][i], 1);
        mbarrier_init(&smem.q_empty[r][i], kArrivals);
      }
      for (int i = 0; i < Config::kStages; ++i) {
        mbarrier_init(&smem.k_full[r][i], 1);
        mbarrier_init(&smem.k_empty[r][i], kArrivals);
        mbarrier_init(&smem.v_full[r][i], 1);
        mbarrier_init(&smem.v_empty[r][i], kArrivals);
      }
    }
    fence_barrier_init();
  }
  smem.mask.build(params.kv_box, threadIdx.x, Config::kThreads);
  if (params.kv_box[0] * params.kv_box[1] * params.kv_box[2] < Config::kN) {
    // Rows that no load will write: zeros, because 0 * NaN would reach the output.
    uint4* const v = reinterpret_cast<uint4*>(&smem.v);
    for (int i = threadIdx.x; i < int(sizeof(smem.v) / sizeof(uint4)); i += Config::kThreads) v[i] = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
  }
  __syncthreads();

  if (warpgroup == Config::kConsumers) {
    decrease_registers<Config::kProducerRegisters>();
    if (warp < Config::kRings && threadIdx.x % 32 == 0) produce<Config>(params, smem, warp);
  } else {
    increase_registers<Config::kConsumerRegisters>();
    consume<Config>(params, smem, warpgroup);
  }
}

// Null on success, else what failed.
template <typename Config>
const char* launch_forward(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(ForwardStorage<Config>) + 1024;
  static_assert(kBytes <= 232448, "shared memory of a Hopper CTA");
  // The attribute is per device and cheap to set; set once, it would hold for the first device only.
  const cudaError_t attribute =
      cudaFuncSetAttribute(forward_sm90<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (attribute != cudaSuccess) return cudaGetErrorString(attribute);
  const int items = (params.num_items + Config::kRings - 1) / Config::kRings;
  forward_sm90<Config><<<items < num_sms ? items : num_sms, Config::kThreads, kBytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
