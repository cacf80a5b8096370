// TMA tensor maps over unpermuted token tensors [batch, axis0, axis1, axis2, heads, dim]: a box of one dilation group's
// tokens of one head.
//
// Map dimensions, innermost first: (heads * dim, axis2, axis1, axis0, batch). Dilation up to 8 is the map's element
// stride. Larger ones fold: the axis becomes (length / d) steps of d tokens and the residue, times an extent, moves the
// next inner coordinate. Folding needs length % d == 0; a box that hangs over the end of the axis it folds into then
// delivers other tokens of the tensor instead of zeros. A row of a box is 128 bytes (64 at dim 32): one head's token,
// or a 64-element column block of it.
#pragma once

#include <type_traits>

#include "../arch/sm90/tma.h"
#include "../common/call.h"
#include "geometry.h"

namespace jax_na {

// How token coordinates become map coordinates; the same for every tensor with these axes.
struct TokenLayout {
  int32_t dilation[kMaxRank] = {1, 1, 1};
  int32_t fold[kMaxRank] = {0, 0, 0};  // 0: map coordinate = token; else the step of the next inner coordinate per residue
};

struct MapCoords {
  int32_t c[5];
};

__device__ __forceinline__ int32_t floor_divide(int32_t n, int32_t d) { return n >= 0 ? n / d : -((d - 1 - n) / d); }

// element: offset in (heads, dim); x: local tokens, possibly outside the tensor.
__device__ __forceinline__ MapCoords map_coords(const TokenLayout& layout, int32_t element, const int32_t (&x)[kMaxRank],
                                                int32_t batch) {
  MapCoords m{{element, x[2], x[1], x[0], batch}};
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (layout.fold[a] != 0) {
      const int32_t quotient = floor_divide(x[a], layout.dilation[a]);
      m.c[3 - a] += quotient - x[a];
      m.c[2 - a] += (x[a] - quotient * layout.dilation[a]) * layout.fold[a];
    }
  }
  return m;
}

// Map coordinates per group coordinate along axis a.
__device__ __forceinline__ int32_t map_step(const TokenLayout& layout, int a) {
  return layout.fold[a] != 0 ? 1 : layout.dilation[a];
}

// lengths: tokens per axis of the tensor; box: tokens per axis. False if TMA cannot address such boxes.
inline bool make_token_layout(TokenLayout* layout, const Problem& problem, const int32_t (&lengths)[kMaxRank],
                              const int32_t (&box)[kMaxRank], int32_t heads, int32_t dim) {
  *layout = TokenLayout();
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int32_t d = problem.axis[a].dilation;
    layout->dilation[a] = d;
    if (box[a] > 256) return false;
    if (d == 1 || (d <= 8 && (box[a] - 1) * d + 1 <= 256)) continue;
    if (lengths[a] % d != 0) return false;
    if (a == kMaxRank - 1) {
      layout->fold[a] = heads * dim;
    } else {
      layout->fold[a] = layout->fold[a + 1] != 0 ? lengths[a + 1] / problem.axis[a + 1].dilation : lengths[a + 1];
    }
  }
  return true;
}

// Null on success, else what failed. type: of the elements (2 bytes, or 4 for fp32); rows of min(dim, row_elements)
// elements.
inline const char* make_token_map(CUtensorMap* map, const TokenLayout& layout, const void* base, CUtensorMapDataType type,
                                  int32_t element_bytes, int64_t batch, const int32_t (&lengths)[kMaxRank], int32_t heads,
                                  int32_t dim, const int32_t (&box)[kMaxRank], int32_t row_elements,
                                  CUtensorMapSwizzle swizzle) {
  sm90::TensorMapRequest request;
  request.base = base;
  request.type = type;
  request.swizzle = swizzle;
  const uint64_t token_bytes = uint64_t(heads) * dim * element_bytes;
  request.size[0] = uint64_t(heads) * dim;
  request.box[0] = row_elements;
  uint64_t stride = token_bytes;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int i = kMaxRank - a;  // the map dimension
    const int32_t d = layout.dilation[a];
    const bool folded = layout.fold[a] != 0;
    request.size[i] = folded ? lengths[a] / d : lengths[a];
    request.stride_bytes[i - 1] = folded ? stride * d : stride;
    request.element_stride[i] = folded ? 1 : d;
    request.box[i] = box[a];
    if (folded) request.size[i - 1] *= d;
    stride *= lengths[a];
  }
  request.size[4] = batch;
  request.stride_bytes[3] = stride;
  return sm90::encode_tensor_map(map, request);
}

}  // namespace jax_na
