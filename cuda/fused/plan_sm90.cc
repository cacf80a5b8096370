#include "plan_sm90.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <vector>

#include "balance_sm90.h"
#include "geometry.h"
#include "mask_codes.h"
#include "planned_queries.h"

namespace jax_na::hopper {
namespace {

// What the tiles of one axis add up to, over all dilation groups. The sums over axes multiply, because tiles are products
// of intervals.
struct AxisCost {
  double tiles = 0;          // query tiles of a CTA
  double loads = 0;          // key tiles loaded by a CTA
  double visits = 0;         // key tiles multiplied by a consumer, summed over the consumers on this axis
  double full = 0;           // of those, the ones inside every row's window
  double most_visits = 0;    // of a query tile
  int32_t widest = 0;        // keys that a consumer's queries see, at most
  int32_t widest_union = 0;  // keys that a tile's queries see, at most

  void add(const AxisCost& other, double times) {
    loads += times * other.loads;
    visits += times * other.visits;
    full += times * other.full;
  }
};

int32_t tokens_per_group(int32_t length, int32_t dilation) { return (length + dilation - 1) / dilation; }

// consumers: boxes of q_box queries that follow one another on this axis. Where a shard's tiles lie on the global axis is
// not known here: `widest` is then a bound (leaders of m consecutive queries lie at most m - 1 + stride - 1 apart).
// edge_box, if this is the edge axis, else 0: `edge` gets the tiles of the second shape (key_tiles_sm90.h).
AxisCost axis_cost(const Axis& axis, bool sharded, int32_t q_box, int32_t consumers, int32_t kv_box, int32_t edge_box = 0,
                   AxisCost* edge = nullptr) {
  AxisCost total;
  const int32_t long_groups = axis.kv_len % axis.dilation;
  for (int kind = 0; kind < 2; ++kind) {
    const int32_t groups = kind == 0 ? long_groups : axis.dilation - long_groups;
    const int32_t length = axis.kv_len / axis.dilation + (kind == 0 ? 1 : 0);
    const PlannedQueries queries = planned_queries(axis, sharded, length);
    const int32_t queries_end = queries.first + queries.count;
    if (groups == 0) continue;
    AxisCost sum, edge_sum;
    for (int32_t first = queries.first; first < queries_end; first += q_box * consumers) {
      const int32_t last = std::min(first + q_box * consumers, queries_end) - 1;
      const int32_t begin = keys_of_query(axis, length, first).begin;
      const int32_t end = keys_of_query(axis, length, last).end;
      const AxisTiles tiles = axis_tiles(end - begin, kv_box, edge_box, true);
      const int32_t edge_begin = tiles.count[0] * kv_box, edge_end = edge_begin + edge_box;
      sum.tiles += 1;
      total.widest_union = std::max(total.widest_union, end - begin);
      sum.loads += tiles.count[0];
      edge_sum.loads += tiles.count[1];
      double visits = 0;
      for (int32_t w = 0; w < consumers; ++w) {
        const int32_t w_first = first + w * q_box;
        if (w_first >= queries_end) break;
        const int32_t w_last = std::min(w_first + q_box, queries_end) - 1;
        const Interval low = keys_of_query(axis, length, w_first);
        const Interval high = keys_of_query(axis, length, w_last);
        total.widest = std::max(total.widest, high.end - low.begin);
        const int32_t first_tile = (low.begin - begin) / kv_box;
        const int32_t end_tile = std::min((high.end - begin + kv_box - 1) / kv_box, tiles.count[0]);
        visits += std::max(0, end_tile - first_tile);
        const int32_t first_full = (high.begin - begin + kv_box - 1) / kv_box;
        const int32_t end_full = std::min((low.end - begin) / kv_box, tiles.count[0]);
        sum.full += std::max(0, end_full - first_full);
        if (tiles.count[1] == 0) continue;
        edge_sum.visits += high.end - begin > edge_begin && low.begin - begin < edge_end ? 1 : 0;
        edge_sum.full += edge_begin >= high.begin - begin && edge_end <= low.end - begin ? 1 : 0;
      }
      sum.visits += visits;
      total.most_visits = std::max(total.most_visits, visits);
    }
    total.tiles += groups * sum.tiles;
    total.add(sum, groups);
    if (edge != nullptr) edge->add(edge_sum, groups);
  }
  if (sharded) {
    total.widest = axis.window + q_box + axis.stride - 2;
    total.widest_union = axis.window + q_box * consumers + axis.stride - 2;
  }
  return total;
}

// Memoised axis_cost of one axis.
class AxisCosts {
 public:
  AxisCosts(const Axis& axis, bool sharded) : axis_(axis), sharded_(sharded) {}
  const AxisCost& get(int32_t q_box, int32_t consumers, int32_t kv_box) {
    const int64_t key = (int64_t(q_box) << 32) | (int64_t(consumers) << 16) | kv_box;
    auto found = costs_.find(key);
    if (found == costs_.end()) found = costs_.emplace(key, axis_cost(axis_, sharded_, q_box, consumers, kv_box)).first;
    return found->second;
  }
  // Most keys that a tile of q_box * consumers queries can need.
  int32_t widest_union(int32_t q_box, int32_t consumers) const {
    const int32_t length = tokens_per_group(axis_.kv_len, axis_.dilation);
    return std::min(length, axis_.window + q_box * consumers + axis_.stride - 2 + (axis_.stride > 1 ? axis_.stride : 0));
  }
  // Keys of a box on this axis, at most; room: if nothing else limited it.
  int32_t limit(int32_t q_box, int32_t consumers, int32_t room) const {
    return std::min({widest_union(q_box, consumers), largest_box(), room});
  }
  int32_t queries() const { return tokens_per_group(axis_.q_len, axis_.dilation); }
  int32_t keys() const { return tokens_per_group(axis_.kv_len, axis_.dilation); }
  // Largest box TMA can read on this axis.
  int32_t largest_box() const { return axis_.dilation <= 8 ? 255 / axis_.dilation + 1 : 256; }

