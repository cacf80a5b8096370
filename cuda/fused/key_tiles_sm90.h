// How a Hopper forward kernel cuts the keys of a query tile into key tiles. Host and device.
#pragma once

#include <cstdint>

#include "../common/problem.h"

namespace jax_na::hopper {

// Key tiles have one shape, or two. Boxes of the first begin where the windows begin; on one axis, the edge axis, what is
// left behind the last whole one is covered by boxes of the second shape, if it is thin enough for them: they are as
// large, thin on that axis and long on the others, and fewer. Without, an odd window's last tiles would be nearly empty.
constexpr int kTileShapes = 2;

// Key tiles of either shape along one axis; over the axes their numbers multiply.
struct AxisTiles {
  int32_t count[kTileShapes];
};

// keys: of a query tile. edge_box: 0 where there is no second shape.
JAX_NA_HOST_DEVICE AxisTiles axis_tiles(int32_t keys, int32_t box, int32_t edge_box, bool edge_axis) {
  const int32_t boxes = (keys + box - 1) / box;
  if (edge_box == 0) return {{boxes, 0}};
  if (!edge_axis) return {{boxes, (keys + edge_box - 1) / edge_box}};
  const int32_t edge = keys - (boxes - 1) * box <= edge_box ? 1 : 0;
  return {{boxes - edge, edge}};
}

}  // namespace jax_na::hopper
