#include "plan_sm90.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "geometry.h"

namespace jax_na::hopper {
namespace {

// What the tiles of one axis add up to, over all dilation groups. The sums over axes multiply, because tiles are products of intervals.
struct AxisCost {
  double tiles = 0;   // query tiles of a CTA
  double loads = 0;   // key tiles loaded by a CTA
  double visits = 0;  // key tiles multiplied by a warpgroup, summed over the warpgroups on this axis
  double full = 0;    // of those, the ones inside every row's window
};

int32_t tokens_per_group(int32_t length, int32_t dilation) { return (length + dilation - 1) / dilation; }

// warpgroups: boxes of q_box queries that follow one another on this axis. Shards: the local lengths stand for the global one.
AxisCost axis_cost(const Axis& axis, int32_t q_box, int32_t warpgroups, int32_t kv_box) {
  AxisCost total;
  const int32_t long_groups = axis.kv_len % axis.dilation;
  for (int kind = 0; kind < 2; ++kind) {
    const int32_t groups = kind == 0 ? long_groups : axis.dilation - long_groups;
    const int32_t length = axis.kv_len / axis.dilation + (kind == 0 ? 1 : 0);
    const int32_t queries = std::min(length, tokens_per_group(axis.q_len, axis.dilation));
    if (groups == 0) continue;
    AxisCost sum;
    for (int32_t first = 0; first < queries; first += q_box * warpgroups) {
      const int32_t last = std::min(first + q_box * warpgroups, queries) - 1;
      const int32_t begin = keys_of_query(axis, length, first).begin;
      const int32_t end = keys_of_query(axis, length, last).end;
      sum.tiles += 1;
      sum.loads += (end - begin + kv_box - 1) / kv_box;
      for (int32_t w = 0; w < warpgroups; ++w) {
        const int32_t w_first = first + w * q_box;
        if (w_first >= queries) break;
        const int32_t w_last = std::min(w_first + q_box, queries) - 1;
        const Interval low = keys_of_query(axis, length, w_first);
        const Interval high = keys_of_query(axis, length, w_last);
        const int32_t first_tile = (low.begin - begin) / kv_box;
        const int32_t end_tile = (high.end - begin + kv_box - 1) / kv_box;
        sum.visits += end_tile - first_tile;
        const int32_t first_full = (high.begin - begin + kv_box - 1) / kv_box;
        const int32_t end_full = (low.end - begin) / kv_box;
        sum.full += std::max(0, end_full - first_full);
      }
    }
    total.tiles += groups * sum.tiles;
    total.loads += groups * sum.loads;
    total.visits += groups * sum.visits;
    total.full += groups * sum.full;
  }
  return total;
}

// Memoised axis_cost of one axis.
class AxisCosts {
 public:
  explicit AxisCosts(const Axis& axis) : axis_(axis) {}
  const AxisCost& get(int32_t q_box, int32_t warpgroups, int32_t kv_box) {
    const int64_t key = (int64_t(q_box) << 32) | (int64_t(warpgroups) << 16) | kv_box;
    auto found = costs_.find(key);
    if (found == costs_.end()) found = costs_.emplace(key, axis_cost(axis_, q_box, warpgroups, kv_box)).first;
    return found->second;
  }
  // Most keys that a tile of q_box * warpgroups queries can need.
  int32_t widest_union(int32_t q_box, int32_t warpgroups) const {
    const int32_t length = tokens_per_group(axis_.kv_len, axis_.dilation);
    return std::min(length, axis_.window + q_box * warpgroups + axis_.stride - 2 + (axis_.stride > 1 ? axis_.stride : 0));
  }
  int32_t queries() const { return tokens_per_group(axis_.q_len, axis_.dilation); }
  // Largest box TMA can read on this axis.
  int32_t largest_box() const { return axis_.dilation <= 8 ? 255 / axis_.dilation + 1 : 256; }

