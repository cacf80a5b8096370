// What a block works on: a box of rows, the union of the columns they see, and the stream of columns in chunks.
//
// Rows and columns are queries and keys (forward, grad_query) or keys and queries (grad_key, grad_value: the window rule's
// inverse). A block owns a box of at most kRows tokens of one dilation group. Per axis the columns that any row sees are
// the interval [begin(first row), end(last row)), because both bounds never decrease along the axis; the union is the box
// of these intervals. It is walked in row-major order in chunks of kCols columns: cp.async gathers row by row, so a chunk
// needs no box shape and only the last one can be partly empty.
//
// Masks. A column's coordinates inside the union are packed into one 32-bit word, one field per axis with a guard bit above
// it. A row sees a column iff on every axis low <= coordinate <= high. With the row's bounds packed alike, ((column - low)
// | (high - column)) & guards is zero exactly then: a field that underflows borrows from its guard bit. Three integer
// instructions an element, for any rank, stride and dilation. The same test on the first and last column of a chunk tells a
// warp whether the chunk is inside all of its windows (no mask) or outside (skipped).
#pragma once

#include "../common/call.h"
#include "../common/problem.h"
#include "../common/window.h"

namespace jax_na::fused {

constexpr int kColumnHasNone = -1;  // token of a slot of a chunk that holds no column

// n / divisor for 0 <= n < 2^31 by a multiplication; made on the host.
struct FastDivisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;
  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
#if defined(__CUDACC__)
  // Returns the remainder and leaves the quotient in n.
  __device__ __forceinline__ int32_t pop(uint32_t& n) const {
    if (divisor == 1) return 0;
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    const int32_t remainder = static_cast<int32_t>(n - quotient * divisor);
    n = quotient;
    return remainder;
  }
#endif
};

// One axis of a launch, from the rows' point of view; made on the host.
struct AxisParams {
  int32_t box = 1;  // rows of a tile
  int32_t window = 1, stride = 1, dilation = 1, causal = 0;
  int32_t row_len = 1, col_len = 1;          // tokens
  int32_t row_tokens = 1, col_tokens = 1;    // token numbers between neighbouring tokens of this axis
  int32_t bias_step = 1;                     // bias entries between neighbouring keys
  int32_t group_len = 1, longer_groups = 0;  // every dilation group has group_len tokens, the first longer_groups one more
};

struct Params {
  Problem problem;
  AxisParams axis[kMaxRank];
  ForwardBuffers forward;
  BackwardBuffers backward;
  float2* stats = nullptr;  // [batch, q axes, heads]: {lse * log2(e), delta - grad_lse}, written by grad_query's kernel
  float* bias_partial = nullptr;      // [blocks, bias entries of a head]: partial sums of the bias gradient
  float* extra_partial = nullptr;     // [splits][batch, num_extra, kv_heads, dim then dim_v]: partial sums
  int64_t batch_begin = 0;            // first batch entry of this launch
  int32_t box[kMaxRank] = {1, 1, 1};  // rows of a tile
  int32_t box_inverse[kMaxRank] = {65536, 65536, 65536};  // ceil(2^16 / box)
  FastDivisor tiles[kMaxRank];                            // tiles along the longest dilation group
  FastDivisor groups[kMaxRank];  // dilation groups; with extra_rows, the splits take the place of the last
  FastDivisor row_heads;         // heads of the rows
  int32_t heads_first = 0;       // 1: consecutive blocks take consecutive heads; 0: consecutive tiles
  int32_t extra_rows = 0;        // 1: the rows are the additional keys, the columns all queries
  int32_t splits = 1;            // of the columns of additional keys
  int32_t bias_entries = 0;      // per head
  uint32_t num_work = 0;         // tiles of this launch
  float scale_log2 = 0;          // scale * log2(e)
  int64_t q_tokens = 0;          // per batch entry
  int64_t kv_tokens = 0;
};

