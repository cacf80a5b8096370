// Forward neighborhood attention for small windows on Hopper: TMA for the tiles, mma.sync per warp.
//
// With a 7x7 window, 64 queries see a union four times their window, and wgmma multiplies and the softmax exponentiates all
// of it. Here the unit is a warp with 16 queries (a 4x4 box): it picks the keys of its own union (10x10) out of the CTA's
// tile, row by row, because every lane of ldmatrix names the row it wants. The union is twice the window, the warps need no
// barrier among themselves, and instruction issue, which is what these problems are short of, halves. Producer, tile
// records and softmax are those of forward_sm90.h.
#pragma once

#include "../arch/sm80/matrix.h"
#include "forward_sm90.h"

namespace jax_na::hopper {

template <typename T_, int kDim_, int kRows_, int kWarps_, int kStages_, int kCtas_>
struct SmallForwardConfig {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kWarps_;  // consumers; one more warp produces
  static constexpr int kN = kRows_;       // key tokens of a tile
  static constexpr int kSteps = kN / 16;
  static_assert(kN % 16 == 0, "as the producer counts");
  static constexpr int kConsumers = kWarps;
  static constexpr Sharing kSharing = Sharing::kWarps;
  static constexpr int kStages = kStages_;
  static constexpr int kQStages = 2;
  static constexpr int kCtas = kCtas_;  // per SM
  static constexpr int kThreads = 32 * (kWarps + 1);
  static constexpr int kM = 16 * kWarps;  // queries of a tile
  static constexpr int kRings = 1;        // as the producer sees it: one ring, one consumer that needs every tile
  static constexpr int kRingConsumers = 1;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kRowElements = kDim;
  static constexpr int kBlocks = 1;
  static_assert(kDim == 32 || kDim == 64, "a token's row is one swizzle span");
};

// Where the keys of a warp lie in a tile, and which of them a row sees: ColumnMask over the box of a warp's keys.
struct WarpKeys {
  static constexpr int kColumns = kWarpColumns;
  static constexpr int kMaxEntries = kColumns + 2 * kMaxRank;
  uint32_t bits[kMaxEntries][4];  // as in ColumnMask
  uint16_t tile_row[kColumns];    // of a column, relative to the box's first key

  // box: of a warp's keys; tile: of the key tile.
  __device__ __forceinline__ void build(const int32_t (&box)[kMaxRank], const int32_t (&tile)[kMaxRank], int thread,
                                        int num_threads) {
    const int volume = box[0] * box[1] * box[2];
    const int lane = thread % 32;
    for (int i = thread; i < kColumns; i += num_threads) {
      const int line = i / box[2];
      const int row = ((line / box[1]) * tile[1] + line % box[1]) * tile[2] + (i - line * box[2]);
      tile_row[i] = i < volume ? row : 0;
    }
    for (int q = 0; q < 4; ++q) {
      const int column = lane / 2 * 8 + q * 2 + lane % 2;
      const bool exists = column < volume;
      const int line = column / box[2];
      const int c[kMaxRank] = {line / box[1], line % box[1], column - line * box[2]};
      int base = 0;
      for (int a = 0; a < kMaxRank; ++a) {
        for (int x = thread / 32; x <= box[a]; x += num_threads / 32) {
          const uint32_t value = __ballot_sync(~0u, exists && c[a] < x);
          if (lane == 0) bits[base + x][q] = value;
        }
        base += box[a] + 1;
      }
    }
  }
};

template <typename Config>
struct SmallForwardStorage {
  using T = typename Config::T;
  alignas(1024) T q[1][Config::kQStages][Config::kM * Config::kDim];
  alignas(1024) T k[1][Config::kStages][Config::kN * Config::kDim];
  alignas(1024) T v[1][Config::kStages][Config::kN * Config::kDim];
  alignas(16) ProducerStorage<1, 1, Config::kM, Config::kQStages, Config::kStages, Config::kQStages> record;
  WarpKeys keys;
};

// c += a b, or c = a b if kFirst.
template <typename T, bool kFirst>
__device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const float d0 = kFirst ? 0.0f : c[0], d1 = kFirst ? 0.0f : c[1], d2 = kFirst ? 0.0f : c[2], d3 = kFirst ? 0.0f : c[3];
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d0), "f"(d1), "f"(d2), "f"(d3));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d0), "f"(d1), "f"(d2), "f"(d3));
  }
}