 private:
  Axis axis_;
  bool sharded_;
  std::map<int64_t, AxisCost> costs_;
};

// More weights of the cost model, in key columns of 64 rows.
// PERF: relative times, from the arithmetic of a tile (see DESIGN.md); measured on an H200 only through the plans they
// choose.
constexpr double kMaskShare = 0.35;     // of a tile's columns, where consumers apply a mask
constexpr double kProductShare = 0.06;  // of a tile's columns, always, where the tensor cores do
constexpr double kTurnShare = 0.88;     // of its consumers use a key tile: below, turns cost more than they gain
constexpr double kLoadShare = 1.33;     // loading a column from L2, against multiplying it with 64 rows

// Key tiles of one shape, over all query tiles.
struct ShapeCost {
  double visits, full;  // as in AxisCost
  double keys;          // loaded

  ShapeCost(const KernelShape& kernel, const AxisCost (&c)[kMaxRank], const int32_t (&box)[kMaxRank])
      : visits(c[0].visits * c[1].visits * c[2].visits),
        full(can_be_full(kernel, box) ? c[0].full * c[1].full * c[2].full : 0),
        keys(c[0].loads * c[1].loads * c[2].loads * box[0] * box[1] * box[2]) {}

  void add(const ShapeCost& other) {
    visits += other.visits;
    full += other.full;
    keys += other.keys;
  }
};

// consumers: of all query tiles.
double plan_cost(const KernelShape& kernel, const ShapeCost& shapes, double consumers) {
  const double n = kernel.num_columns;
  const double masks =
      kernel.mask_product ? shapes.visits * n * kProductShare : (shapes.visits - shapes.full) * n * kMaskShare;
  const double compute = shapes.visits * (n + kTileOverhead) + masks + consumers * kItemOverhead;
  const double load = shapes.keys * kLoadShare;
  return std::max(compute, load) + 0.15 * std::min(compute, load);
}

// Kernels for small windows, in cycles of an SM.
constexpr double kCyclesPerColumn = 8.5;  // of a `wgmma` kernel, as they count
constexpr double kCtaCycles = 600;        // of a launch, for every further CTA of an SM
struct SmallTimes {
  double start;                         // of a launch, first and last items included
  double round;                         // waiting at the ends of an item
  double row;                           // TMA, a row of 64 or 128 bytes
  double place;                         // the producer, an item
  double records;                       // and 32 rows of records, of an item or a key tile
  double exposed;                       // share of an item's first records, when they are not kept
  double run;                           // share for a box of one query in the innermost axis: short runs in memory
  double pass, column;                  // a warp over its columns with one head: of the SM, if there are enough warps
  double pass_latency, column_latency;  // and till it is done
  double output, output_latency;        // of a warp with one head
};
// PERF: fitted to 317 measured plans of 19 problems with small windows (H200): off by 2 % on average at head dimension 32,
// by 4 % at 64; more for plans that are far from the best. The powers in small_cost were chosen by hand.
constexpr SmallTimes kSmallTimes32 = {15150, 177, 3.99, 3440, 249, 0.17, 0.028, 89, 1.4, 429, 26, 83, 195};
constexpr SmallTimes kSmallTimes64 = {3220, 2110, 5.03, 403, 464, 0.23, 0, 97, 3.3, 275, 0, 0, 285};

// Whether a kWarps kernel has room for so many query and key tiles under way.
bool has_room(const ForwardPlan& plan) {
  const int32_t bytes = small_layout(plan).total_bytes;
  return bytes <= kMostSharedBytes && (bytes + 1024) * plan.small.ctas <= kSharedBytesOfSm;
}

// parts: key tiles of a query tile, at most.
double small_cost(const Problem& problem, const AxisCost (&c)[kMaxRank], const ForwardPlan& plan, int32_t parts,
                  double columns) {
  const SmallPlan& small = plan.small;
  int32_t boxes = 1, queries = 1, keys = 1, places = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t extent = plan.unit[a] * plan.grid[a];
    boxes *= plan.grid[a];
    queries *= extent;
    keys *= plan.kv_box[a];
    places *= (tokens_per_group(problem.axis[a].q_len, problem.axis[a].dilation) + extent - 1) / extent *
              problem.axis[a].dilation;
  }
  const double tiles = c[0].tiles * c[1].tiles * c[2].tiles, loads = c[0].loads * c[1].loads * c[2].loads / tiles;
  const double total_visits = c[0].visits * c[1].visits * c[2].visits;
  const int32_t ctas = scheduled_ctas(kSms * small.ctas, places);
  const double items = tiles * problem.batch * problem.heads / small.item_heads / ctas;  // of a CTA
  // CTAs that stay at their places keep the records, and the fullest tile is the last to be done.
  const bool stays = ctas % places == 0, keeps = stays && small.stages % parts == 0;
  const double visits = stays ? c[0].most_visits * c[1].most_visits * c[2].most_visits : total_visits / tiles;
  const double passes = visits * small.item_heads, outputs = (stays ? boxes : visits / loads) * small.item_heads;
  const SmallTimes& time = problem.dim == 32 ? kSmallTimes32 : kSmallTimes64;
  // A warp stays with one of four schedulers; the fullest one is done last, though not in proportion.
  const int32_t busy = small.warps + (keeps ? 0 : 1);
  const double uneven = std::pow((busy + 3) / 4 * 4.0 / busy, 0.3);
  const double throughput = small.ctas * uneven * (passes * (time.pass + time.column * columns) + outputs * time.output);
  const double latency =
      (passes * (time.pass_latency + time.column_latency * columns) + outputs * time.output_latency) / small.warps;
  const double compute = std::pow(std::pow(throughput, 4) + std::pow(latency, 4), 0.25);
  // Key tiles loaded, for one that a warp multiplies with: the others it waits for all the same.
  const double skipped = std::max(1.0, loads * problem.q_tokens() * boxes / queries / total_visits);
  const double idle = std::pow(skipped, 0.65);
  const double load = small.ctas * (queries + 2 * loads * keys) * time.row;
  const double rows = time.records * ((boxes + 1) / 2);
  const double records = time.place + (keeps ? 0 : rows * (1 + loads));
  const double exposed = keeps ? 0 : time.exposed * (time.place + rows * 2);
  const double round = std::max({compute * idle, load, records}) + exposed + time.round;
  const double cycles = 0.5 * (items + std::ceil(items)) * round + time.start + small.ctas * kCtaCycles;
  return cycles * (1 + time.run / plan.unit[kMaxRank - 1]) / kCyclesPerColumn * kSms /
         (double(problem.batch) * problem.heads);
}

// Whether a hidden score (mask_product_sm90.h) is a weight of 0.
bool hides_by_score(const Problem& problem) { return problem.scale >= 1e-20f; }

// Extents worth trying on an axis: every one up to ten, then even ones, and multiples of the stride: so many queries share
// one window.
std::vector<int32_t> query_extents(int32_t limit, int32_t stride) {
  std::vector<int32_t> result = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 21, 24, 28, 32, 40, 48, 56, 64};
  if (stride > 1) {
    for (int32_t extent = stride; extent <= 64; extent += stride) result.push_back(extent);
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  result.erase(std::upper_bound(result.begin(), result.end(), limit), result.end());
  return result;
}

// Ways to arrange a kernel's consumers.
std::vector<std::array<int32_t, kMaxRank>> grids(const KernelShape& kernel) {
  const int32_t n = kernel.num_consumers;
  if (kernel.sharing == Sharing::kPrivate) return {{1, 1, 1}};
  if (kernel.sharing == Sharing::kShared) return {{n, 1, 1}, {1, n, 1}, {1, 1, n}};
  std::vector<std::array<int32_t, kMaxRank>> result;
  for (int32_t g0 = 1; g0 <= n; ++g0) {
    for (int32_t g1 = 1; g0 * g1 <= n; ++g1) {
      for (int32_t g2 = 1; g0 * g1 * g2 <= n; ++g2) result.push_back({g0, g1, g2});
    }
  }
  return result;
}

// Whether a kernel with masks by the tensor cores has codes enough, and room for the keys' coordinates.
bool mask_fits(const KernelShape& kernel, const int32_t (&unit)[kMaxRank], const int32_t (&kv_box)[kMaxRank],
               const AxisCost (&c)[kMaxRank]) {
  if (!kernel.mask_product) return true;
  int32_t codes = 0, coordinates = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    codes += codes_of_extent(unit[a]);
    coordinates += (c[a].widest_union + kv_box[a] - 1) / kv_box[a] * kv_box[a];
  }
  return codes <= kMaskCodes && coordinates <= kMaskCoordinates;
}

