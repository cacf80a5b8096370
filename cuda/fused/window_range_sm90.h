// How a consumer has to treat a key tile, from the windows of its queries.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "geometry.h"

namespace jax_na::hopper {

// Two bits. Neither: outside its windows; kInside alone: mask it; both: every row sees every key.
constexpr uint32_t kInside = 1, kFull = 2;

// The windows of a run of queries on one axis: every query's keys lie in `any`, and keys in `all` are seen by every query.
struct WindowRange {
  Interval any;
  Interval all;

  // Of the keys [begin, end); over the axes the classes AND.
  __device__ __forceinline__ uint32_t classes(int32_t begin, int32_t end) const {
    return (begin < any.end && end > any.begin ? kInside : 0) | (begin >= all.begin && end <= all.end ? kFull : 0);
  }
};

}  // namespace jax_na::hopper