struct AxisTile {
  int32_t first;      // group coordinate of the tile's first row
  int32_t count;      // rows of the tile that exist
  int32_t length;     // of the dilation group, in the global tensor
  int32_t begin;      // group coordinate of the union's first column
  int32_t extent;     // of the union
  int32_t row_token;  // local token number of the first row: summed over the axes
  int32_t row_step;   // between neighbouring rows
  int32_t col_token;
  int32_t col_step;
  int32_t shift;  // of this axis' field in packed words
};

struct Tile {
  AxisTile axis[kMaxRank];
  // What the column writer reads, vector by vector: {extent 1, extent 2, token of column 0, columns}, {token steps, shift
  // 0}, {a chunk's columns as a coordinate, shift 1}.
  int4 walk, walk_tokens, walk_step;
  uint32_t guards;
  uint32_t none;  // word of a slot without a column, low bound of a row that sees nothing: above every coordinate of axis 0
  uint32_t last;  // word of the union's last column
  int32_t head;   // of the rows: query head or key/value head
  int32_t volume;  // of the union
  int32_t split;
  int64_t batch;
};

__device__ __forceinline__ int32_t floor_divide(int32_t a, int32_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Of small numbers, n < 2^16.
__device__ __forceinline__ int32_t small_divide(int32_t n, int32_t d) {
  return static_cast<int32_t>(__fdividef(static_cast<float>(n) + 0.5f, static_cast<float>(d)));
}

// Fills `tile` for work item `work`; called by one whole warp.
template <bool kRowsAreKeys, int kCols>
__device__ __forceinline__ void describe_tile(const Params& p, uint32_t work, Tile& tile) {
  const int lane = threadIdx.x & 31;
  const Problem& problem = p.problem;
  int32_t head = 0;
  if (p.heads_first) head = p.row_heads.pop(work);
  int32_t index[kMaxRank], group[kMaxRank];
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) index[a] = p.tiles[a].pop(work);
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) group[a] = p.groups[a].pop(work);
  if (!p.heads_first) head = p.row_heads.pop(work);
  int32_t extent = 1, col_token = 0, col_step = 0;
  if (lane < kMaxRank) {
    const int a = lane;
    const AxisParams& axis = p.axis[a];
    AxisTile t;
    const int32_t my_index = a == 0 ? index[0] : a == 1 ? index[1] : index[2];
    const int32_t my_group = a == 0 ? group[0] : a == 1 ? group[1] : group[2];
    if (kRowsAreKeys && p.extra_rows) {
      t.first = my_index * axis.box;
      t.count = min(axis.box, (a == 2 ? problem.num_extra : 1) - t.first);
      t.length = 0;
      t.begin = 0;
      t.extent = axis.col_len;
      t.row_token = t.first;
      t.row_step = 1;
      t.col_token = 0;
      t.col_step = axis.col_tokens;
    } else {
      const int32_t d = axis.dilation;
      const int32_t start = my_index * axis.box;  // in this group, local
      // Local columns of this group: token x0 + d * n at group coordinate col_base + n.
      int32_t x0 = my_group, col_base = 0, columns, rows, base = 0;
      if (!problem.sharded) {
        t.length = axis.group_len + (my_group < axis.longer_groups ? 1 : 0);
        columns = rows = t.length;
      } else {
        Shard shard{0, 0, 1};
        if (a >= kMaxRank - problem.rank) shard = p.forward.halo[a - (kMaxRank - problem.rank)];
        const int32_t row_len = axis.row_len, col_len = axis.col_len;
        const int32_t row_offset = kRowsAreKeys ? shard.kv_offset : shard.q_offset;
        const int32_t col_offset = kRowsAreKeys ? shard.q_offset : shard.kv_offset;
        base = floor_divide(row_offset + my_group, d);
        const int32_t g = row_offset + my_group - base * d;
        t.length = group_length(shard.length, d, g);
        rows = (row_len - my_group + d - 1) / d;
        col_base = floor_divide(col_offset - g, d);
        x0 = col_base * d + g - col_offset;  // in (-d, 0]
        if (x0 < 0) {
          x0 += d;
          col_base += 1;
        }
        columns = x0 < col_len ? (col_len - x0 + d - 1) / d : 0;
      }
      t.first = base + start;
      t.count = min(axis.box, rows - start);
      t.row_token = (my_group + start * d) * axis.row_tokens;
      t.row_step = d * axis.row_tokens;
      int32_t begin = 0, end = 0;
      if (kRowsAreKeys) {
        const int32_t first = max(t.first, 0), last = min(t.first + t.count, t.length) - 1;
        if (first <= last) {
          begin = queries_of_key(first, t.length, axis.window, axis.stride, axis.causal).begin;
          end = queries_of_key(last, t.length, axis.window, axis.stride, axis.causal).end;
        }
      } else if (t.count > 0) {
        begin = keys_of_query(t.first, t.length, axis.window, axis.stride, axis.causal).begin;
        end = keys_of_query(t.first + t.count - 1, t.length, axis.window, axis.stride, axis.causal).end;
      }
      begin = max(begin, max(col_base, 0));
      end = min(end, min(col_base + columns, t.length));
      t.begin = begin;
      t.extent = max(end - begin, 0);
      t.col_token = (x0 + (begin - col_base) * d) * axis.col_tokens;
      t.col_step = d * axis.col_tokens;
    }
    extent = t.extent;
    col_token = t.col_token;
    col_step = t.col_step;
    tile.axis[a] = t;
  }
  const int32_t extent0 = __shfl_sync(0xffffffffu, extent, 0);
  const int32_t extent1 = __shfl_sync(0xffffffffu, extent, 1);
  const int32_t extent2 = __shfl_sync(0xffffffffu, extent, 2);
  const int32_t col_step0 = __shfl_sync(0xffffffffu, col_step, 0);
  const int32_t col_step1 = __shfl_sync(0xffffffffu, col_step, 1);
  const int32_t col_step2 = __shfl_sync(0xffffffffu, col_step, 2);
  col_token += __shfl_sync(0xffffffffu, col_token, 1) + __shfl_sync(0xffffffffu, col_token, 2);  // in lane 0
  const int bits0 = 32 - __clz(max(extent0 - 1, 0)), bits1 = 32 - __clz(max(extent1 - 1, 0)),
            bits2 = 32 - __clz(max(extent2 - 1, 0));
  const int shift1 = bits2 + 1, shift0 = shift1 + bits1 + 1;
  if (lane < kMaxRank) tile.axis[lane].shift = lane == 0 ? shift0 : lane == 1 ? shift1 : 0;
  if (lane == 0) {
    tile.none = 1u << (shift0 + bits0);
    tile.guards = tile.none | (1u << (shift0 - 1)) | (1u << bits2);
    tile.last = (static_cast<uint32_t>(extent0 - 1) << shift0) + (static_cast<uint32_t>(extent1 - 1) << shift1) +
                static_cast<uint32_t>(extent2 - 1);
    tile.head = head;
    tile.split = group[2];
    tile.batch = p.batch_begin + work;
    tile.volume = extent0 * extent1 * extent2;
    const int32_t e1 = max(extent1, 1), e2 = max(extent2, 1);
    const int32_t lines = small_divide(kCols, e2), planes = small_divide(lines, e1);
    tile.walk = make_int4(e1, e2, col_token, tile.volume);
    tile.walk_tokens = make_int4(col_step0, col_step1, col_step2, shift0);
    tile.walk_step = make_int4(planes, lines - planes * e1, kCols - lines * e2, shift1);
  }
}