// Plans with one shape of key tiles are tried with a second if they cost at most so much more than the best; it is taken if
// the result costs at most so much of that. PERF: where less was predicted, gains were from -7 to 7 % on an H200.
constexpr double kEdgeCandidates = 1.15, kEdgeGain = 0.95;

double visited_share(const Problem& problem, const KernelShape& kernel, double visits) {
  return visits * kernel.rows_per_consumer() * kernel.num_columns / (double(problem.q_tokens()) * problem.window_volume());
}

// The best key box for one kernel, query unit and grid; improves `best`. candidates: for search_edges.
void search_kv_boxes(const Problem& problem, int32_t index, const int32_t (&unit)[kMaxRank],
                     const std::array<int32_t, kMaxRank>& grid, std::vector<AxisCosts>& costs,
                     std::vector<ForwardPlan>* candidates, ForwardPlan* best) {
  const KernelShape& kernel = kForwardKernels[index];
  int32_t limit[kMaxRank];
  int32_t num_consumers = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    limit[a] = costs[a].limit(unit[a], grid[a], kernel.num_columns);
    if (unit[a] * grid[a] > costs[a].largest_box()) return;
    num_consumers *= grid[a];
  }
  for (int32_t n0 = 1; n0 <= limit[0]; ++n0) {
    const AxisCost& c0 = costs[0].get(unit[0], grid[0], n0);
    for (int32_t n1 = 1; n1 <= limit[1] && n0 * n1 <= kernel.num_columns; ++n1) {
      int32_t n2 = std::min(kernel.num_columns / (n0 * n1), limit[2]);
      if (n0 * n1 * n2 * 2 < kernel.num_columns && (n0 < limit[0] || n1 < limit[1])) continue;
      const int32_t parts = (limit[2] + n2 - 1) / n2;
      n2 = (limit[2] + parts - 1) / parts;
      const AxisCost c[kMaxRank] = {c0, costs[1].get(unit[1], grid[1], n1), costs[2].get(unit[2], grid[2], n2)};
      const int32_t kv_box[kMaxRank] = {n0, n1, n2};
      const ShapeCost shape(kernel, c, kv_box);
      const double cost = plan_cost(kernel, shape, c[0].tiles * c[1].tiles * c[2].tiles * num_consumers);
      const bool may_have_edges = tile_shapes(kernel.sharing, kernel.mask_product) > 1;
      if (cost >= best->cost * (may_have_edges ? kEdgeCandidates : 1) || !mask_fits(kernel, unit, kv_box, c)) continue;
      ForwardPlan plan;
      plan.kernel = index;
      plan.cost = cost;
      plan.visited = visited_share(problem, kernel, shape.visits);
      for (int a = 0; a < kMaxRank; ++a) {
        plan.unit[a] = unit[a];
        plan.grid[a] = grid[a];
        plan.kv_box[a] = kv_box[a];
      }
      if (cost < best->cost) *best = plan;
      if (may_have_edges) candidates->push_back(plan);
    }
  }
}

