// Host checks of the Hopper plan and geometry, called by test_hopper_plan.py. Each returns an error text, empty if all
// holds.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fused/backward_plan_sm90.h"
#include "fused/geometry.h"
#include "fused/mask_codes.h"
#include "fused/plan_sm90.h"
#include "fused/schedule_sm90.h"

using namespace jax_na;
using namespace jax_na::hopper;

namespace {

// Every key that a warp's queries see lies in the box of keys which the kernel derives for it, tile by tile.
std::string check_warp_keys(const Axis& axis, int32_t unit, int32_t grid, int32_t kv_box, int32_t warp_keys) {
  for (int32_t g = 0; g < axis.dilation; ++g) {
    const int32_t length = group_length(axis.kv_len, axis.dilation, g);
    for (int32_t first = 0; first < length; first += unit * grid) {
      const int32_t start = keys_of_query(axis, length, first).begin;
      for (int32_t w_first = first; w_first < std::min(first + unit * grid, length); w_first += unit) {
        const int32_t begin = keys_of_query(axis, length, w_first).begin;
        const int32_t end = keys_of_query(axis, length, std::min(w_first + unit, length) - 1).end;
        for (int32_t tile = start; tile < end; tile += kv_box) {
          const int32_t from = tile + std::min(std::max(begin - tile, 0), kv_box - warp_keys);
          if (std::max(begin, tile) < std::min(end, tile + kv_box) &&
              (std::max(begin, tile) < from || std::min(end, tile + kv_box) > from + warp_keys)) {
            return "keys of queries from " + std::to_string(w_first) + " leave the box in the tile at " +
                   std::to_string(tile);
          }
        }
      }
    }
  }
  return "";
}

// What a kWarps kernel relies on beside the boxes of its warps.
std::string check_small(const Problem& problem, const ForwardPlan& plan, int32_t boxes, int32_t warp_keys) {
  const SmallPlan& small = plan.small;
  const int32_t total = small_layout(plan).total_bytes;
  int32_t coordinates = 0;
  bool one_tile = true;
  for (int a = 0; a < kMaxRank; ++a) {
    coordinates += plan.unit[a] * plan.grid[a];
    const Axis& axis = problem.axis[a];
    for (int32_t g = 0; g < axis.dilation; ++g) {
      const int32_t length = group_length(axis.kv_len, axis.dilation, g), extent = plan.unit[a] * plan.grid[a];
      for (int32_t first = 0; first < length; first += extent) {
        const int32_t last = std::min(first + extent, length) - 1;
        one_tile =
            one_tile && keys_of_query(axis, length, last).end - keys_of_query(axis, length, first).begin <= plan.kv_box[a];
      }
    }
  }
  if (warp_keys > kWarpColumns) return "too many keys for a warp";
  if (coordinates > kMostSmallCoordinates) return "too many coordinates";
  if (problem.heads % small.item_heads != 0) return "heads do not divide";
  if (small.item_heads > 1 && (problem.dim != 32 || problem.heads != problem.kv_heads)) return "heads do not share a row";
  if (small.warps != boxes && small.warps != boxes * small.item_heads) return "wrong number of warps";
  if (small.warps < boxes * small.item_heads && !one_tile) return "a warp with two heads and several key tiles";
  if (small.warps > kMostSmallWarps || small.ctas * (small.warps + 1) > kSmallWarpsOfSm) return "too many warps";
  if (std::min(small.stages, small.q_stages) < 2 || std::max(small.stages, small.q_stages) > kMostSmallStages)
    return "stages";
  if (total > kMostSharedBytes || small.ctas * (total + 1024) > kSharedBytesOfSm) return "too much shared memory";

  // Every key of a warp has one column.
  uint32_t column[kWarpColumns];
  order_columns(plan, column);
  std::set<uint32_t> keys;
  for (int32_t i = 0; i < warp_keys; ++i) {
    for (int a = 0; a < kMaxRank; ++a)
      if (int32_t(column[i] >> (8 * a) & 255) >= plan.warp_keys[a] || column[i] >> 24 != 0)
        return "a column outside the box";
    keys.insert(column[i]);
  }
  return int32_t(keys.size()) == warp_keys ? "" : "a key with two columns";
}

// The key tiles of every query tile hold the keys of its windows, and the plan counts those that its consumers visit.
std::string check_key_tiles(const Problem& problem, const ForwardPlan& plan) {
  constexpr int32_t kMost = 3;  // consumers
  struct QueryTile {
    int32_t visits[kTileShapes][kMost] = {};  // of key tiles along the axis
  };
  std::vector<QueryTile> axes[kMaxRank];
  int32_t volume[kTileShapes] = {1, 1};
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    const int32_t unit = plan.unit[a], extent = unit * plan.grid[a], box[kTileShapes] = {plan.kv_box[a], plan.edge_box[a]};
    for (int shape = 0; shape < kTileShapes; ++shape) volume[shape] *= box[shape];
    for (int32_t g = 0; g < axis.dilation; ++g) {
      const int32_t length = group_length(axis.kv_len, axis.dilation, g);
      for (int32_t first = 0; first < length; first += extent) {
        const int32_t last = std::min(first + extent, length) - 1;
        const int32_t begin = keys_of_query(axis, length, first).begin,
                      keys = keys_of_query(axis, length, last).end - begin;
        const AxisTiles tiles = axis_tiles(keys, box[0], box[1], a == plan.edge_axis);
        const bool has_edge = tiles.count[1] > 0;
        const int32_t edge_begin = a == plan.edge_axis ? tiles.count[0] * box[0] : 0;
        if (a == plan.edge_axis) {
          if (tiles.count[0] * box[0] + tiles.count[1] * box[1] < keys) return "keys in no tile of the edge axis";
          if (has_edge && tiles.count[0] * box[0] >= keys) return "an edge without keys";
        } else if (tiles.count[0] * box[0] < keys || (plan.edge_axis >= 0 && tiles.count[1] * box[1] < keys)) {
          return "keys in no tile";
        }
        QueryTile tile;
        for (int32_t w = 0; w < kMost; ++w) {
          const int32_t w_first = first + (plan.grid[a] > 1 ? w * unit : 0);
          if (w_first > last) continue;
          const int32_t low = keys_of_query(axis, length, w_first).begin - begin;
          const int32_t high = keys_of_query(axis, length, std::min(w_first + unit, length) - 1).end - begin;
          for (int shape = 0; shape < kTileShapes; ++shape) {
            for (int32_t i = 0; i < tiles.count[shape]; ++i) {
              const int32_t from = (shape == 1 ? edge_begin : 0) + i * box[shape];
              tile.visits[shape][w] += from < high && from + box[shape] > low;
            }
          }
        }
        axes[a].push_back(tile);
      }
    }
  }
  const KernelShape& kernel = kForwardKernels[plan.kernel];
  if (std::max(volume[0], volume[1]) > kernel.num_columns) return "a key tile is too large";
  double visits = 0;
  for (const QueryTile& x : axes[0])
    for (const QueryTile& y : axes[1])
      for (const QueryTile& z : axes[2])
        for (int shape = 0; shape < kTileShapes; ++shape)
          for (int32_t w = 0; w < kernel.num_consumers && w < plan.grid[0] * plan.grid[1] * plan.grid[2]; ++w)
            visits += double(x.visits[shape][w]) * y.visits[shape][w] * z.visits[shape][w];
  const double planned = plan.visited * double(problem.q_tokens()) * problem.window_volume() /
                         (kernel.rows_per_consumer() * kernel.num_columns);
  if (std::abs(visits - planned) > 1e-6 * visits)
    return "visits " + std::to_string(visits) + " key tiles, planned " + std::to_string(planned);
  return "";
}

