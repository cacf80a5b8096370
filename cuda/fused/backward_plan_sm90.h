// Tile shapes of the Hopper backward: the boxes with the least estimated time for this problem's axes.
//
// The number of query boxes a key tile visits is a product over the axes, so with one shape of query boxes its sum over all
// tiles is a product of sums per axis, and each of these depends on the lengths of both boxes there only. From the best of
// these plans the search goes on to several shapes, over the classes of tiles that differ. Exact at the edges of the axes
// (the ranges come from the window rule and its inverse). Host only, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "../common/problem.h"
#include "geometry.h"
#include "planned_queries.h"

namespace jax_na::hopper {

// Keys of a tile and queries of a box, and what one box and one tile cost (nanoseconds on one SM of an H200, all CTAs of
// the SM together): the tile choice and the choice between two regimes of one head dimension go by these.
struct BackwardRegime {
  int32_t keys;
  int32_t queries;
  double box_ns;
  double masked_box_ns;  // further, if the box needs a mask
  double tile_ns;
  double choice_ns;  // further, if the tile has to choose a shape
};

// Regimes by head dimension; times measured on an H200 (see DESIGN.md, "Hopper, backward").
inline std::vector<BackwardRegime> backward_regimes(int32_t dim) {
  if (dim == 128) return {{128, 64, 2900, 140, 800, 0}};
  if (dim == 64) return {{128, 128, 2850, 270, 2000, 0}, {64, 64, 915, 140, 500, 0}};
  return {{64, 64, 510, 60, 840, 150}};
}

constexpr int kMostQueryShapes = 4;

using Box = std::array<int32_t, kMaxRank>;

struct BackwardBoxes {
  Box keys{1, 1, 1};
  std::vector<Box> queries;  // up to kMostQueryShapes; none: nothing found
  double cost_ns = 0;        // on one SM
};

// Key tiles of one axis that need as many queries, of which as many see every key, and how many such tiles there are in all
// dilation groups.
struct TileClass {
  int32_t range;
  Interval full;
  double tiles;
};

inline std::vector<TileClass> tile_classes(const Axis& axis, bool sharded, int32_t key_box) {
  std::map<std::array<int32_t, 3>, double> counts;
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
      const int32_t range = std::max(high.end - low.begin, 0);
      const bool whole = last - first + 1 == key_box && high.begin < low.end;
      counts[{range, whole ? high.begin - low.begin : 0, whole ? low.end - low.begin : 0}] += groups;
    }
  }
  std::vector<TileClass> classes;
  for (const auto& [tile, count] : counts) classes.push_back({tile[0], {tile[1], tile[2]}, count});
  return classes;
}

// Query boxes of a length that a tile visits, and those that see all its keys.
struct Visits {
  double boxes = 0;
  double full = 0;
};

inline Visits visits_of(const TileClass& tile, int32_t box) {
  const int32_t boxes = (tile.range + box - 1) / box;
  const int32_t begin = (tile.full.begin + box - 1) / box;
  const int32_t end = tile.full.end / box;
  return {double(boxes), double(std::max(end - begin, 0))};
}