// The best second shape of key tiles for the best plans with one; improves `best`.
void search_edges(const Problem& problem, std::vector<AxisCosts>& costs, std::vector<ForwardPlan> candidates,
                  ForwardPlan* best) {
  const size_t some = std::min<size_t>(candidates.size(), 64);  // with all, one plan of 191 costs 0.4 % less
  std::partial_sort(candidates.begin(), candidates.begin() + some, candidates.end(),
                    [](const ForwardPlan& a, const ForwardPlan& b) { return a.cost < b.cost; });
  candidates.resize(some);
  const bool sharded = problem.sharded != 0;
  double least = kEdgeGain * best->cost;
  for (const ForwardPlan& one : candidates) {
    const KernelShape& kernel = kForwardKernels[one.kernel];
    const int32_t n = kernel.num_columns;
    const auto cost_of = [&](int a, const int32_t (&box)[kMaxRank]) {
      return costs[a].get(one.unit[a], one.grid[a], box[a]);
    };
    AxisCost c[kMaxRank] = {cost_of(0, one.kv_box), cost_of(1, one.kv_box), cost_of(2, one.kv_box)};
    const double consumers = c[0].tiles * c[1].tiles * c[2].tiles * kernel.num_consumers;
    for (int edge = 0; edge < kMaxRank; ++edge) {
      const int other1 = (edge + 1) % kMaxRank, other2 = (edge + 2) % kMaxRank;
      const AxisCost whole = c[edge];
      for (int32_t thin = 1; thin < one.kv_box[edge]; ++thin) {
        AxisCost e[kMaxRank];
        c[edge] = axis_cost(problem.axis[edge], sharded, one.unit[edge], one.grid[edge], one.kv_box[edge], thin, &e[edge]);
        if (e[edge].loads == 0) continue;
        const ShapeCost first(kernel, c, one.kv_box);
        const int32_t limit1 = costs[other1].limit(one.unit[other1], one.grid[other1], n / thin);
        for (int32_t n1 = 1; n1 <= limit1; ++n1) {
          int32_t box[kMaxRank];
          box[edge] = thin;
          box[other1] = n1;
          box[other2] = costs[other2].limit(one.unit[other2], one.grid[other2], n / (thin * n1));
          if (thin * n1 * box[other2] * 2 < n && n1 < limit1) continue;
          e[other1] = cost_of(other1, box);
          e[other2] = cost_of(other2, box);
          ShapeCost shapes = first;
          shapes.add(ShapeCost(kernel, e, box));
          const double cost = plan_cost(kernel, shapes, consumers);
          if (cost >= least) continue;
          least = cost;
          *best = one;
          best->cost = cost;
          best->visited = visited_share(problem, kernel, shapes.visits);
          best->edge_axis = edge;
          std::copy(box, box + kMaxRank, best->edge_box);
        }
      }
      c[edge] = whole;
    }
  }
}