std::string check(const Problem& problem) {
  if (const char* reason = why_not_forward(problem)) return reason;
  const ForwardPlan plan = plan_forward(problem);
  if (plan.kernel < 0) return "no plan";
  const KernelShape& kernel = kForwardKernels[plan.kernel];
  int32_t rows = 1, consumers = 1, warp_keys = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    rows *= plan.unit[a];
    consumers *= plan.grid[a];
    warp_keys *= plan.warp_keys[a];
    const Axis& axis = problem.axis[a];
    if (kernel.sharing == Sharing::kWarps) {
      const std::string error = check_warp_keys(axis, plan.unit[a], plan.grid[a], plan.kv_box[a], plan.warp_keys[a]);
      if (!error.empty()) return "axis " + std::to_string(a) + ": " + error;
    }
  }
  if (kernel.dim != problem.dim || rows > kernel.rows_per_consumer()) return "a box is too large";
  if (kernel.sharing == Sharing::kWarps) return check_small(problem, plan, consumers, warp_keys);
  if (consumers != (kernel.sharing == Sharing::kPrivate ? 1 : kernel.num_consumers)) return "wrong number of consumers";
  return check_key_tiles(problem, plan);
}

float bf16_value(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// One dilation group of a problem, some of its queries, and boxes that a kernel with masks by the tensor cores could have.
struct MaskCase {
  Axis axis[kMaxRank];
  int32_t length[kMaxRank], q_base[kMaxRank], q_count[kMaxRank];
  int32_t unit[kMaxRank], grid[kMaxRank], kv_box[kMaxRank];

  explicit MaskCase(std::mt19937* random) {
    const auto upto = [&](int32_t limit) { return int32_t((*random)() % uint32_t(limit)) + 1; };
    const int32_t rank = upto(kMaxRank), split = kMaxRank - upto(rank);
    int32_t codes = kMaskCodes;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const bool used = a >= kMaxRank - rank;
      length[a] = used ? upto(rank == 1 ? 80 : rank == 2 ? 24 : 11) : 1;
      const int32_t window = upto(length[a]), stride = upto(3) == 1 ? upto(window) : 1;
      axis[a] = {length[a], length[a], window, stride, 1, upto(3) == 1};
      q_base[a] = upto(2) == 1 ? 0 : upto(length[a]) - 1;
      q_count[a] = upto(length[a] - q_base[a]);
      unit[a] = used && codes >= 2 ? upto(std::min({codes, q_count[a], rank == 3 ? 5 : 16})) : 1;
      codes -= codes_of_extent(unit[a]);
      grid[a] = a == split ? 2 : 1;
      kv_box[a] = used ? upto(std::min(length[a], 12)) : 1;
    }
  }

  // A B^T of every query and key of every key tile, by the words that the kernel writes: exactly 0 where the query sees the
  // key, and below any score where not.
  std::string check() const {
    int32_t tiles = 1;
    for (int a = 0; a < kMaxRank; ++a) tiles *= (q_count[a] + unit[a] * grid[a] - 1) / (unit[a] * grid[a]);
    for (int32_t tile = 0; tile < tiles; ++tile) {
      int32_t first[kMaxRank], begin[kMaxRank], count[kMaxRank], rest = tile;
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t extent = unit[a] * grid[a], of_axis = (q_count[a] + extent - 1) / extent;
        first[a] = q_base[a] + rest % of_axis * extent;
        rest /= of_axis;
        const int32_t last = std::min(first[a] + extent, q_base[a] + q_count[a]) - 1;
        begin[a] = keys_of_query(axis[a], length[a], first[a]).begin;
        const int32_t keys = keys_of_query(axis[a], length[a], last).end - begin[a];
        count[a] = (keys + kv_box[a] - 1) / kv_box[a] * kv_box[a];
      }
      for (int32_t w = 0; w < 2; ++w) {
        int32_t box_first[kMaxRank];
        std::vector<uint32_t> hidden[kMaxRank];
        for (int a = 0; a < kMaxRank; ++a) {
          box_first[a] = first[a] + (grid[a] == 1 ? 0 : w * unit[a]);
          for (int32_t x = 0; x < count[a]; ++x) {
            const Interval queries = seen_by(axis[a], begin[a] + x, length[a]);
            hidden[a].push_back(spread_codes(hidden_codes(queries, box_first[a], unit[a], first_code(unit, a))));
          }
        }
        const std::string error = check_box(box_first, begin, hidden);
        if (!error.empty()) return error;
      }
    }
    return "";
  }

 private:
  std::string check_box(const int32_t (&first)[kMaxRank], const int32_t (&begin)[kMaxRank],
                        const std::vector<uint32_t> (&hidden)[kMaxRank]) const {
    for (int32_t row = 0; row < unit[0] * unit[1] * unit[2]; ++row) {
      const int32_t at[kMaxRank] = {row / (unit[2] * unit[1]), row / unit[2] % unit[1], row % unit[2]};
      Interval window[kMaxRank];
      bool exists = true;
      for (int a = 0; a < kMaxRank; ++a) {
        exists = exists && first[a] + at[a] < q_base[a] + q_count[a];
        window[a] = keys_of_query(axis[a], length[a], first[a] + at[a]);
      }
      if (!exists) continue;
      const uint32_t codes = codes_of_query(unit, at[0] | at[1] << 8 | at[2] << 16);
      int32_t x[kMaxRank];
      for (x[0] = 0; x[0] < int32_t(hidden[0].size()); ++x[0]) {
        for (x[1] = 0; x[1] < int32_t(hidden[1].size()); ++x[1]) {
          for (x[2] = 0; x[2] < int32_t(hidden[2].size()); ++x[2]) {
            bool seen = true;
            for (int a = 0; a < kMaxRank; ++a)
              seen = seen && begin[a] + x[a] >= window[a].begin && begin[a] + x[a] < window[a].end;
            const uint32_t word = hidden[0][x[0]] | hidden[1][x[1]] | hidden[2][x[2]];
            float product = 0;
            for (int32_t k = 0; k < kMaskCodes; ++k) {
              const float weight = (codes >> code_of_slot(k) & 1) != 0 ? bf16_value(kCodeWeight) : 0.0f;
              product += weight * bf16_value(mask_word(word, k / 2) >> (16 * (k % 2)) & 0xFFFF);
            }
            if (seen ? product != 0.0f : !(product < kHiddenScore && product > -1.5e38f)) {
              return "row " + std::to_string(row) + ", key " + std::to_string(begin[0] + x[0]) + "," +
                     std::to_string(begin[1] + x[1]) + "," + std::to_string(begin[2] + x[2]) + ": " +
                     std::to_string(product);
            }
          }
        }
      }
    }
    return "";
  }
};

