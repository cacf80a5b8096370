// Tiles, the band of a tile, and how a band element finds its slot in the weights.
//
// A block works on one tile: a box of kTile tokens of one dilation group, one head, one batch entry. What the tile
// interacts with is the box spanned by its tokens' windows (inverse: by the queries that reach them), the *union*, walked
// row-major in chunks of kChunk columns. Coordinates inside a block are relative to the union (inverse: to the tile).
//
// Whether a query's window holds a key, on all axes at once: the three relative coordinates sit in the fields of one word,
// each field topped by a guard bit; key - first and last - key both keep every guard bit exactly if the key is inside
// (fields_inside). The slot of an inside element is linear(key) - linear(first), linear() being row-major in the window's
// shape.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/product.h"
#include "common/window.h"
#include "fused/geometry.h"

namespace jax_na::gemm {

constexpr int kTile = 64;   // tokens of a tile
constexpr int kChunk = 64;  // columns of the union taken at a time
constexpr int kWarps = 4;   // each warp owns 16 rows of the 64 x 64 tile product
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = kTile / kWarps;

struct Params {
  Problem problem;
  void* weights;
  void* per_query;
  void* per_key;
  const Shard* halo;
  int32_t box[kMaxRank];         // the tile's shape, in group coordinates; volume <= kTile
  FastDivisor tiles[kMaxRank];   // tiles of one dilation group
  FastDivisor groups[kMaxRank];  // tiles of the axis: dilation * tiles
  FastDivisor heads;             // heads a block may work on: query heads, or key/value heads (inverse)
  FastDivisor column_blocks;     // blocks of output columns (neighborhood, inverse)
  int32_t shift[kMaxRank];       // of the packed fields
  uint32_t guard;                // the guard bits
  uint32_t nowhere;              // a field value no window reaches
  int32_t volume;                // slots of a window
  int32_t any_causal;
  int32_t aligned;  // rows of `dim` elements are multiples of 16 bytes
};

// One axis of a block's tile and union.
struct TileAxis {
  GroupAxis group;
  int32_t first;   // ordinal of the tile's first token within its group
  int32_t count;   // tokens of the tile on this axis
  int32_t begin;   // group coordinate of the union's first column; inverse: its first query's ordinal
  int32_t extent;  // columns of the union
  int32_t step;    // kChunk in the mixed radix of the extents
  int32_t origin;  // local token of the union's column 0
};

struct Block {
  TileAxis axis[kMaxRank];
  int32_t columns;  // of the union
};

// A query's window: packed first key, packed last key plus twice the guard bits, and where its slots lie: that of a key at
// `base` plus linear(key) elements.
struct alignas(16) Row {
  uint32_t first, last;
  char* base;
};

__device__ __forceinline__ Shard shard_of(const Params& params, int axis) {
  const int row = axis - (kMaxRank - params.problem.rank);
  if (params.problem.sharded && row >= 0) return params.halo[row];
  return Shard{0, 0, params.problem.axis[axis].q_len};
}

__device__ __forceinline__ uint32_t pack(const Params& params, int32_t x0, int32_t x1, int32_t x2) {
  return (uint32_t(x0) << params.shift[0]) | (uint32_t(x1) << params.shift[1]) | uint32_t(x2);
}

__device__ __forceinline__ int32_t linear(const Params& params, int32_t x0, int32_t x1, int32_t x2) {
  return (x0 * params.problem.axis[1].window + x1) * params.problem.axis[2].window + x2;
}

// `key` comes with its guard bits set; they cancel one of the two in `last`.
__device__ __forceinline__ bool fields_inside(uint32_t key, uint32_t first, uint32_t last, uint32_t guard) {
  return (~((key - first) & (last - key)) & guard) == 0;
}

// What a block works on, from its index: tile fastest, then column block, head, batch.
struct Work {
  int32_t tile[kMaxRank];
  int32_t residue[kMaxRank];
  int32_t column_block, head;
  int64_t batch;

  __device__ Work(const Params& params, uint32_t index) {
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      uint32_t n = params.groups[a].split(index);
      tile[a] = params.tiles[a].split(n);
      residue[a] = n;
    }
    column_block = params.column_blocks.split(index);
    head = params.heads.split(index);
    batch = index;
  }
};

// n / d and the remainder for 0 <= n < 2^20: the quotient's error stays below the half that is added to n.
__device__ __forceinline__ int32_t small_divide(int32_t n, int32_t d, int32_t* remainder) {
  const int32_t quotient = __float2int_rz(__fdividef(n + 0.5f, d));
  *remainder = n - quotient * d;
  return quotient;
}