// The best key box, heads, warps and CTAs for a kWarps kernel, query unit and grid; improves `best`.
void search_small_plans(const Problem& problem, int32_t index, const int32_t (&unit)[kMaxRank],
                        const std::array<int32_t, kMaxRank>& grid, std::vector<AxisCosts>& costs, ForwardPlan* best) {
  const KernelShape& kernel = kForwardKernels[index];
  ForwardPlan plan;
  plan.kernel = index;
  int32_t boxes = 1, coordinates = 0;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int32_t extent = unit[a] * grid[a];
    if (extent > costs[a].largest_box() || (grid[a] > 1 && unit[a] * (grid[a] - 1) >= costs[a].queries())) return;
    plan.unit[a] = unit[a];
    plan.grid[a] = grid[a];
    plan.kv_box[a] = std::min(costs[a].get(unit[a], grid[a], 1).widest_union, costs[a].keys());
    boxes *= grid[a];
    coordinates += extent;
  }
  if (coordinates > kMostSmallCoordinates) return;
  for (int a = 0; a < kMaxRank; ++a)
    if (plan.kv_box[a] > costs[a].largest_box()) return;
  const bool pairs = problem.dim == 32 && problem.kv_heads == problem.heads && problem.heads % 2 == 0;
  // The keys of one axis may come in several tiles.
  const int32_t whole[kMaxRank] = {plan.kv_box[0], plan.kv_box[1], plan.kv_box[2]};
  for (int split = 0; split < kMaxRank; ++split) {
    for (int32_t parts = split == 0 ? 1 : 2, last = 0; parts <= whole[split]; ++parts) {
      std::copy(whole, whole + kMaxRank, plan.kv_box);
      plan.kv_box[split] = (whole[split] + parts - 1) / parts;
      if (plan.kv_box[split] == last) continue;
      last = plan.kv_box[split];
      int32_t keys = 1;
      AxisCost c[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) {
        c[a] = costs[a].get(unit[a], grid[a], plan.kv_box[a]);
        keys *= std::min(plan.kv_box[a], c[a].widest);
      }
      if (keys > kernel.num_columns) continue;
      for (int32_t heads = 1; heads <= (pairs ? 2 : 1); ++heads) {
        for (int32_t warps = boxes; warps <= boxes * heads && warps <= kernel.num_consumers; warps += boxes) {
          if (warps < boxes * heads && parts > 1) continue;  // a warp can hold the state of one head
          for (int32_t ctas = 1; ctas * (warps + 1) <= kSmallWarpsOfSm; ++ctas) {
            plan.small.item_heads = heads;
            plan.small.warps = warps;
            plan.small.ctas = ctas;
            plan.small.q_stages = 2;
            for (int32_t stages = parts == 1 ? 2 : kMostSmallStages; stages >= 2; --stages) {
              plan.small.stages = stages;
              if (!has_room(plan)) continue;
              const double columns = keys <= 64 ? 64 : keys <= 80 ? 80 : kernel.num_columns;
              plan.cost = small_cost(problem, c, plan, parts, columns);
              if (plan.cost >= best->cost) continue;
              plan.visited = c[0].visits * c[1].visits * c[2].visits * kernel.rows_per_consumer() * columns /
                             (double(problem.q_tokens()) * problem.window_volume());
              *best = plan;
            }
          }
        }
      }
    }
  }
}