// One row of the tile: where it is and what it sees.
struct Row {
  int32_t token;  // local, or negative: the tile has no such row
  uint32_t low;   // packed bounds of the visible columns, inclusive; a row that sees none has low above every column
  uint32_t high;
  int32_t bias;  // a column's bias entry is column.bias - row.bias
};

template <bool kRowsAreKeys>
__device__ __forceinline__ Row describe_row(const Params& p, const Tile& tile, int row) {
  int32_t at[kMaxRank];
  const int line = row * p.box_inverse[2] >> 16;  // row / box[2]: exact for rows below 256
  at[2] = row - line * p.axis[2].box;
  at[0] = line * p.box_inverse[1] >> 16;
  at[1] = line - at[0] * p.axis[1].box;
  Row r{0, 0, 0, 0};
  bool exists = true, sees = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < kMaxRank - p.problem.rank && !(kRowsAreKeys && p.extra_rows)) continue;  // one token, which sees itself
    const AxisTile& t = tile.axis[a];
    const AxisParams& axis = p.axis[a];
    exists = exists && at[a] < t.count;
    const int32_t i = t.first + at[a];
    r.token += t.row_token + at[a] * t.row_step;
    Interval seen{0, 0};
    if (kRowsAreKeys && p.extra_rows) {
      seen = Interval{0, t.extent};
    } else if (kRowsAreKeys) {
      if (i >= 0 && i < t.length) seen = queries_of_key(i, t.length, axis.window, axis.stride, axis.causal);
      r.bias -= (i + axis.window - 1) * axis.bias_step;
    } else {
      seen = keys_of_query(i, t.length, axis.window, axis.stride, axis.causal);
      r.bias += (i - axis.window + 1) * axis.bias_step;
    }
    const int32_t low = max(seen.begin - t.begin, 0), high = min(seen.end - t.begin, t.extent) - 1;
    sees = sees && low <= high;
    r.low += static_cast<uint32_t>(low) << t.shift;
    r.high += static_cast<uint32_t>(high) << t.shift;
  }
  if (!exists) r.token = -1;
  if (!exists || !sees) {
    r.low = tile.none;
    r.high = 0;
  }
  return r;
}