// axes: [rank, 5] lengths, windows, strides, dilations, causal.
Problem whole_problem(const int32_t* axes, int32_t rank, int32_t dim, int32_t heads) {
  Problem problem;
  problem.rank = rank;
  problem.dim = problem.dim_v = dim;
  problem.heads = problem.kv_heads = heads;
  for (int32_t i = 0; i < rank; ++i) {
    const int32_t* x = axes + 5 * i;
    problem.axis[kMaxRank - rank + i] = {x[0], x[0], x[1], x[2], x[3], x[4]};
  }
  return problem;
}

// plan: units, grids, key boxes of the first shape and of the second, the edge axis.
void copy_boxes(const ForwardPlan& found, int32_t* plan) {
  for (int a = 0; a < kMaxRank; ++a) {
    plan[a] = found.unit[a];
    plan[kMaxRank + a] = found.grid[a];
    plan[2 * kMaxRank + a] = found.kv_box[a];
    plan[3 * kMaxRank + a] = found.edge_box[a];
  }
  plan[4 * kMaxRank] = found.edge_axis;
}

}  // namespace

// Random problems of every rank.
extern "C" const char* check_mask_codes(int32_t cases) {
  static std::string error;
  std::mt19937 random(0);
  for (int32_t i = 0; i < cases; ++i) {
    error = MaskCase(&random).check();
    if (!error.empty()) {
      error = "case " + std::to_string(i) + ": " + error;
      break;
    }
  }
  return error.c_str();
}