ForwardPlan search(const Problem& problem) {
  ForwardPlan best;
  best.cost = std::numeric_limits<double>::infinity();
  std::vector<AxisCosts> costs;
  std::vector<ForwardPlan> candidates;
  for (const Axis& axis : problem.axis) costs.emplace_back(axis, problem.sharded != 0);
  for (int32_t k = 0; k < kNumForwardKernels; ++k) {
    const KernelShape& kernel = kForwardKernels[k];
    if (kernel.dim != problem.dim || (kernel.mask_product && !hides_by_score(problem))) continue;
    const int32_t rows = kernel.rows_per_consumer();
    for (int32_t m0 : query_extents(std::min(costs[0].queries(), costs[0].largest_box()), problem.axis[0].stride)) {
      for (int32_t m1 : query_extents(std::min(costs[1].queries(), costs[1].largest_box()), problem.axis[1].stride)) {
        if (m0 * m1 > rows) break;
        // The innermost extent: the largest that fits, the one that splits the axis evenly, and whole strides.
        const int32_t widest = std::min({rows / (m0 * m1), costs[2].queries(), costs[2].largest_box()});
        const int32_t parts = (costs[2].queries() + widest - 1) / widest;
        const int32_t even = (costs[2].queries() + parts - 1) / parts;
        const int32_t strides = widest / problem.axis[2].stride * problem.axis[2].stride;
        std::vector<int32_t> extents = {widest};
        if (even != widest) extents.push_back(even);
        if (strides > 0 && strides != even && strides != widest) extents.push_back(strides);
        for (int32_t m2 : extents) {
          const bool wasteful = m0 * m1 * m2 * 2 < rows && m2 < costs[2].queries() && m2 < costs[2].largest_box();
          if (wasteful) continue;
          const int32_t unit[kMaxRank] = {m0, m1, m2};
          for (const auto& grid : grids(kernel)) {
            if (kernel.sharing == Sharing::kWarps) {
              search_small_plans(problem, k, unit, grid, costs, &best);
            } else {
              search_kv_boxes(problem, k, unit, grid, costs, &candidates, &best);
            }
          }
        }
      }
    }
  }
  search_edges(problem, costs, candidates, &best);
  return best;
}

// How a causal mask splits the query tiles of an instance (schedule_sm90.h). None of a shard is short, which seldom is the
// first; and none if the windows of the instances whose short layers are at work at a time would not stay in L2.
void find_short_layers(const Problem& problem, int32_t num_sms, ForwardPlan* plan) {
  constexpr int64_t kBytes = 24 << 20;        // PERF: half of the L2 of an H200
  int32_t extent[kMaxRank], tiles[kMaxRank];  // tiles of the longest dilation group
  int64_t instances = problem.batch * problem.heads;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    extent[a] = plan->unit[a] * plan->grid[a];
    tiles[a] = ((axis.q_len + axis.dilation - 1) / axis.dilation + extent[a] - 1) / extent[a];
    instances *= axis.dilation;
  }
  int outermost = 0;  // axis with more than one tile
  while (outermost < kMaxRank - 1 && tiles[outermost] == 1) ++outermost;
  plan->layers = tiles[outermost];
  const Axis& axis = problem.axis[outermost];
  int64_t layer = 1;
  for (int a = outermost + 1; a < kMaxRank; ++a) layer *= tiles[a];
  const int64_t at_work = std::min(instances, num_sms / layer + 1);
  if (axis.causal == 0 || problem.sharded || at_work * problem.window_volume() * problem.dim * 4 > kBytes) return;
  const int32_t length = group_length(axis.kv_len, axis.dilation, 0);
  int32_t& result = plan->short_layers;
  while (result < plan->layers && keys_of_query(axis, length, result * extent[outermost]).begin == 0) ++result;
}

// What follows from the boxes: the keys of a warp, the turns, the schedule.
void complete(const Problem& problem, int32_t num_sms, ForwardPlan* plan) {
  if (plan->kernel < 0) return;
  double used = 1, consumers = 1;  // consumers that multiply with a key tile, on average; all of them
  for (int a = 0; a < kMaxRank; ++a) {
    const AxisCost cost = axis_cost(problem.axis[a], problem.sharded != 0, plan->unit[a], plan->grid[a], plan->kv_box[a]);
    plan->warp_keys[a] = std::min(plan->kv_box[a], cost.widest);
    used *= cost.visits / cost.loads;
    consumers *= plan->grid[a];
  }
  // PERF: two consumers are better off without (H200: 128-w32 1.10 ms, with turns 1.15; ltx-s5 7.60, with turns 7.79).
  plan->take_turns = consumers > 2 && used >= kTurnShare * consumers;
  // The kernels for small windows count on the same tiles in every round of their CTAs.
  if (kForwardKernels[plan->kernel].sharing != Sharing::kWarps) find_short_layers(problem, num_sms, plan);
  plan->ctas = plan->short_layers != 0 ? num_sms : balanced_ctas(problem, *plan, num_sms);
}

