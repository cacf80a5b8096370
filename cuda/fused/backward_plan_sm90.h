// Tile shapes of the Hopper backward: the boxes with the least estimated time for this problem's axes.
//
// The number of query boxes a key tile visits is a product over the axes, so its sum over all tiles is a product of sums
// per axis, and each of these depends on the lengths of both boxes there only. Exact at the edges of the axes (the ranges
// come from the window rule and its inverse).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "../common/problem.h"
#include "backward_sm90.h"
#include "planned_queries.h"

namespace jax_na::hopper {

struct BackwardBoxes {
  std::array<int32_t, kMaxRank> keys{1, 1, 1};
  std::array<int32_t, kMaxRank> queries{1, 1, 1};
  double cost_ns = 0;  // on one SM
  bool found = false;
};

// Sums over the key tiles of one axis, all dilation groups.
struct AxisVisits {
  double tiles = 0;
  double boxes = 0;
  double full_boxes = 0;
};

inline AxisVisits axis_visits(const Axis& axis, bool sharded, int32_t key_box, int32_t query_box) {
  AxisVisits sum;
  for (int32_t longer = 0; longer < 2; ++longer) {
    const int32_t num_longer = axis.kv_len % axis.dilation;
    const int32_t groups = longer ? num_longer : axis.dilation - num_longer;
    const int32_t length = axis.kv_len / axis.dilation + longer;
    if (groups == 0 || length == 0) continue;
    const PlannedQueries queries = planned_queries(axis, sharded, length);
    const auto needs = [&](int32_t i) {
      const Interval all = queries_of_key(axis, length, i);
      return Interval{std::max(all.begin, queries.first), std::min(all.end, queries.first + queries.count)};
    };
    for (int32_t first = 0; first < length; first += key_box) {
      const int32_t last = std::min(first + key_box, length) - 1;
      const Interval low = needs(first), high = needs(last);
      const int32_t boxes = (std::max(high.end - low.begin, 0) + query_box - 1) / query_box;
      sum.tiles += groups;
      sum.boxes += double(groups) * boxes;
      if (last - first + 1 == key_box) {
        const int32_t begin = (std::max(high.begin - low.begin, 0) + query_box - 1) / query_box;
        const int32_t end = (low.end - low.begin) / query_box;
        sum.full_boxes += double(groups) * std::max(end - begin, 0);
      }
    }
  }
  return sum;
}

// All box shapes of at most `volume` tokens worth a look: as long on axis 2 as fits, or balanced over the axis.
inline std::vector<std::array<int32_t, kMaxRank>> box_candidates(const Problem& problem, int32_t volume, bool keys) {
  int32_t limit[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t tokens = keys ? axis.kv_len : axis.q_len;
    limit[a] = std::min((tokens + axis.dilation - 1) / axis.dilation, volume);
    // TMA walks a dilated axis by element strides over at most 256 elements, unless the dilation divides the length.
    if (axis.dilation > 1 && tokens % axis.dilation != 0) {
      limit[a] = axis.dilation > 8 ? 0 : std::min(limit[a], 255 / axis.dilation + 1);
    }
  }
  std::vector<std::array<int32_t, kMaxRank>> boxes;
  int64_t largest = 0;
  for (int32_t n0 = 1; n0 <= limit[0]; ++n0) {
    for (int32_t n1 = 1; n1 <= limit[1] && n0 * n1 <= volume; ++n1) {
      const int32_t most = std::min(limit[2], volume / (n0 * n1));
      if (most < 1) continue;
      const int32_t balanced = (limit[2] + (limit[2] + most - 1) / most - 1) / ((limit[2] + most - 1) / most);
      boxes.push_back({n0, n1, most});
      if (balanced != most) boxes.push_back({n0, n1, balanced});
      largest = std::max<int64_t>(largest, int64_t(n0) * n1 * most);
    }
  }
  boxes.erase(std::remove_if(boxes.begin(), boxes.end(),
                             [&](const auto& box) { return int64_t(box[0]) * box[1] * box[2] * 4 < largest * 3; }),
              boxes.end());
  return boxes;
}

inline BackwardBoxes choose_backward_boxes(const Problem& problem, const BackwardRegime& regime) {
  std::array<std::map<std::pair<int32_t, int32_t>, AxisVisits>, kMaxRank> memo;
  const auto visits = [&](int a, int32_t keys, int32_t queries) -> const AxisVisits& {
    const auto [entry, fresh] = memo[a].try_emplace({keys, queries});
    if (fresh) entry->second = axis_visits(problem.axis[a], problem.sharded != 0, keys, queries);
    return entry->second;
  };
  const double tiles_of_space = double(problem.batch) * problem.kv_heads;
  const double boxes_of_space = double(problem.batch) * problem.heads;
  BackwardBoxes best;
  for (const auto& keys : box_candidates(problem, regime.keys, true)) {
    for (const auto& queries : box_candidates(problem, regime.queries, false)) {
      const AxisVisits &v0 = visits(0, keys[0], queries[0]), &v1 = visits(1, keys[1], queries[1]),
                       &v2 = visits(2, keys[2], queries[2]);
      const double tiles = v0.tiles * v1.tiles * v2.tiles * tiles_of_space;
      const double boxes = v0.boxes * v1.boxes * v2.boxes * boxes_of_space;
      double full = v0.full_boxes * v1.full_boxes * v2.full_boxes * boxes_of_space;
      if (keys[0] * keys[1] * keys[2] < regime.keys) full = 0;
      const double cost = tiles * regime.tile_ns + boxes * regime.box_ns + (boxes - full) * regime.masked_box_ns;
      if (!best.found || cost < best.cost_ns) best = {keys, queries, cost, true};
    }
  }
  return best;
}

}  // namespace jax_na::hopper
