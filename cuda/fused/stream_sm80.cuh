// What the kernels share around their products: the rows of a warp, the streams of columns, the way out for rows with a
// NaN.
//
// A stream has kStages buffers of kCols columns and a table that runs one chunk ahead of the copies. It offers `chunks`,
// write_columns(chunk) (the table) and load(chunk) (the copies), each called once per chunk, in order.
#pragma once

#include <type_traits>

#include "matmul_sm80.h"
#include "recompute_sm80.cuh"
#include "tile_sm80.h"

namespace jax_na::fused {

// The rows of a warp: what they see together, and the packed bounds and bias entries of the rows g and g + 8 of every 16
// that a thread holds in its accumulators.
template <int kRowTiles>
struct WarpRows {
  WarpWindow window;
  uint32_t low[kRowTiles][2], high[kRowTiles][2];
  int32_t bias[kRowTiles][2];

  // Also writes the tokens of the warp's rows to `row_token` of the tile.
  template <bool kRowsAreKeys>
  __device__ __forceinline__ void gather(const Params& p, const Tile& tile, int32_t* row_token) {
    constexpr int kWarpRows = 16 * kRowTiles;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int row = warp * kWarpRows + lane % kWarpRows;
    const Row mine = describe_row<kRowsAreKeys>(p, tile, row);
    row_token[row] = mine.token;
    window.gather(tile, mine, lane < kWarpRows);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = r * 16 + half * 8 + (lane >> 2);
        low[r][half] = __shfl_sync(0xffffffffu, mine.low, from);
        high[r][half] = __shfl_sync(0xffffffffu, mine.high, from);
        bias[r][half] = __shfl_sync(0xffffffffu, mine.bias, from);
      }
    }
  }

  // From here on the columns are additional keys: their words are 0, those of empty slots above every bound.
  __device__ __forceinline__ void turn_to_extra_keys() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) low[r][0] = low[r][1] = high[r][0] = high[r][1] = 0;
  }

  // Whether the row of accumulator element `i` of a row tile does not see the column of `word`.
  __device__ __forceinline__ bool hides(int r, int i, uint32_t word, uint32_t guards) const {
    return (((word - low[r][i >> 1]) | (high[r][i >> 1] - word)) & guards) != 0;
  }
};

// The bias of a head, or null.
template <class T>
__device__ __forceinline__ const T* head_bias(const Params& p, int64_t batch, int32_t head) {
  if (p.forward.bias == nullptr) return nullptr;
  const int64_t entries = int64_t(p.axis[0].bias_step) * (2 * p.axis[0].window - 1);
  return static_cast<const T*>(p.forward.bias) +
         (batch / (p.problem.batch / p.problem.bias_batch) * p.problem.heads + head) * entries;
}

// Bytes of a head's rows, and between neighbouring tokens.
template <class T>
struct HeadBytes {
  int key, value;
  int32_t query_step, out_step, key_step, value_step;

  __device__ __forceinline__ explicit HeadBytes(const Problem& problem)
      : key(problem.dim * static_cast<int>(sizeof(T))),
        value(problem.dim_v * static_cast<int>(sizeof(T))),
        query_step(problem.heads * key),
        out_step(problem.heads * value),
        key_step(problem.kv_heads * key),
        value_step(problem.kv_heads * value) {}
};

// One head's rows of a tensor, from token `first`.
template <class Void>
__device__ __forceinline__ auto head_rows(Void* tensor, int64_t first, int32_t head, int32_t step, int row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  Byte* const base = static_cast<Byte*>(tensor) + first * step + int64_t(head) * row_bytes;
  return Rows<Byte>{base, step, row_bytes};
}

// The keys and values that a tile of queries sees: the union's, then the additional ones. `Shared` has their buffers.
template <class C, class Shared>
struct KeyStream {
  using T = typename C::E::Storage;
  const Params& p;
  const Tile& tile;
  Shared& shared;
  HeadBytes<T> bytes;
  const char *key, *value;
  int64_t first_extra;
  int32_t kv_head;
  int window_chunks, chunks;
  const T* bias;
  ColumnWriter<C::kCols, C::kStages + 1> writer;