// For a plan completed: within the limits of its kernel. What only an override can break.
bool fits(const Problem& problem, const ForwardPlan& plan) {
  if (plan.kernel < 0) return true;
  const KernelShape& kernel = kForwardKernels[plan.kernel];
  if (kernel.sharing != Sharing::kWarps) {
    AxisCost c[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a)
      c[a] = axis_cost(problem.axis[a], problem.sharded != 0, plan.unit[a], plan.grid[a], plan.kv_box[a]);
    return !kernel.mask_product || (hides_by_score(problem) && mask_fits(kernel, plan.unit, plan.kv_box, c));
  }
  const SmallPlan& small = plan.small;
  const int32_t total = small_layout(plan).total_bytes, boxes = plan.grid[0] * plan.grid[1] * plan.grid[2];
  return small.warps > 0 && small.warps % boxes == 0 &&
         plan.warp_keys[0] * plan.warp_keys[1] * plan.warp_keys[2] <= kWarpColumns && small.warps <= kMostSmallWarps &&
         small.stages > 0 && small.stages <= kMostSmallStages && total <= kMostSharedBytes &&
         (total + 1024) * small.ctas <= kSharedBytesOfSm && (small.warps + 1) * small.ctas <= kSmallWarpsOfSm;
}

std::string key_of(const Problem& p) {
  std::string key;
  const auto add = [&key](int64_t value) { key += std::to_string(value) + ","; };
  for (const Axis& axis : p.axis) {
    for (int64_t v : {axis.q_len, axis.kv_len, axis.window, axis.stride, axis.dilation, axis.causal}) add(v);
  }
  for (int64_t v : {int64_t(hides_by_score(p)), int64_t(p.rank), int64_t(p.sharded), p.batch, int64_t(p.heads),
                    int64_t(p.kv_heads), int64_t(p.dim)}) {
    add(v);
  }
  return key;
}

void apply_override(const char* text, ForwardPlan* plan) {
  ForwardPlan p;
  const int fields = std::sscanf(text, "%d:%d,%d,%d:%d,%d,%d:%d,%d,%d:%d,%d,%d,%d,%d", &p.kernel, &p.unit[0], &p.unit[1],
                                 &p.unit[2], &p.grid[0], &p.grid[1], &p.grid[2], &p.kv_box[0], &p.kv_box[1], &p.kv_box[2],
                                 &p.small.item_heads, &p.small.warps, &p.small.stages, &p.small.ctas, &p.small.q_stages);
  const bool edges = fields == 14 && kForwardKernels[p.kernel].sharing != Sharing::kWarps;
  if (edges) {
    p.edge_box[0] = p.small.item_heads;
    p.edge_box[1] = p.small.warps;
    p.edge_box[2] = p.small.stages;
    p.edge_axis = p.small.ctas;
    p.small = SmallPlan();
  }
  if (fields == 14) p.small.q_stages = p.small.stages;
  if (fields == 10 || fields >= 14) *plan = p;
}

}  // namespace

const char* why_not_forward(const Problem& problem) {
  if (problem.dim != problem.dim_v) return "the Hopper kernels need equal head dimensions of key and value";
  bool known = false;
  for (const KernelShape& kernel : kForwardKernels) known = known || kernel.dim == problem.dim;
  if (!known) return "the Hopper kernels serve head dimensions 32, 64, 128 and 256";
  if (problem.num_extra > 0) return "the Hopper kernels have no additional keys";
  if (!(problem.scale > 0.0f)) return "the Hopper kernels need a positive scale";
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.axis[a];
    if (axis.dilation > 8 && (axis.q_len % axis.dilation != 0 || axis.kv_len % axis.dilation != 0)) {
      return "the Hopper kernels need a dilation of at most 8, or one that divides its axis";
    }
  }
  if (problem.batch * std::max(problem.q_tokens(), problem.kv_tokens()) >= int64_t(1) << 31) {
    return "the Hopper kernels count tokens in 31 bits";
  }
  return nullptr;
}

static std::string describe_small(const ForwardPlan& plan) {
  const SmallPlan& small = plan.small;
  char text[320];
  std::snprintf(text, sizeof(text),
                "hopper forward: kernel %d, D %d, boxes of %dx%dx%d queries and %dx%dx%d keys as %dx%dx%d, key tiles of "
                "%dx%dx%d, heads at a time %d, %d CTAs of %d warps, stages %d, visited %.2f",
                plan.kernel, kForwardKernels[plan.kernel].dim, plan.unit[0], plan.unit[1], plan.unit[2], plan.warp_keys[0],
                plan.warp_keys[1], plan.warp_keys[2], plan.grid[0], plan.grid[1], plan.grid[2], plan.kv_box[0],
                plan.kv_box[1], plan.kv_box[2], small.item_heads, small.ctas, small.warps, small.stages, plan.visited);
  return text;
}