// kChunk = (s0, s1, s2) in the radix of the extents, so that a column advances by a chunk without a division.
__device__ __forceinline__ void set_steps(Block& block) {
  int32_t rest = kChunk;
#pragma unroll
  for (int a = kMaxRank - 1; a > 0; --a) rest = small_divide(rest, block.axis[a].extent, &block.axis[a].step);
  block.axis[0].step = rest;
  block.columns = block.axis[0].extent * block.axis[1].extent * block.axis[2].extent;
}

// A column of the union, as coordinates.
struct Column {
  int32_t index, x[kMaxRank];

  // `column` < kChunk.
  __device__ Column(const Block& block, int32_t column) : index(column) {
    column = small_divide(column, block.axis[2].extent, &x[2]);
    x[0] = small_divide(column, block.axis[1].extent, &x[1]);
  }

  __device__ __forceinline__ void advance(const Block& block) {
    index += kChunk;
    x[2] += block.axis[2].step;
    x[1] += block.axis[1].step;
    x[0] += block.axis[0].step;
    if (x[2] >= block.axis[2].extent) {
      x[2] -= block.axis[2].extent;
      ++x[1];
    }
    if (x[1] >= block.axis[1].extent) {
      x[1] -= block.axis[1].extent;
      ++x[0];
    }
  }
};

// Queries of a tile (pointwise, neighborhood): the union is made of keys.
__device__ __forceinline__ void query_tile_axis(const Params& params, const Work& work, int a, TileAxis* result) {
  const Axis& axis = params.problem.axis[a];
  TileAxis tile;
  tile.group = group_axis(axis, shard_of(params, a), work.residue[a], PlainDivisor{uint32_t(axis.dilation)});
  tile.first = work.tile[a] * params.box[a];
  tile.count = min(params.box[a], tile.group.q_count - tile.first);
  const int32_t q = tile.group.q_base + tile.first;
  tile.begin = keys_of_query(axis, tile.group.length, q).begin;
  // The whole window of the last query, also where a causal mask ends it early: so that slots map to columns alike.
  tile.extent = keys_of_query(axis, tile.group.length, q + max(tile.count, 1) - 1).begin + axis.window - tile.begin;
  tile.step = 0;
  tile.origin = tile.group.kv_first + (tile.begin - tile.group.kv_base) * axis.dilation;
  *result = tile;
}

// Keys of a tile (inverse): the union is made of queries. group.q_count counts the local queries of the group.
__device__ __forceinline__ void key_tile_axis(const Params& params, const Work& work, int a, TileAxis* result) {
  const Axis& axis = params.problem.axis[a];
  const Shard shard = shard_of(params, a);
  const int32_t d = axis.dilation;
  TileAxis tile;
  const int32_t residue = work.residue[a];
  const int32_t position = shard.kv_offset + residue;  // global; negative in a halo beyond the edge
  const int32_t base = position >= 0 ? position / d : -((d - 1 - position) / d);
  const int32_t group = position - base * d;
  const int32_t q_shift = shard.q_offset % d;
  const int32_t q_first = group >= q_shift ? group - q_shift : group - q_shift + d;
  tile.group.length = group_length(shard.length, d, group);
  tile.group.q_first = q_first;
  tile.group.q_base = (shard.q_offset + q_first) / d;
  tile.group.q_count = q_first < axis.q_len ? (axis.q_len - q_first + d - 1) / d : 0;
  tile.group.kv_first = residue;
  tile.group.kv_base = base;
  tile.first = work.tile[a] * params.box[a];
  const int32_t kv_count = residue < axis.kv_len ? (axis.kv_len - residue + d - 1) / d : 0;
  tile.count = min(params.box[a], kv_count - tile.first);
  const int32_t low = max(base + tile.first, 0), high = min(base + tile.first + tile.count, tile.group.length) - 1;
  tile.begin = 0;
  tile.extent = 0;
  if (low <= high) {
    const Interval from = queries_of_key(low, tile.group.length, axis.window, axis.stride, axis.causal != 0);
    const Interval to = queries_of_key(high, tile.group.length, axis.window, axis.stride, axis.causal != 0);
    tile.begin = max(from.begin - tile.group.q_base, 0);
    tile.extent = max(min(to.end - tile.group.q_base, tile.group.q_count) - tile.begin, 0);
  }
  tile.step = 0;
  tile.origin = q_first + tile.begin * d;
  *result = tile;
}

// The block of a query tile, for all threads; false if the tile lies beyond the end of its dilation group.
__device__ __forceinline__ bool make_query_block(const Params& params, const Work& work, Block& block) {
  if (threadIdx.x < 32) {
    if (threadIdx.x < kMaxRank) query_tile_axis(params, work, threadIdx.x, &block.axis[threadIdx.x]);
    __syncwarp();
    if (threadIdx.x == 0) set_steps(block);
  }
  __syncthreads();
  return block.axis[0].count > 0 && block.axis[1].count > 0 && block.axis[2].count > 0;
}

