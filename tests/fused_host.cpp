// The host side of the fused kernels behind a C interface, for tests/test_fused_host.py.
#include "fused/tile_choice_sm80.h"
#include "fused/workspace_sm80.h"

namespace {

// problem: rank, heads, kv_heads, dim, dim_v, num_extra, batch, then q_len, kv_len, window, stride, dilation, causal of 3
// axes.
jax_na::Problem read_problem(const int32_t* v) {
  jax_na::Problem p;
  p.rank = v[0];
  p.heads = v[1];
  p.kv_heads = v[2];
  p.dim = v[3];
  p.dim_v = v[4];
  p.num_extra = v[5];
  p.batch = v[6];
  for (int a = 0; a < jax_na::kMaxRank; ++a) {
    const int32_t* x = v + 7 + 6 * a;
    p.axis[a] = jax_na::Axis{x[0], x[1], x[2], x[3], x[4], x[5]};
    if (x[0] != x[1]) p.sharded = 1;
  }
  return p;
}

}  // namespace

extern "C" {

int64_t workspace_bytes(const int32_t* problem, int32_t has_bias) {
  return jax_na::fused::backward_workspace(read_problem(problem), has_bias != 0).bytes;
}

// choice: box, tiles. Returns the average union.
double choose_tile(const int32_t* problem, int32_t rows_are_keys, int32_t rows, int32_t cols, int32_t* choice) {
  const jax_na::fused::TileChoice tile =
      jax_na::fused::choose_tile(read_problem(problem), rows_are_keys != 0, rows, cols, 1.0, 1.0);
  for (int a = 0; a < jax_na::kMaxRank; ++a) {
    choice[a] = tile.box[a];
    choice[jax_na::kMaxRank + a] = tile.tiles[a];
  }
  return tile.columns;
}

}  // extern "C"