// What the 16 or 32 rows of a warp see together: packed bounds of the union (any row) and the core (every row).
struct WarpWindow {
  uint32_t union_low, union_high, core_low, core_high;
  bool any;   // some row sees something
  bool core;  // every existing row sees something

  // `row` of the calling lane; lanes without a row pass `active` false.
  __device__ __forceinline__ void gather(const Tile& tile, const Row& row, bool active) {
    const uint32_t top = tile.none;
    const bool exists = active && row.token >= 0;
    const bool sees = exists && row.low != top;
    any = __any_sync(0xffffffffu, sees);
    core = any && !__any_sync(0xffffffffu, exists && !sees);
    union_low = union_high = core_low = core_high = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (tile.axis[a].extent <= 1) continue;
      const int shift = tile.axis[a].shift;
      const uint32_t end = a == 0 ? top : 1u << (tile.axis[a > 0 ? a - 1 : 0].shift - 1);  // the guard bit of this field
      const uint32_t field = end - (1u << shift);
      const uint32_t low = (row.low & field) >> shift, high = (row.high & field) >> shift;
      union_low |= __reduce_min_sync(0xffffffffu, sees ? low : 0x7fffffffu) << shift;
      core_low |= __reduce_max_sync(0xffffffffu, sees ? low : 0u) << shift;
      union_high |= __reduce_max_sync(0xffffffffu, sees ? high : 0u) << shift;
      core_high |= __reduce_min_sync(0xffffffffu, sees ? high : 0x7fffffffu) << shift;
    }
  }
};

// Classes of the columns of a chunk for a warp, one bit per 16 columns: `active` where some row sees some column, `edge`
// where not every row sees every column.
struct ChunkClass {
  uint32_t active, edge;
};

// From the packed words of the chunk; called by whole warps.
template <int kCols>
__device__ __forceinline__ ChunkClass classify(const Tile& tile, const WarpWindow& w, const uint32_t* words) {
  constexpr int kGroups = kCols / 16;
  const int group = threadIdx.x & (kGroups - 1);
  const uint32_t first = words[group * 16];
  uint32_t last = words[group * 16 + 15];
  const bool is_partial = last == tile.none;  // then the union ends in this group, or before it
  if (is_partial) last = tile.last;
  const uint32_t differs = first ^ last;
  const uint32_t below1 = (1u << tile.walk_tokens.w) - 1, below2 = (1u << tile.walk_step.w) - 1;
  uint32_t low = first, high = last;
  // Where an outer coordinate changes within the group, the inner ones may take any value.
  if (differs > below1) {
    low = first & ~below1;
    high = (last & ~below1) | (tile.last & below1);
  } else if (differs > below2) {
    low = first & ~below2;
    high = (last & ~below2) | (tile.last & below2);
  }
  const bool hidden = first == tile.none || (((high - w.union_low) | (w.union_high - low)) & tile.guards) != 0;
  const bool full = w.core && !is_partial && (((low - w.core_low) | (w.core_high - high)) & tile.guards) == 0;
  constexpr uint32_t kAll = (1u << kGroups) - 1;
  ChunkClass result;
  result.active = w.any ? __ballot_sync(0xffffffffu, !hidden) & kAll : 0;
  result.edge = __ballot_sync(0xffffffffu, !full) & kAll;
  return result;
}