  __device__ __forceinline__ KeyStream(const Params& p, const Tile& tile, Shared& shared)
      : p(p), tile(tile), shared(shared), bytes(p.problem) {
    const Problem& problem = p.problem;
    kv_head = tile.head / (problem.heads / problem.kv_heads);
    const int64_t first_key = tile.batch * p.kv_tokens;
    first_extra = tile.batch * problem.num_extra;  // here: made in load(), it costs spills at D 32
    key = static_cast<const char*>(p.forward.key) + first_key * bytes.key_step + int64_t(kv_head) * bytes.key;
    value = static_cast<const char*>(p.forward.value) + first_key * bytes.value_step + int64_t(kv_head) * bytes.value;
    window_chunks = (tile.volume + C::kCols - 1) / C::kCols;
    chunks = window_chunks + (problem.num_extra + C::kCols - 1) / C::kCols;
    bias = head_bias<T>(p, tile.batch, tile.head);
    writer.restart(tile, threadIdx.x, 0);
  }

  // The rows of the tile's query head in a tensor like query, or like out.
  template <class Void>
  __device__ __forceinline__ auto like_query(Void* tensor) const {
    return head_rows(tensor, tile.batch * p.q_tokens, tile.head, bytes.query_step, bytes.key);
  }
  template <class Void>
  __device__ __forceinline__ auto like_out(Void* tensor) const {
    return head_rows(tensor, tile.batch * p.q_tokens, tile.head, bytes.out_step, bytes.value);
  }

  __device__ __forceinline__ void write_columns(int chunk) {
    if (chunk < window_chunks) {
      writer.template write<false>(p, tile, shared.columns, threadIdx.x, bias != nullptr);
    } else {
      writer.write_extra(tile, shared.columns, threadIdx.x, (chunk - window_chunks) * C::kCols, p.problem.num_extra);
    }
  }

  __device__ __forceinline__ void load(int chunk) {
    const int stage = chunk % C::kStages;
    RowSource k{key, bytes.key_step, bytes.key};
    RowSource v{value, bytes.value_step, bytes.value};
    if (chunk >= window_chunks) {
      k.base = static_cast<const char*>(p.forward.extra_key) + first_extra * bytes.key_step + int64_t(kv_head) * bytes.key;
      v.base =
          static_cast<const char*>(p.forward.extra_value) + first_extra * bytes.value_step + int64_t(kv_head) * bytes.value;
    }
    copy_rows<C::kCols, C::kRowBytes, C::kThreads>(ptx::shared_address(shared.key[stage]), k,
                                                   ptx::shared_address(shared.value[stage]), v,
                                                   shared.columns.token[chunk % (C::kStages + 1)]);
  }
};

// The queries that see a tile of keys, with their output gradients, lse and delta: those of all query heads of the key
// head, one head after the other; with additional keys as rows, this block's share of them.
template <class C, class Shared>
struct QueryStream {
  using T = typename C::E::Storage;
  const Params& p;
  const Tile& tile;
  Shared& shared;
  HeadBytes<T> bytes;
  const char *query, *grad_out;
  const float2* stats;
  int chunks_per_head, first_chunk, chunks;  // first_chunk: within its head
  int write_at, load_at, load_head;
  ColumnWriter<C::kCols, C::kStages + 1> writer;
  bool has_bias;

  __device__ __forceinline__ QueryStream(const Params& p, const Tile& tile, Shared& shared)
      : p(p), tile(tile), shared(shared), bytes(p.problem), has_bias(p.forward.bias != nullptr && !p.extra_rows) {
    const Problem& problem = p.problem;
    const int32_t heads_per_kv = problem.heads / problem.kv_heads, first_head = tile.head * heads_per_kv;
    const int64_t first_query = tile.batch * p.q_tokens;
    query = static_cast<const char*>(p.forward.query) + first_query * bytes.query_step + int64_t(first_head) * bytes.key;
    grad_out =
        static_cast<const char*>(p.backward.grad_out) + first_query * bytes.out_step + int64_t(first_head) * bytes.value;
    stats = p.stats + first_query * problem.heads + first_head;
    chunks_per_head = (tile.volume + C::kCols - 1) / C::kCols;
    const int all_chunks = chunks_per_head * heads_per_kv;
    const int share = (all_chunks + p.splits - 1) / p.splits;
    const int begin = p.extra_rows ? min(tile.split * share, all_chunks) : 0;
    chunks = p.extra_rows ? min(begin + share, all_chunks) - begin : all_chunks;
    first_chunk = write_at = load_at = chunks_per_head == 0 ? 0 : begin % chunks_per_head;
    load_head = chunks_per_head == 0 ? 0 : begin / chunks_per_head;
    writer.restart(tile, threadIdx.x, write_at);
  }