// axes: whole_problem.
extern "C" const char* check_plan(const int32_t* axes, int32_t rank, int32_t dim, int32_t heads) {
  static std::string error;
  const Problem problem = whole_problem(axes, rank, dim, heads);
  error = check(problem);
  if (!error.empty()) error = describe(plan_forward(problem)) + ": " + error;
  return error.c_str();
}

// The backward plan of the same: its boxes have room, and its cost is that of the tiles one by one, each with the shape
// that the device takes.
extern "C" const char* check_backward_plan(const int32_t* axes, int32_t rank, int32_t dim, int32_t heads) {
  static std::string error;
  const Problem problem = whole_problem(axes, rank, dim, heads);
  const BackwardPlan plan = choose_backward_plan(problem);
  const BackwardBoxes& boxes = plan.boxes;
  const BackwardRegime regime = backward_regimes(dim)[plan.regime];
  error.clear();
  if (boxes.queries.empty() || boxes.queries.size() > kMostQueryShapes) error = "number of shapes";
  for (const Box& box : boxes.queries) {
    if (box[0] * box[1] * box[2] > regime.queries || box[0] + box[1] + box[2] > regime.queries + 2) error = "a query box";
  }
  if (boxes.keys[0] * boxes.keys[1] * boxes.keys[2] > regime.keys) error = "the key box";
  if (!error.empty()) return error.c_str();

  // Queries that a tile of each axis needs: from, to, and from where to where they see every key; counted from the first.
  std::vector<std::array<int32_t, 3>> tiles[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    for (int32_t g = 0; g < axis.dilation; ++g) {
      const int32_t length = group_length(axis.kv_len, axis.dilation, g);
      for (int32_t first = 0; first < length; first += boxes.keys[a]) {
        const int32_t last = std::min(first + boxes.keys[a], length) - 1;
        const Interval low = queries_of_key(axis, length, first), high = queries_of_key(axis, length, last);
        const bool whole = last - first + 1 == boxes.keys[a];
        tiles[a].push_back({high.end - low.begin, whole ? high.begin - low.begin : 0, whole ? low.end - low.begin : -1});
      }
    }
  }
  double cost = 0;
  for (const auto& x : tiles[0]) {
    for (const auto& y : tiles[1]) {
      for (const auto& z : tiles[2]) {
        const std::array<int32_t, 3>* axis[kMaxRank] = {&x, &y, &z};
        int64_t least = -1, full_of_least = 0;
        for (const Box& box : boxes.queries) {
          int64_t count = 1, full = boxes.keys[0] * boxes.keys[1] * boxes.keys[2] == regime.keys;
          for (int a = 0; a < kMaxRank; ++a) {
            const auto& [range, full_begin, full_end] = *axis[a];
            int64_t full_here = 0, here = 0;
            for (int32_t at = 0; at < range; at += box[a], ++here) {
              full_here += at >= full_begin && at + box[a] <= full_end;
            }
            count *= here;
            full *= full_here;
          }
          if (least < 0 || count < least) least = count, full_of_least = full;
        }
        cost += regime.tile_ns + (boxes.queries.size() > 1 ? regime.choice_ns : 0) + least * regime.box_ns +
                (least - full_of_least) * regime.masked_box_ns;
      }
    }
  }
  cost *= heads;
  if (std::abs(cost - boxes.cost_ns) > 1e-6 * cost) {
    error = "costs " + std::to_string(cost) + ", planned " + std::to_string(boxes.cost_ns);
  }
  return error.c_str();
}

