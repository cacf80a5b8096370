// Tile sizes of the SM 8.0 kernels: one function per kernel, one row per row width of the shared tiles.
//
// What limits them: 99 KiB of shared memory (SM 8.6 and 8.9), 255 registers a thread. Warps own 16 or 32 rows; 32 rows
// halve the shared memory reads per product, 16 rows fit small windows better.
#pragma once

#include "backward_sm80.cuh"
#include "forward_sm80.cuh"

namespace jax_na::fused {

struct Shape {
  int row_tiles;  // of 16 rows, per warp
  int cols;       // of a chunk
  int stages;
  int warps;
  int min_blocks;      // per SM: caps the registers
  bool skips = false;  // leave out columns that no row of a warp sees, 16 at a time: for small windows
  constexpr int rows() const { return row_tiles * 16 * warps; }
};

constexpr Shape forward_shape(bool is_16_bit, int dim, bool large) {
  if (is_16_bit) {
    switch (dim) {
      case 32: return Shape{2, 64, 2, 2, 6};
      case 64: return large ? Shape{2, 64, 2, 4, 2} : Shape{1, 64, 2, 4, 4, true};
      case 128: return large ? Shape{2, 64, 2, 4, 2} : Shape{1, 64, 2, 4, 2};
      default: return Shape{1, 32, 2, 4, 2};
    }
  }
  switch (dim) {
    case 32: return Shape{1, 64, 2, 4, 3};
    case 64: return Shape{1, 32, 2, 4, 2};
    case 128: return Shape{1, 32, 2, 4, 1};
    default: return Shape{1, 16, 2, 2, 1};
  }
}

constexpr Shape grad_query_shape(bool is_16_bit, int dim, bool large) {
  if (is_16_bit) {
    switch (dim) {
      case 32: return Shape{1, 64, 2, 4, 4, true};
      case 64: return large ? Shape{2, 32, 2, 4, 2} : Shape{1, 64, 2, 4, 3, true};
      case 128: return Shape{1, 32, 2, 4, 2};
      default: return Shape{1, 16, 2, 4, 1};
    }
  }
  switch (dim) {
    case 32: return Shape{1, 32, 2, 4, 2};
    case 64: return Shape{1, 32, 2, 4, 1};
    case 128: return Shape{1, 16, 2, 4, 1};
    default: return Shape{1, 16, 2, 1, 1};
  }
}

constexpr Shape grad_key_value_shape(bool is_16_bit, int dim, bool large) {
  if (is_16_bit) {
    switch (dim) {
      case 32: return Shape{1, 64, 2, 4, 4, true};
      case 64: return large ? Shape{2, 32, 2, 4, 2} : Shape{1, 64, 2, 4, 2, true};
      case 128: return Shape{1, 32, 2, 4, 2};
      default: return Shape{1, 16, 2, 4, 1};
    }
  }
  switch (dim) {
    case 32: return Shape{1, 32, 2, 4, 2};
    case 64: return Shape{1, 32, 2, 4, 1};
    case 128: return Shape{1, 16, 2, 4, 1};
    default: return Shape{1, 16, 2, 1, 1};
  }
}

// The accumulators of both gradients fit the registers up to this head dimension; above, they are computed one after the
// other.
constexpr bool splits_gradients(int dim) { return dim > 128; }
// A second kernel of 128 rows: where registers allow it and a row of DESIGN.md gains by it.
constexpr bool has_large_forward(bool is_16_bit, int dim) { return is_16_bit && (dim == 64 || dim == 128); }
constexpr bool has_large_backward(bool is_16_bit, int dim) { return is_16_bit && dim == 64; }

// For the cost model (tile_choice_sm80.h): a chunk, and beginning and end of a tile, in units of a chunk of 64 columns by
// four warps of 16 rows. Warps of 32 rows share what they read; the factors reproduce which kernel was measured faster
// (DESIGN.md).
constexpr double chunk_cost(const Shape& s, bool is_backward) {
  return s.cols / 64.0 * s.warps / 4.0 * (s.row_tiles == 1 ? 1.0 : is_backward ? 1.75 : 1.55);
}
constexpr double tile_cost(const Shape& s) { return s.warps / 4.0 * (s.row_tiles == 1 ? 1.0 : 1.7); }

template <class E, int kDim, bool kLarge>
struct ForwardOf {
  static constexpr Shape s = forward_shape(E::k16Bit, kDim, kLarge);
  using Config = ForwardConfig<E, kDim, s.row_tiles, s.cols, s.stages, s.warps, s.min_blocks, s.skips>;
};
template <class E, int kDim, bool kLarge>
struct GradQueryOf {
  static constexpr Shape s = grad_query_shape(E::k16Bit, kDim, kLarge);
  using Config = BackwardConfig<E, kDim, s.row_tiles, s.cols, s.stages, s.warps, s.min_blocks, s.skips>;
};
template <class E, int kDim, int kParts, bool kLarge>
struct GradKeyValueOf {
  static constexpr Shape s = grad_key_value_shape(E::k16Bit, kDim, kLarge);
  using Config = BackwardConfig<E, kDim, s.row_tiles, s.cols, s.stages, s.warps, s.min_blocks, s.skips, kParts>;
};

}  // namespace jax_na::fused
