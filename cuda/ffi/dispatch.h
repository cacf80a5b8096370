// From the device of a call and the caller's order of preference to the kernel family that serves it.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>
#include <vector>

#include "families.h"

namespace jax_na {

struct Family {
  const char* name;
  int32_t min_capability;  // 10 * major + minor
  bool exact;              // runs on that capability only
  Status (*forward)(const Problem&, const ForwardBuffers&, const CallOptions&, cudaStream_t);
  Status (*backward)(const Problem&, const BackwardBuffers&, const CallOptions&, cudaStream_t);

  bool runs_on(int32_t capability) const { return exact ? capability == min_capability : capability >= min_capability; }
};

// The families compiled into this module.
const std::vector<Family>& families();

// The first family of `candidates` (names separated by commas) that is compiled in and runs on `capability`; null and a
// sentence in `status` if there is none.
const Family* choose_family(std::string_view candidates, int32_t capability, Status* status);

struct Device {
  int32_t ordinal = 0;
  int32_t capability = 0;
  int32_t num_sms = 0;
};

// Read once per ordinal, then cached. Thread-safe.
Status read_device(int32_t ordinal, Device* device);

// Makes `ordinal` the calling thread's device for the lifetime of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const Status& status() const { return status_; }

 private:
  int previous_ = -1;  // -1: nothing to restore
  Status status_;
};

}  // namespace jax_na