// axes: [rank, 6] query and key lengths, windows, strides, dilations, causal, of a shard. plan: copy_boxes.
// Returns the key tiles that consumers multiply, per head.
extern "C" double plan_shard(const int32_t* axes, int32_t rank, int32_t dim, int32_t* plan) {
  Problem problem;
  problem.rank = rank;
  problem.sharded = 1;
  problem.dim = problem.dim_v = dim;
  for (int32_t i = 0; i < rank; ++i) {
    const int32_t* x = axes + 6 * i;
    problem.axis[kMaxRank - rank + i] = {x[0], x[1], x[2], x[3], x[4], x[5]};
  }
  const ForwardPlan found = plan_forward(problem);
  copy_boxes(found, plan);
  const KernelShape& kernel = kForwardKernels[found.kernel];
  return found.visited * double(problem.q_tokens()) * problem.window_volume() /
         (kernel.rows_per_consumer() * kernel.num_columns);
}

// axes: whole_problem. plan: copy_boxes, then columns of a key tile.
// Returns the CTAs, on 132 SMs.
extern "C" int32_t plan_ctas(const int32_t* axes, int32_t rank, int32_t dim, int32_t heads, int32_t* plan) {
  const Problem problem = whole_problem(axes, rank, dim, heads);
  const ForwardPlan found = plan_forward(problem, 132);
  copy_boxes(found, plan);
  plan[13] = kForwardKernels[found.kernel].num_columns;
  return found.ctas;
}

