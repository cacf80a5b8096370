// The order in which CTAs take the items of a forward kernel: CTA c takes number c, c + CTAs, and so on. Host and device.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace jax_na::hopper {

// Items are counted tile after tile, instance (batch entry, head, dilation group) after instance: CTAs at work at a time
// then share keys in L2. Under a causal mask the first layers of an instance's tiles are short. They come behind all other
// tiles, the longest first, so that what is left when the SMs run out of items is short.
class Schedule {
 public:
  Schedule() = default;
  // An instance has `layers` of `layer` tiles each; the first `short_layers` are short.
  Schedule(uint32_t instances, uint32_t layers, uint32_t layer, uint32_t short_layers)
      : tiles_(layers * layer),
        short_tiles_(short_layers * layer),
        long_items_(instances * (tiles_ - short_tiles_)),
        long_tiles_(short_layers < layers ? tiles_ - short_tiles_ : 1),
        layer_(layer),
        instances_(instances) {}

  JAX_NA_HOST_DEVICE uint32_t item(uint32_t number) const {
    if (short_tiles_ == 0) return number;
    uint32_t n = number;
    if (n < long_items_) {
      const uint32_t tile = long_tiles_.split(n);
      return n * tiles_ + short_tiles_ + tile;
    }
    n -= long_items_;
    const uint32_t tile = layer_.split(n), instance = instances_.split(n);
    return instance * tiles_ + short_tiles_ - (n + 1) * layer_.divisor + tile;
  }

 private:
  uint32_t tiles_ = 0;  // of an instance
  uint32_t short_tiles_ = 0;
  uint32_t long_items_ = 0;  // of all instances
  FastDivisor long_tiles_;   // of an instance
  FastDivisor layer_;
  FastDivisor instances_;
};

}  // namespace jax_na::hopper