  __device__ __forceinline__ void write_columns(int) {
    if (write_at == chunks_per_head) {
      writer.restart(tile, threadIdx.x, 0);
      write_at = 0;
    }
    writer.template write<true>(p, tile, shared.columns, threadIdx.x, has_bias);
    ++write_at;
  }

  __device__ __forceinline__ void load(int chunk) {
    if (load_at == chunks_per_head) {
      load_at = 0;
      ++load_head;
    }
    ++load_at;
    const int stage = chunk % C::kStages;
    const int32_t* tokens = shared.columns.token[chunk % (C::kStages + 1)];
    const RowSource q{query + int64_t(load_head) * bytes.key, bytes.query_step, bytes.key};
    const RowSource o{grad_out + int64_t(load_head) * bytes.value, bytes.out_step, bytes.value};
    copy_rows<C::kCols, C::kRowBytes, C::kThreads>(ptx::shared_address(shared.query[stage]), q,
                                                   ptx::shared_address(shared.grad_out[stage]), o, tokens);
    if (threadIdx.x < C::kCols) {
      const int32_t token = tokens[threadIdx.x];
      ptx::copy_8(ptx::shared_address(&shared.stats[stage][threadIdx.x]),
                  stats + (token >= 0 ? int64_t(token) * p.problem.heads + load_head : 0), token >= 0);
    }
  }
};

// The first chunks. What was copied before joins the first group.
template <int kStages, class Stream>
__device__ __forceinline__ void start(Stream& stream) {
#pragma unroll
  for (int chunk = 0; chunk < kStages; ++chunk) {
    if (chunk < stream.chunks) stream.write_columns(chunk);
  }
  __syncthreads();
#pragma unroll
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < stream.chunks) stream.load(chunk);
    ptx::commit_group();
  }
}

// Waits for a chunk and requests the one that takes the place of the chunk before it.
template <int kStages, class Stream>
__device__ __forceinline__ void turn_to(Stream& stream, int chunk) {
  ptx::wait_group<kStages - 2>();
  __syncthreads();  // this chunk has arrived; the previous one's buffers and table slot are free
  if (chunk + kStages - 1 < stream.chunks) stream.load(chunk + kStages - 1);
  ptx::commit_group();
  if (chunk + kStages < stream.chunks) stream.write_columns(chunk + kStages);
}

// After the last chunk.
template <class Stream>
__device__ __forceinline__ void finish(const Stream& stream) {
  ptx::wait_group<0>();
  if (stream.chunks == 0) __syncthreads();  // nothing has waited for the rows, and their buffer becomes the staging area
}

// A NaN or an infinity among the columns that a row does not see has met a zero weight in the matrix product: rows that
// come out as NaN are computed again, one key at a time. `check[r][half]`: a sum over the row's results in this thread.
template <int kRowTiles>
struct TaintedRows {
  uint32_t lanes[kRowTiles][2];

  __device__ __forceinline__ void mark(int r, int half, float check, const int32_t* tokens) {
    const int lane = threadIdx.x & 31;
    lanes[r][half] = __ballot_sync(0xffffffffu, tokens[r * 16 + half * 8 + (lane >> 2)] >= 0 && check != check);
  }

  // recompute(row of the tile), by the whole warp.
  template <class Recompute>
  __device__ __forceinline__ void for_each(Recompute recompute) const {
    const int warp = threadIdx.x >> 5;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lanes[r][half] == 0) continue;
        for (int g = 0; g < 8; ++g) {
          if ((lanes[r][half] >> (4 * g) & 15u) != 0) {
            __syncwarp();
            recompute((warp * kRowTiles + r) * 16 + half * 8 + g);
          }
        }
      }
    }
  }
};

}  // namespace jax_na::fused