// The same of a key tile. A tile that no query reaches (a halo beyond the edge) has no columns.
__device__ __forceinline__ bool make_key_block(const Params& params, const Work& work, Block& block) {
  if (threadIdx.x < 32) {
    if (threadIdx.x < kMaxRank) key_tile_axis(params, work, threadIdx.x, &block.axis[threadIdx.x]);
    __syncwarp();
    if (threadIdx.x == 0) {
      const bool reached = block.axis[0].extent > 0 && block.axis[1].extent > 0 && block.axis[2].extent > 0;
      for (int a = 0; a < kMaxRank; ++a) block.axis[a].extent = max(block.axis[a].extent, 1);  // a legal radix
      set_steps(block);
      if (!reached) block.columns = 0;
    }
  }
  __syncthreads();
  return block.axis[0].count > 0 && block.axis[1].count > 0 && block.axis[2].count > 0;
}

// Local token of a column, or -1 where the tensor has none.
__device__ __forceinline__ int32_t column_token(const Params& params, const Block& block, const Column& column, bool keys) {
  if (column.index >= block.columns) return -1;
  int32_t token = 0;
  bool exists = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = params.problem.axis[a];
    const int32_t position = block.axis[a].origin + column.x[a] * axis.dilation;
    const int32_t len = keys ? axis.kv_len : axis.q_len;
    exists = exists && position >= 0 && position < len;
    token = token * len + position;
  }
  return exists ? token : -1;
}

// Local token of row `row` of the tile, or -1 where the tile overhangs.
__device__ __forceinline__ int32_t row_token(const Params& params, const Block& block, int32_t row, bool keys,
                                             int32_t (&r)[kMaxRank]) {
  row = small_divide(row, params.box[2], &r[2]);
  r[0] = small_divide(row, params.box[1], &r[1]);
  int32_t token = 0;
  bool exists = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = params.problem.axis[a];
    exists = exists && r[a] < block.axis[a].count;
    const int32_t start = keys ? block.axis[a].group.kv_first : block.axis[a].group.q_first;
    token = token * (keys ? axis.kv_len : axis.q_len) + start + (block.axis[a].first + r[a]) * axis.dilation;
  }
  return exists ? token : -1;
}

// The weights of one query and head, `offset` elements on.
template <typename T>
__device__ __forceinline__ char* weights_row(const Params& params, int64_t batch, int32_t token, int32_t head,
                                             int32_t offset) {
  const int64_t row = (batch * params.problem.q_tokens() + token) * params.problem.heads + head;
  return static_cast<char*>(params.weights) + (row * params.volume + offset) * int64_t(sizeof(T));
}

// The Row of a query of the tile. `visible`: last key seen; otherwise last key of the whole window.
template <typename T>
__device__ __forceinline__ Row tile_query_row(const Params& params, const Block& block, const Work& work, int32_t token,
                                              const int32_t (&r)[kMaxRank], bool visible) {
  int32_t first[kMaxRank], last[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = params.problem.axis[a];
    const TileAxis& tile = block.axis[a];
    const Interval seen = keys_of_query(axis, tile.group.length, tile.group.q_base + tile.first + r[a]);
    first[a] = seen.begin - tile.begin;
    last[a] = (visible ? seen.end : seen.begin + axis.window) - 1 - tile.begin;
  }
  return Row{pack(params, first[0], first[1], first[2]), pack(params, last[0], last[1], last[2]) + 2 * params.guard,
             weights_row<T>(params, work.batch, token, work.head, -linear(params, first[0], first[1], first[2]))};
}

__device__ __forceinline__ Row empty_row(const Params& params) { return Row{params.nowhere, 2 * params.guard, nullptr}; }

// The Row of a query of the union (inverse): window coordinates relative to the key tile, cut to it.
template <typename T>
__device__ __forceinline__ Row union_query_row(const Params& params, const Block& block, const Column& column,
                                               int64_t batch, int32_t token, int32_t head) {
  int32_t from[kMaxRank], first[kMaxRank], last[kMaxRank];
  bool reaches = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const TileAxis& tile = block.axis[a];
    const Interval seen =
        keys_of_query(params.problem.axis[a], tile.group.length, tile.group.q_base + tile.begin + column.x[a]);
    const int32_t origin = tile.group.kv_base + tile.first;
    from[a] = seen.begin - origin;
    first[a] = max(from[a], 0);
    last[a] = min(seen.end - 1 - origin, tile.count - 1);
    reaches = reaches && first[a] <= last[a];
  }
  if (!reaches) return empty_row(params);
  return Row{pack(params, first[0], first[1], first[2]), pack(params, last[0], last[1], last[2]) + 2 * params.guard,
             weights_row<T>(params, batch, token, head, -linear(params, from[0], from[1], from[2]))};
}

}  // namespace jax_na::gemm