std::string describe(const ForwardPlan& plan) {
  if (plan.kernel < 0) return "no plan";
  const KernelShape& kernel = kForwardKernels[plan.kernel];
  if (kernel.sharing == Sharing::kWarps) return describe_small(plan);
  const char* consumer = kernel.sharing == Sharing::kPrivate ? "independent warpgroups" : "warpgroups";
  char edges[64] = "", text[320];
  if (plan.edge_axis >= 0) {
    std::snprintf(edges, sizeof(edges), " and %dx%dx%d at the end of axis %d", plan.edge_box[0], plan.edge_box[1],
                  plan.edge_box[2], plan.edge_axis);
  }
  std::snprintf(text, sizeof(text),
                "hopper forward: kernel %d, D %d, %d %s of %dx%dx%d queries as %dx%dx%d, key tiles of %dx%dx%d%s (of %d), "
                "%d CTAs, visited %.2f",
                plan.kernel, kernel.dim, kernel.num_consumers, consumer, plan.unit[0], plan.unit[1], plan.unit[2],
                plan.grid[0], plan.grid[1], plan.grid[2], plan.kv_box[0], plan.kv_box[1], plan.kv_box[2], edges,
                kernel.num_columns, plan.ctas, plan.visited);
  return text;
}

SmallLayout small_layout(const ForwardPlan& plan) {
  int32_t boxes = 1, queries = 1, keys = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    boxes *= plan.grid[a];
    queries *= plan.unit[a] * plan.grid[a];
    keys *= plan.kv_box[a];
  }
  const int32_t row_bytes = kForwardKernels[plan.kernel].dim * 2 * plan.small.item_heads;
  const auto slot = [&](int32_t rows) { return (rows * row_bytes + 1023) / 1024 * 1024; };  // the swizzle repeats
  const int32_t per_row = 16 * plan.small.stages + 4 * plan.small.q_stages;                 // masks and tokens
  SmallLayout result;
  result.q_slot_bytes = slot(queries);
  result.kv_slot_bytes = slot(keys);
  result.total_bytes = 1024 + plan.small.q_stages * result.q_slot_bytes + 2 * plan.small.stages * result.kv_slot_bytes +
                       kSmallRecordBytes + 16 * boxes * per_row;
  return result;
}

int32_t scheduled_ctas(int32_t ctas, int32_t places) {
  const int32_t rest = ctas % places;
  if (8 * rest < ctas) return ctas - rest;
  while (std::gcd(ctas, places) > 1) --ctas;
  return ctas;
}

void order_columns(const ForwardPlan& plan, uint32_t (&column)[kWarpColumns]) {
  std::vector<uint32_t> keys_of_bank[8];
  for (int32_t i0 = plan.warp_keys[0] - 1; i0 >= 0; --i0) {
    for (int32_t i1 = plan.warp_keys[1] - 1; i1 >= 0; --i1) {
      for (int32_t i2 = plan.warp_keys[2] - 1; i2 >= 0; --i2) {
        keys_of_bank[((i0 * plan.kv_box[1] + i1) * plan.kv_box[2] + i2) % 8].push_back(i0 | i1 << 8 | i2 << 16);
      }
    }
  }
  int32_t rank[8] = {0, 1, 2, 3, 4, 5, 6, 7};  // banks, the one with most keys left first
  for (int i = 0; i < kWarpColumns; ++i) {
    if (i % 8 == 0) {
      std::stable_sort(rank, rank + 8,
                       [&](int32_t x, int32_t y) { return keys_of_bank[x].size() > keys_of_bank[y].size(); });
    }
    std::vector<uint32_t>* keys = &keys_of_bank[rank[i % 8]];
    for (int r = 0; r < 8 && keys->empty(); ++r) keys = &keys_of_bank[rank[r]];
    column[i] = keys->empty() ? 1u << 24 : keys->back();
    if (!keys->empty()) keys->pop_back();
  }
}

ForwardPlan plan_forward(const Problem& problem, int32_t num_sms) {
  static std::mutex mutex;
  static std::map<std::string, ForwardPlan> plans;
  const char* override_text = std::getenv("JAX_NA_HOPPER_PLAN");
  const std::string key = key_of(problem) + std::to_string(num_sms) + "," + (override_text != nullptr ? override_text : "");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  ForwardPlan plan = search(problem);
  if (override_text != nullptr) apply_override(override_text, &plan);
  complete(problem, num_sms, &plan);
  if (!fits(problem, plan)) plan.kernel = -1;
  plans.emplace(key, plan);
  const char* explain = std::getenv("JAX_NA_EXPLAIN");
  if (explain != nullptr && explain[0] == '1') std::fprintf(stderr, "%s\n", describe(plan).c_str());
  return plan;
}

}  // namespace jax_na::hopper
