// The box of a tile: a cost model on the host.
//
// A tile of box (t0, t1, t2) walks the union of its rows' windows, so its cost is a constant for its beginning and end plus
// the chunks of the union. The box is free as long as it holds at most `rows` tokens; the model takes the one with the
// least cost over all tiles, and between kernels of 64 and 128 rows the one with the lower total. Plain C++: tested without
// a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/problem.h"
#include "../common/window.h"
#include "planned_queries.h"

namespace jax_na::fused {

struct TileChoice {
  int32_t box[kMaxRank] = {1, 1, 1};
  int32_t tiles[kMaxRank] = {1, 1, 1};  // along the longest dilation group
  double cost = 0;                      // of all tiles, in chunks times chunk cost
  double columns = 0;                   // average union of a tile
};

// Average extent of the union of `size` neighbouring rows of one axis, over the tiles of its first dilation group.
inline double average_extent(const Axis& axis, bool sharded, int32_t size, bool rows_are_keys) {
  const int32_t length = group_length(axis.kv_len, axis.dilation, 0);
  const int32_t window = std::min(axis.window, length), stride = std::min(axis.stride, window);
  const PlannedQueries queries = planned_queries(axis, sharded, length);
  const Interval query_side{queries.first, queries.first + queries.count}, key_side{0, length};
  const Interval rows = rows_are_keys ? key_side : query_side, cols = rows_are_keys ? query_side : key_side;
  const int32_t tiles = (rows.end - rows.begin + size - 1) / size;
  const int32_t step = std::max(1, tiles / 64);  // a sample is enough: the tiles in the middle are alike
  double sum = 0;
  int32_t count = 0;
  for (int32_t tile = 0; tile < tiles; tile += step) {
    const int32_t first = rows.begin + tile * size, last = std::min(first + size, rows.end) - 1;
    const auto bounds = [&](int32_t i) {
      return rows_are_keys ? queries_of_key(i, length, window, stride, axis.causal != 0)
                           : keys_of_query(i, length, window, stride, axis.causal != 0);
    };
    sum += std::max(0, std::min(bounds(last).end, cols.end) - std::max(bounds(first).begin, cols.begin));
    ++count;
  }
  return sum / count;
}

// chunk_cost and tile_cost in the same unit; cols: of a chunk.
inline TileChoice choose_tile(const Problem& problem, bool rows_are_keys, int rows, int cols, double chunk_cost,
                              double tile_cost) {
  std::vector<double> extent[kMaxRank];
  int32_t length[kMaxRank];
  double groups = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t len = rows_are_keys ? axis.kv_len : axis.q_len;
    length[a] = (len + axis.dilation - 1) / axis.dilation;
    groups *= std::min(axis.dilation, len);
    extent[a].push_back(0);
    for (int32_t size = 1; size <= std::min<int32_t>(rows, length[a]); ++size) {
      extent[a].push_back(average_extent(axis, problem.sharded != 0, size, rows_are_keys));
    }
  }
  TileChoice best;
  best.cost = INFINITY;
  for (int32_t t0 = 1; t0 < static_cast<int32_t>(extent[0].size()); ++t0) {
    for (int32_t t1 = 1; t0 * t1 <= rows && t1 < static_cast<int32_t>(extent[1].size()); ++t1) {
      const int32_t most = std::min<int32_t>(rows / (t0 * t1), static_cast<int32_t>(extent[2].size()) - 1);
      for (int32_t t2 = std::max(1, most / 2); t2 <= most; ++t2) {
        const int32_t tiles[kMaxRank] = {(length[0] + t0 - 1) / t0, (length[1] + t1 - 1) / t1, (length[2] + t2 - 1) / t2};
        const double columns = extent[0][t0] * extent[1][t1] * extent[2][t2];
        const double chunks = columns > 4 * cols ? columns / cols + 0.5 : std::ceil(columns / cols - 1e-9);
        const double cost = groups * tiles[0] * tiles[1] * tiles[2] * (tile_cost + chunk_cost * chunks);
        // On a tie, longer rows of tokens: they are neighbours in memory.
        if (cost <= best.cost * (1 + 1e-9)) {
          best.cost = std::min(cost, best.cost);
          best.columns = columns;
          const int32_t box[kMaxRank] = {t0, t1, t2};
          std::copy(box, box + kMaxRank, best.box);
          std::copy(tiles, tiles + kMaxRank, best.tiles);
        }
      }
    }
  }
  return best;
}

}  // namespace jax_na::fused