 private:
  Axis axis_;
  std::map<int64_t, AxisCost> costs_;
};

// Weights of the cost model, in key columns of 64 rows.
// PERF: relative times, from the arithmetic of a tile (see DESIGN.md); measured on an H200 only through the plans they choose.
constexpr double kTileOverhead = 16;   // per key tile: barriers, row maximum, rescaling
constexpr double kMaskShare = 0.2;     // of a tile's columns, where a mask is applied
constexpr double kItemOverhead = 100;  // per query tile: prologue and epilogue
constexpr double kLoadShare = 1.33;    // loading a column from L2, against multiplying it with 64 rows

double plan_cost(const KernelShape& kernel, const AxisCost (&c)[kMaxRank]) {
  const double n = kernel.num_columns;
  const double visits = c[0].visits * c[1].visits * c[2].visits;
  const double full = c[0].full * c[1].full * c[2].full;
  const double loads = c[0].loads * c[1].loads * c[2].loads * (kernel.shared ? 1.0 : 1.0);
  const double items = c[0].tiles * c[1].tiles * c[2].tiles * (kernel.shared ? kernel.num_consumers : 1);
  const double compute = visits * (n + kTileOverhead) + (visits - full) * n * kMaskShare + items * kItemOverhead;
  const double load = loads * n * kLoadShare;
  return std::max(compute, load) + 0.15 * std::min(compute, load);
}

std::vector<int32_t> query_extents(int32_t limit) {
  std::vector<int32_t> result;
  for (int32_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 21, 24, 28, 32, 40, 48, 56, 64}) {
    if (m <= limit) result.push_back(m);
  }
  return result;
}

ForwardPlan search(const Problem& problem) {
  ForwardPlan best;
  std::vector<AxisCosts> costs;
  for (int a = 0; a < kMaxRank; ++a) costs.emplace_back(problem.axis[a]);
  for (int32_t k = 0; k < int32_t(sizeof(kForwardKernels) / sizeof(kForwardKernels[0])); ++k) {
    const KernelShape& kernel = kForwardKernels[k];
    if (kernel.dim != problem.dim) continue;
    for (int32_t m0 : query_extents(std::min(costs[0].queries(), costs[0].largest_box()))) {
      for (int32_t m1 : query_extents(std::min(costs[1].queries(), costs[1].largest_box()))) {
        if (m0 * m1 > kRowsPerWarpgroup) break;
        // The innermost extent: the largest that fits, and the one that splits the axis evenly.
        const int32_t widest = std::min({kRowsPerWarpgroup / (m0 * m1), costs[2].queries(), costs[2].largest_box()});
        const int32_t parts = (costs[2].queries() + widest - 1) / widest;
        const int32_t even = (costs[2].queries() + parts - 1) / parts;
        for (int32_t m2 : {widest, even}) {
          if (m2 == even && even == widest && &m2 != nullptr && m0 * m1 * m2 * 2 < kRowsPerWarpgroup &&
              m2 < costs[2].queries() && m2 < costs[2].largest_box()) {
            continue;
          }
          const int32_t m[kMaxRank] = {m0, m1, m2};
          for (int split = 0; split < kMaxRank; ++split) {
            if (!kernel.shared && split != kMaxRank - 1) continue;
            int32_t w[kMaxRank] = {1, 1, 1};
            if (kernel.shared) w[split] = kernel.num_consumers;
            int32_t limit[kMaxRank];
            for (int a = 0; a < kMaxRank; ++a) {
              limit[a] = std::min({costs[a].widest_union(m[a], w[a]), costs[a].largest_box(), kernel.num_columns});
            }
            for (int32_t n0 = 1; n0 <= limit[0]; ++n0) {
              const AxisCost& c0 = costs[0].get(m0, w[0], n0);
              for (int32_t n1 = 1; n1 <= limit[1] && n0 * n1 <= kernel.num_columns; ++n1) {
                int32_t n2 = std::min(kernel.num_columns / (n0 * n1), limit[2]);
                if (n0 * n1 * n2 * 2 < kernel.num_columns && (n0 < limit[0] || n1 < limit[1])) continue;
                const int32_t n2_parts = (limit[2] + n2 - 1) / n2;
                n2 = (limit[2] + n2_parts - 1) / n2_parts;
                const AxisCost c[kMaxRank] = {c0, costs[1].get(m1, w[1], n1), costs[2].get(m2, w[2], n2)};
                const double cost = plan_cost(kernel, c);
                if (best.kernel >= 0 && cost >= best.cost) continue;
                best.kernel = k;
                best.cost = cost;
                best.split_axis = split;
                best.visited = c[0].visits * c[1].visits * c[2].visits * kRowsPerWarpgroup * kernel.num_columns /
                               (double(problem.q_tokens()) * problem.window_volume());
                for (int a = 0; a < kMaxRank; ++a) best.q_box[a] = m[a];
                best.kv_box[0] = n0;
                best.kv_box[1] = n1;
                best.kv_box[2] = n2;
              }
            }
          }
        }
      }
    }
  }
  return best;
}

std::string key_of(const Problem& p) {
  std::string key;
  const auto add = [&key](int64_t value) { key += std::to_string(value) + ","; };
  for (const Axis& axis : p.axis) {
    for (int64_t v : {axis.q_len, axis.kv_len, axis.window, axis.stride, axis.dilation, axis.causal}) add(v);
  }
  for (int64_t v : {int64_t(p.rank), int64_t(p.sharded), p.batch, int64_t(p.heads), int64_t(p.kv_heads), int64_t(p.dim)}) {
    add(v);
  }
  return key;
}

void apply_override(const char* text, ForwardPlan* plan) {
  ForwardPlan p;
  const int fields = std::sscanf(text, "%d:%d,%d,%d:%d:%d,%d,%d", &p.kernel, &p.q_box[0], &p.q_box[1], &p.q_box[2],
                                 &p.split_axis, &p.kv_box[0], &p.kv_box[1], &p.kv_box[2]);
  if (fields == 8) *plan = p;
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

std::string describe(const Problem& problem, const ForwardPlan& plan) {
  if (plan.kernel < 0) return "no plan";
  const KernelShape& kernel = kForwardKernels[plan.kernel];
  char text[256];
  std::snprintf(text, sizeof(text),
                "hopper forward: D %d, %d x 64 queries%s of %dx%dx%d (along axis %d), %d keys of %dx%dx%d, visited %.2f",
                kernel.dim, kernel.num_consumers, kernel.shared ? "" : " (private)", plan.q_box[0], plan.q_box[1],
                plan.q_box[2], plan.split_axis - (kMaxRank - problem.rank), kernel.num_columns, plan.kv_box[0],
                plan.kv_box[1], plan.kv_box[2], plan.visited);
  return text;
}

ForwardPlan plan_forward(const Problem& problem) {
  static std::mutex mutex;
  static std::map<std::string, ForwardPlan> plans;
  const char* override_text = std::getenv("JAX_NA_HOPPER_PLAN");
  const std::string key = key_of(problem) + (override_text != nullptr ? override_text : "");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  ForwardPlan plan = search(problem);
  if (override_text != nullptr) apply_override(override_text, &plan);
  plans.emplace(key, plan);
  const char* explain = std::getenv("JAX_NA_EXPLAIN");
  if (explain != nullptr && explain[0] == '1') std::fprintf(stderr, "%s\n", describe(problem, plan).c_str());
  return plan;
}

}  // namespace jax_na::hopper