// All box shapes of at most `volume` tokens worth a look: as long on axis 2 as fits, or balanced over the axis.
inline std::vector<Box> box_candidates(const Problem& problem, int32_t volume, bool keys) {
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
  std::vector<Box> boxes;
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

// The search for the boxes of one regime.
class BackwardSearch {
 public:
  BackwardSearch(const Problem& problem, const BackwardRegime& regime)
      : problem_(problem), regime_(regime), query_boxes_(box_candidates(problem, regime.queries, false)) {}

  BackwardBoxes run() {
    std::vector<BackwardBoxes> one_shape;  // the best of every key box
    for (const Box& keys : box_candidates(problem_, regime_.keys, true)) {
      BackwardBoxes best{keys, {}, 0};
      for (const Box& queries : query_boxes_) {
        const double cost = cost_of_one(keys, queries);
        if (best.queries.empty() || cost < best.cost_ns) best = {keys, {queries}, cost};
      }
      if (!best.queries.empty()) one_shape.push_back(best);
    }
    std::stable_sort(one_shape.begin(), one_shape.end(),
                     [](const auto& a, const auto& b) { return a.cost_ns < b.cost_ns; });
    BackwardBoxes best;
    double looks = 0;
    for (const BackwardBoxes& start : one_shape) {
      if (best.queries.empty()) best = start;
      if (start.cost_ns > kWorthMoreShapes * one_shape[0].cost_ns || looks > kMostLooks) break;
      looks += add_shapes(start, &best);
    }
    return best;
  }

 private:
  // More shapes than one save at most this; how many tiles, in all, are looked at to find them; what a shape has to save.
  static constexpr double kWorthMoreShapes = 1.15;
  static constexpr double kMostLooks = 2e7;
  static constexpr double kLeastGain = 0.995;

  const std::vector<TileClass>& classes(int a, int32_t key_box) {
    const auto [entry, fresh] = classes_[a].try_emplace(key_box);
    if (fresh) entry->second = tile_classes(problem_.axis[a], problem_.sharded != 0, key_box);
    return entry->second;
  }

  double tiles_cost(double tiles, bool choice) const {
    return tiles * problem_.batch * problem_.kv_heads * (regime_.tile_ns + (choice ? regime_.choice_ns : 0));
  }

  double boxes_cost(const Box& keys, Visits visits) const {
    if (keys[0] * keys[1] * keys[2] < regime_.keys) visits.full = 0;
    return (visits.boxes * (regime_.box_ns + regime_.masked_box_ns) - visits.full * regime_.masked_box_ns) *
           problem_.batch * problem_.heads;
  }

  // A product of one sum per axis.
  double cost_of_one(const Box& keys, const Box& queries) {
    double tiles = 1;
    Visits product{1, 1};
    for (int a = 0; a < kMaxRank; ++a) {
      const auto [entry, fresh] = sums_[a].try_emplace({keys[a], queries[a]});
      auto& [sum_tiles, sum] = entry->second;
      if (fresh) {
        for (const TileClass& tile : classes(a, keys[a])) {
          const Visits visits = visits_of(tile, queries[a]);
          sum_tiles += tile.tiles;
          sum.boxes += tile.tiles * visits.boxes;
          sum.full += tile.tiles * visits.full;
        }
      }
      tiles *= sum_tiles;
      product.boxes *= sum.boxes;
      product.full *= sum.full;
    }
    return tiles_cost(tiles, false) + boxes_cost(keys, product);
  }

  // Visits of the tiles of one axis by query boxes of every length: [length][class].
  std::vector<Visits> visits_table(int a, int32_t key_box) {
    int32_t longest = 0;
    for (const Box& box : query_boxes_) longest = std::max(longest, box[a]);
    const std::vector<TileClass>& tiles = classes(a, key_box);
    std::vector<Visits> table((longest + 1) * tiles.size());
    for (int32_t length = 1; length <= longest; ++length) {
      for (size_t i = 0; i < tiles.size(); ++i) table[length * tiles.size() + i] = visits_of(tiles[i], length);
    }
    return table;
  }

  // Adds the shapes that save most, one after the other; improves `best`. Returns the number of tiles looked at.
  double add_shapes(const BackwardBoxes& start, BackwardBoxes* best) {
    const std::vector<TileClass>* of_axis[kMaxRank];
    std::vector<Visits> table[kMaxRank];
    double num_tiles = 1, queries = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      of_axis[a] = &classes(a, start.keys[a]);
      table[a] = visits_table(a, start.keys[a]);
      double axis_tiles = 0, axis_queries = 0;
      for (const TileClass& tile : *of_axis[a]) axis_tiles += tile.tiles, axis_queries += tile.tiles * tile.range;
      num_tiles *= axis_tiles;
      queries *= axis_queries;
    }
    if (tiles_cost(num_tiles, true) + boxes_cost(start.keys, {queries / regime_.queries, queries / regime_.queries}) >=
        best->cost_ns) {
      return 0;  // even boxes without waste would not do
    }
    std::vector<Visits> least;  // of every class of tiles, with the shapes there are; no boxes: none yet
    // Calls use(class of tiles, their number, visits) with the boxes that the device takes if `box` is one more shape: the
    // first shape of those with the fewest boxes.
    const auto each = [&](const Box& box, const auto& use) {
      const Visits* row[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) row[a] = &table[a][box[a] * of_axis[a]->size()];
      size_t i = 0;
      for (size_t i0 = 0; i0 < of_axis[0]->size(); ++i0) {
        for (size_t i1 = 0; i1 < of_axis[1]->size(); ++i1) {
          const double boxes = row[0][i0].boxes * row[1][i1].boxes, full = row[0][i0].full * row[1][i1].full;
          const double count = (*of_axis[0])[i0].tiles * (*of_axis[1])[i1].tiles;
          for (size_t i2 = 0; i2 < of_axis[2]->size(); ++i2, ++i) {
            const Visits visits{boxes * row[2][i2].boxes, full * row[2][i2].full};
            const bool keep = !least.empty() && least[i].boxes <= visits.boxes;
            use(i, count * (*of_axis[2])[i2].tiles, keep ? least[i] : visits);
          }
        }
      }
    };
    const auto add = [&](const Box& box) {
      std::vector<Visits> next(of_axis[0]->size() * of_axis[1]->size() * of_axis[2]->size());
      each(box, [&](size_t i, double, const Visits& visits) { next[i] = visits; });
      least.swap(next);
    };
    BackwardBoxes found = start;
    add(start.queries[0]);
    double looks = 0;
    while (found.queries.size() < kMostQueryShapes) {
      const Box* next = nullptr;
      double cost = found.cost_ns * kLeastGain;
      for (const Box& box : query_boxes_) {
        Visits sum;
        each(box, [&](size_t, double count, const Visits& visits) {
          sum.boxes += count * visits.boxes;
          sum.full += count * visits.full;
        });
        const double with_box = tiles_cost(num_tiles, true) + boxes_cost(found.keys, sum);
        if (with_box < cost) cost = with_box, next = &box;
      }
      looks += double(least.size()) * query_boxes_.size();
      if (next == nullptr) break;
      found.queries.push_back(*next);
      found.cost_ns = cost;
      add(*next);
    }
    if (found.cost_ns < best->cost_ns) *best = found;
    return looks;
  }

  const Problem& problem_;
  const BackwardRegime& regime_;
  const std::vector<Box> query_boxes_;
  std::map<int32_t, std::vector<TileClass>> classes_[kMaxRank];
  std::map<std::pair<int32_t, int32_t>, std::pair<double, Visits>> sums_[kMaxRank];
};

struct BackwardPlan {
  int32_t regime = 0;
  BackwardBoxes boxes;
};

inline BackwardPlan choose_backward_plan(const Problem& problem) {
  BackwardPlan plan;
  const auto regimes = backward_regimes(problem.dim);
  for (size_t i = 0; i < regimes.size(); ++i) {
    const BackwardBoxes boxes = BackwardSearch(problem, regimes[i]).run();
    const bool first = plan.boxes.queries.empty();
    if (!boxes.queries.empty() && (first || boxes.cost_ns < plan.boxes.cost_ns)) plan = {int32_t(i), boxes};
  }
  return plan;
}

}  // namespace jax_na::hopper