// axes: whole_problem. items: of all heads, in the order in which they come. Returns the short layers.
extern "C" int32_t plan_schedule(const int32_t* axes, int32_t rank, int32_t dim, int32_t heads, int32_t tiles,
                                 int32_t* items) {
  const ForwardPlan found = plan_forward(whole_problem(axes, rank, dim, heads));
  const Schedule schedule(heads, found.layers, tiles / found.layers, found.short_layers);
  for (int32_t number = 0; number < heads * tiles; ++number) items[number] = schedule.item(number);
  return found.short_layers;
}

extern "C" const char* check_group_axis() {
  static std::string error;
  for (int32_t d = 1; d < 12; ++d) {
    for (int32_t length = d; length < 40; length += 3) {
      for (int32_t q_offset = 0; q_offset < length; ++q_offset) {
        for (int32_t halo : {0, 3, 11}) {
          Axis axis;
          axis.q_len = 7;
          axis.kv_len = 7 + 2 * halo;
          axis.dilation = d;
          const Shard shard{q_offset, q_offset - halo, length};
          for (int32_t residue = 0; residue < d; ++residue) {
            const GroupAxis found = group_axis(axis, shard, residue, FastDivisor(d));
            const int32_t group = (q_offset + residue) % d;
            bool good = found.q_first == residue && found.q_base == (q_offset + residue) / d &&
                        found.length == group_length(length, d, group) &&
                        found.q_count == (residue < 7 ? (7 - residue + d - 1) / d : 0);
            for (int32_t c = 0; c < 3; ++c) {
              good = good && found.kv_first + (c - found.kv_base) * d == c * d + group - shard.kv_offset;
            }
            if (!good) error = "dilation " + std::to_string(d) + ", offset " + std::to_string(q_offset);
          }
        }
      }
    }
  }
  return error.c_str();
}

extern "C" const char* check_fast_divisor() {
  static std::string error;
  uint32_t state = 1;
  for (uint32_t divisor = 1; divisor < 3000; ++divisor) {
    const FastDivisor by(divisor);
    for (int i = 0; i < 100; ++i) {
      state = state * 1664525u + 1013904223u;
      const uint32_t n = i < 4 ? 0x7FFFFFFFu - i : i < 50 ? divisor * uint32_t(i) - (i % 2) : state >> 1;
      if (by.divide(n) != n / divisor) error = std::to_string(n) + " / " + std::to_string(divisor);
    }
  }
  return error.c_str();
}