// The same for additional keys, which every row sees.
template <int kCols>
__device__ __forceinline__ ChunkClass classify_extra(const uint32_t* words) {
  constexpr int kGroups = kCols / 16;
  const int group = threadIdx.x & (kGroups - 1);
  constexpr uint32_t kAll = (1u << kGroups) - 1;
  return ChunkClass{__ballot_sync(0xffffffffu, words[group * 16] == 0) & kAll,
                    __ballot_sync(0xffffffffu, words[group * 16 + 15] != 0) & kAll};
}

// Tables of the chunks in flight, in shared memory: one slot per chunk.
template <int kCols, int kSlots>
struct ColumnTable {
  int32_t token[kSlots][kCols];
  uint32_t word[kSlots][kCols];
  int32_t bias[kSlots][kCols];
};

// Walks the union's columns: lane `column` of the first kCols threads writes its column of one chunk after the other.
template <int kCols, int kSlots>
struct ColumnWriter {
  int32_t at0, at1, at2;  // coordinates of this thread's next column, relative to the union
  int32_t next;           // its number
  int32_t slot = 0;

  __device__ __forceinline__ void restart(const Tile& tile, int column, int first_chunk) {
    next = first_chunk * kCols + column;
    const int4 walk = tile.walk;
    const bool small = next < 65536;
    const int32_t line = small ? small_divide(next, walk.y) : next / walk.y;
    at2 = next - line * walk.y;
    at0 = small ? small_divide(line, walk.x) : line / walk.x;
    at1 = line - at0 * walk.x;
  }

  // A chunk of the union. Every thread calls it; `column` < kCols write.
  template <bool kRowsAreKeys>
  __device__ __forceinline__ void write(const Params& p, const Tile& tile, ColumnTable<kCols, kSlots>& table, int column,
                                        bool has_bias) {
    if (column < kCols) {
      const int4 walk = tile.walk, tokens = tile.walk_tokens, step = tile.walk_step;
      const bool exists = next < walk.w;
      const int32_t token = walk.z + at0 * tokens.x + at1 * tokens.y + at2 * tokens.z;
      const uint32_t word =
          (static_cast<uint32_t>(at0) << tokens.w) + (static_cast<uint32_t>(at1) << step.w) + static_cast<uint32_t>(at2);
      table.token[slot][column] = exists ? token : kColumnHasNone;
      table.word[slot][column] = exists ? word : tile.none;
      if (has_bias) {
        const AxisTile &t0 = tile.axis[0], &t1 = tile.axis[1], &t2 = tile.axis[2];
        const int32_t bias = (at0 + t0.begin) * p.axis[0].bias_step + (at1 + t1.begin) * p.axis[1].bias_step +
                             (at2 + t2.begin) * p.axis[2].bias_step;
        table.bias[slot][column] = kRowsAreKeys ? -bias : bias;
      }
      next += kCols;
      at2 += step.z;
      at1 += step.y;
      at0 += step.x;
      if (at2 >= walk.y) {
        at2 -= walk.y;
        at1 += 1;
      }
      if (at1 >= walk.x) {
        at1 -= walk.x;
        at0 += 1;
      }
    }
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

  // A chunk of the additional keys, from key `begin`.
  __device__ __forceinline__ void write_extra(const Tile& tile, ColumnTable<kCols, kSlots>& table, int column, int begin,
                                              int end) {
    if (column < kCols) {
      const bool exists = begin + column < end;
      table.token[slot][column] = exists ? begin + column : kColumnHasNone;
      table.word[slot][column] = exists ? 0 : tile.none;
    }
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }
};

}  // namespace jax_na::fused
