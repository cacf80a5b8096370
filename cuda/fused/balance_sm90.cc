#include "balance_sm90.h"

#include <algorithm>
#include <array>
#include <vector>

#include "geometry.h"

namespace jax_na::hopper {
namespace {

constexpr int32_t kMostIdle = 4;         // SMs
constexpr int64_t kMostItems = 1 << 18;  // followed: at the most a few milliseconds, once per problem
constexpr double kGain = 0.99;           // PERF: of the time; a smaller gain was seen either way on an H200
constexpr int32_t kMostConsumers = 3;

using Visits = std::array<int32_t, kMostConsumers>;

// The key tiles of one shape that each consumer multiplies with on axis a, of every query tile of all dilation groups; 0
// without queries.
std::vector<Visits> visits_of_axis(const Problem& problem, const ForwardPlan& plan, int a, int shape) {
  const Axis& axis = problem.axis[a];
  const int32_t unit = plan.unit[a], extent = unit * plan.grid[a];
  const int32_t box = shape == 0 ? plan.kv_box[a] : plan.edge_box[a];
  const int32_t most = (axis.q_len + axis.dilation - 1) / axis.dilation;  // queries of a group
  std::vector<Visits> result;
  for (int32_t group = 0; group < axis.dilation; ++group) {
    const int32_t length = group_length(axis.kv_len, axis.dilation, group);
    for (int32_t first = 0; first < most; first += extent) {
      Visits visits{};
      const int32_t last = std::min(first + extent, length) - 1;
      if (last < first) {
        result.push_back(visits);
        continue;
      }
      const int32_t begin = keys_of_query(axis, length, first).begin, end = keys_of_query(axis, length, last).end;
      const AxisTiles tiles = axis_tiles(end - begin, plan.kv_box[a], plan.edge_box[a], a == plan.edge_axis);
      const int32_t from = begin + (shape == 1 && a == plan.edge_axis ? tiles.count[0] * plan.kv_box[a] : 0);
      for (int32_t w = 0; w < kMostConsumers; ++w) {
        const int32_t w_first = first + (plan.grid[a] > 1 ? w * unit : 0);  // an axis that is not split is every consumer's
        if (w_first > last) continue;
        const int32_t w_last = std::min(w_first + unit, length) - 1;
        const int32_t w_begin = std::max(0, keys_of_query(axis, length, w_first).begin - from);
        const int32_t w_end = keys_of_query(axis, length, w_last).end - from;
        visits[w] = std::max(0, std::min((w_end + box - 1) / box, tiles.count[shape]) - w_begin / box);
      }
      result.push_back(visits);
    }
  }
  return result;
}

// Time of every query tile of one head, in the order of the items.
std::vector<double> times_of_tiles(const Problem& problem, const ForwardPlan& plan) {
  const int shapes = plan.edge_axis < 0 ? 1 : kTileShapes;
  std::vector<Visits> axis[kTileShapes][kMaxRank];
  int32_t tiles[kMaxRank];  // of a dilation group
  for (int a = 0; a < kMaxRank; ++a) {
    for (int shape = 0; shape < shapes; ++shape) axis[shape][a] = visits_of_axis(problem, plan, a, shape);
    tiles[a] = int32_t(axis[0][a].size()) / problem.axis[a].dilation;
  }
  const int32_t columns = kForwardKernels[plan.kernel].num_columns;
  std::vector<double> result;
  for (int32_t g0 = 0; g0 < problem.axis[0].dilation; ++g0)
    for (int32_t g1 = 0; g1 < problem.axis[1].dilation; ++g1)
      for (int32_t g2 = 0; g2 < problem.axis[2].dilation; ++g2)
        for (int32_t t0 = 0; t0 < tiles[0]; ++t0)
          for (int32_t t1 = 0; t1 < tiles[1]; ++t1)
            for (int32_t t2 = 0; t2 < tiles[2]; ++t2) {
              Visits visits{};
              for (int shape = 0; shape < shapes; ++shape) {
                const Visits &v0 = axis[shape][0][g0 * tiles[0] + t0], &v1 = axis[shape][1][g1 * tiles[1] + t1],
                             &v2 = axis[shape][2][g2 * tiles[2] + t2];
                for (int32_t w = 0; w < kMostConsumers; ++w) visits[w] += v0[w] * v1[w] * v2[w];
              }
              const double most = *std::max_element(visits.begin(), visits.end());
              result.push_back(most == 0 ? 0 : most * (columns + kTileOverhead) + kItemOverhead);
              if (int64_t(result.size()) == kMostItems) return result;
            }
  return result;
}

double time_of_fullest(const std::vector<double>& times, int64_t items, int32_t ctas) {
  std::vector<double> sums(ctas, 0.0);
  size_t tile = 0;
  int32_t cta = 0;
  for (int64_t i = 0; i < items; ++i) {
    sums[cta] += times[tile];
    if (++tile == times.size()) tile = 0;
    if (++cta == ctas) cta = 0;
  }
  return *std::max_element(sums.begin(), sums.end());
}

}  // namespace

int32_t balanced_ctas(const Problem& problem, const ForwardPlan& plan, int32_t num_sms) {
  // Not known: where the tiles of a shard lie.
  if (problem.sharded || kForwardKernels[plan.kernel].sharing != Sharing::kShared) return num_sms;
  const std::vector<double> times = times_of_tiles(problem, plan);
  const int64_t items = std::min(int64_t(times.size()) * problem.heads * problem.batch, kMostItems);
  if (items <= num_sms) return num_sms;
  int32_t best = num_sms;
  double best_time = kGain * time_of_fullest(times, items, num_sms);
  for (int32_t ctas = num_sms - 1; ctas >= std::max(1, num_sms - kMostIdle); --ctas) {
    const double time = time_of_fullest(times, items, ctas);
    if (time < best_time) {
      best = ctas;
      best_time = time;
    }
  }
  return best;
}

}  // namespace jax_na::hopper