// Byte offset of 16-byte chunk `chunk` of a row in a swizzled tile; chunk + 2s is at this offset ^ 32s.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (kRowBytes == 128 ? row % 8 : row / 2 % 4)) << 4);
}

// One warp: the tiles of every item in turn. kSteps: of 16 keys, enough for a warp's keys.
template <typename Config, int kSteps>
__device__ __forceinline__ void consume_small(const ForwardParams& params, SmallForwardStorage<Config>& smem, int warp) {
  using namespace sm90;
  using T = typename Config::T;
  constexpr int kDim = Config::kDim, kN = 16 * kSteps, kRowBytes = Config::kRowBytes;
  auto& record = smem.record;
  const int lane = threadIdx.x % 32;
  const float scale_log2 = params.scale * 1.4426950408889634f;
  const int last_row = params.unit[0] * params.unit[1] * params.unit[2] - 1;

  // Where this lane's row lies among the tile's queries.
  uint32_t q_offset = 0;
  {
    const uint32_t at = record.row_offset[16 * warp + lane % 16];
    const int32_t row =
        ((at & 255) * (params.unit[1] * params.grid[1]) + (at >> 8 & 255)) * (params.unit[2] * params.grid[2]) +
        (at >> 16 & 255);
    q_offset = swizzled<kRowBytes>(at >> 24 == 0 ? row : 0, lane / 16);
  }

  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kStages> kv_at;
  for (;;) {
    mbarrier_wait(&record.q_full[0][q_at.slot], q_at.parity);
    const int num_tiles = record.item[0][q_at.slot].num_tiles;
    if (num_tiles < 0) break;
    const int32_t head = record.item[0][q_at.slot].head;
    const RowInfo* const rows = &record.row[0][q_at.slot][16 * warp];
    const uint32_t q_smem = smem_address(smem.q[0][q_at.slot]) + q_offset;
    const bool has_rows = rows[0].token >= 0;  // rows follow one another: the first exists if any does

    SoftmaxState state;
    float o[kDim / 2];
    bool first_tile = true;
    for (int t = 0; t < num_tiles; ++t) {
      mbarrier_wait(&record.k_full[0][kv_at.slot], kv_at.parity);
      const TileInfo tile = record.tile[0][kv_at.slot];
      bool visible = has_rows;
      int32_t from[kMaxRank];  // first key of the warp's box, relative to the tile
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t begin = rows[0].keys[a].begin - tile.begin[a], end = rows[last_row].keys[a].end - tile.begin[a];
        visible = visible && begin < params.kv_box[a] && end > 0;
        from[a] = min(max(begin, 0), params.kv_box[a] - params.warp_keys[a]);
      }
      if (visible) {
        const int32_t first_row = (from[0] * params.kv_box[1] + from[1]) * params.kv_box[2] + from[2];
        const uint32_t k_smem = smem_address(smem.k[0][kv_at.slot]), v_smem = smem_address(smem.v[0][kv_at.slot]);
        uint32_t offset[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          offset[i] = swizzled<kRowBytes>(first_row + smem.keys.tile_row[16 * i + lane % 16], lane / 16);
        }
        // Windows.
        uint32_t mask[2][ColumnMask<kN>::kWords] = {{~0u}, {~0u}};
        int base = 0;
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          const int32_t extent = params.warp_keys[a];
          if (a == kMaxRank - 1 || params.axis[a].kv_len > 1) {
            const int32_t start = tile.begin[a] + from[a];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Interval keys = rows[lane / 4 + 8 * half].keys[a];
              const int32_t lo = min(max(keys.begin - start, 0), extent);
              const int32_t hi = min(max(keys.end - start, 0), extent);
              mask[half][0] &= smem.keys.bits[base + hi][lane % 4] & ~smem.keys.bits[base + lo][lane % 4];
            }
          }
          base += extent + 1;
        }
        // Scores.
        float s[kN / 2];
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          uint32_t q[4];
          sm80::load_matrix_x4(q, q_smem ^ (32 * d));
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            uint32_t b[4];
            sm80::load_matrix_x4(b, (k_smem + offset[i]) ^ (32 * d));
            if (d == 0) {
              mma<T, true>(s + 8 * i, q, b[0], b[2]);
              mma<T, true>(s + 8 * i + 4, q, b[1], b[3]);
            } else {
              mma<T, false>(s + 8 * i, q, b[0], b[2]);
              mma<T, false>(s + 8 * i + 4, q, b[1], b[3]);
            }
          }
        }
        apply_mask<kN>(s, mask);
        float factor[2];
        update_softmax<kN>(state, s, scale_log2, factor);
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] = first_tile ? 0.0f : o[i] * factor[i / 2 % 2];
        first_tile = false;
        uint32_t p[kN / 16][4];
        pack_probabilities<T, kN>(p, s);
        // Output.
        mbarrier_wait(&record.v_full[0][kv_at.slot], kv_at.parity);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int d = 0; d < kDim / 16; ++d) {
            uint32_t b[4];
            sm80::load_matrix_x4_transposed(b, (v_smem + offset[i]) ^ (32 * d));
            mma<T, false>(o + 8 * d, p[i], b[0], b[1]);
            mma<T, false>(o + 8 * d + 4, p[i], b[2], b[3]);
          }
        }
      } else {
        mbarrier_wait(&record.v_full[0][kv_at.slot], kv_at.parity);
      }
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(&record.k_empty[0][kv_at.slot]);
        mbarrier_arrive(&record.v_empty[0][kv_at.slot]);
      }
      kv_at.advance();
    }
    const int32_t tokens[2] = {rows[lane / 4].token, rows[lane / 4 + 8].token};
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&record.q_empty[0][q_at.slot]);
    q_at.advance();
    if (has_rows) {
      float inverse[2];
      finish_softmax(params, state, tokens, head, lane, inverse);
      uint32_t nan[2];
      store_output<Config>(params, o, inverse, tokens, head, lane, nan);
      if ((nan[0] | nan[1]) != 0) {
        recompute_out_rows<typename Config::T>(params.rows, make_int2(tokens[0], tokens[1]), head, nan[0], nan[1]);
      }
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    forward_small_sm90(const __grid_constant__ ForwardParams params) {
  using namespace sm90;
  using Storage = SmallForwardStorage<Config>;
  extern __shared__ unsigned char dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) smem.record.init_barriers(Config::kWarps);
  smem.record.build_row_offsets(params.unit, params.grid, 16, threadIdx.x, Config::kThreads);
  smem.keys.build(params.warp_keys, params.kv_box, threadIdx.x, Config::kThreads);
  __syncthreads();

  if (warp == Config::kWarps) {
    produce<Config>(params, smem, 0);
  } else if (params.warp_keys[0] * params.warp_keys[1] * params.warp_keys[2] <= 64) {
    consume_small<Config, 4>(params, smem, warp);
  } else {
    consume_small<Config, WarpKeys::kColumns / 16>(params, smem, warp);
  }
}

// Null on success, else what failed.
template <typename Config>
const char* launch_small(const ForwardParams& params, int32_t num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SmallForwardStorage<Config>) + 1024;
  static_assert((kBytes + 1024) * Config::kCtas <= 233472, "shared memory of a Hopper SM");
  if (const char* failure = allow_shared_memory<forward_small_sm90<Config>, kBytes>()) return failure;
  const int ctas = params.num_items < num_sms * Config::kCtas ? params.num_items : num_sms * Config::kCtas;
  forward_small_sm90<Config><<<ctas, Config::kThreads, kBytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_na::hopper
