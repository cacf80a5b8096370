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

// The key tiles that each consumer multiplies with on one axis, of every query tile of all dilation groups; 0 without
// queries.
std::vector<Visits> visits_of_axis(const Axis& axis, int32_t unit, int32_t grid, int32_t kv_box) {
  std::vector<Visits> result;
  const int32_t extent = unit * grid;
  const int32_t most = (axis.q_len + axis.dilation - 1) / axis.dilation;  // queries of a group
  for (int32_t group = 0; group < axis.dilation; ++group) {
    const int32_t length = group_length(axis.kv_len, axis.dilation, group);
    for (int32_t first = 0; first < most; first += extent) {
      Visits visits{};
      for (int32_t w = 0; w < kMostConsumers; ++w) {
        const int32_t w_first = first + (grid > 1 ? w * unit : 0);  // an axis that is not split is every consumer's
        if (w_first >= std::min(first + extent, length)) continue;
        const int32_t w_last = std::min(w_first + unit, length) - 1, begin = keys_of_query(axis, length, first).begin;
        visits[w] = (keys_of_query(axis, length, w_last).end - begin + kv_box - 1) / kv_box -
                    (keys_of_query(axis, length, w_first).begin - begin) / kv_box;
      }
      result.push_back(visits);
    }
  }
  return result;
}

// Time of every query tile of one head, in the order of the items.
std::vector<double> times_of_tiles(const Problem& problem, const ForwardPlan& plan) {
  std::vector<Visits> axis[kMaxRank];
  int32_t tiles[kMaxRank];  // of a dilation group
  for (int a = 0; a < kMaxRank; ++a) {
    axis[a] = visits_of_axis(problem.axis[a], plan.unit[a], plan.grid[a], plan.kv_box[a]);
    tiles[a] = int32_t(axis[a].size()) / problem.axis[a].dilation;
  }
  const int32_t columns = kForwardKernels[plan.kernel].num_columns;
  std::vector<double> result;
  for (int32_t g0 = 0; g0 < problem.axis[0].dilation; ++g0)
    for (int32_t g1 = 0; g1 < problem.axis[1].dilation; ++g1)
      for (int32_t g2 = 0; g2 < problem.axis[2].dilation; ++g2)
        for (int32_t t0 = 0; t0 < tiles[0]; ++t0)
          for (int32_t t1 = 0; t1 < tiles[1]; ++t1)
            for (int32_t t2 = 0; t2 < tiles[2]; ++t2) {
              const Visits &v0 = axis[0][g0 * tiles[0] + t0], &v1 = axis[1][g1 * tiles[1] + t1],
                           &v2 = axis[2][g2 * tiles[2] + t2];
              double most = 0;
              for (int32_t w = 0; w < kMostConsumers; ++w) most = std::max(most, double(v0[w]) * v1[w] * v2[w]);
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
