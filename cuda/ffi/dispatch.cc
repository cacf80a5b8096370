#include "ffi/dispatch.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <utility>

namespace jax_na {
namespace {

Status cuda_error(const char* what, cudaError_t error) {
  return Status::error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

constexpr int kMaxDevices = 64;

}  // namespace

const std::vector<Family>& families() {
  static const auto* const list = new std::vector<Family>{
#ifdef JAX_NA_WITH_HOPPER
      {"hopper", 90, true, hopper::forward, hopper::backward},
#endif
#ifdef JAX_NA_WITH_FUSED
      {"fused", 80, false, fused::forward, fused::backward},
#endif
#ifdef JAX_NA_WITH_NAIVE
      {"naive", 80, false, naive::forward, naive::backward},
#endif
  };
  return *list;
}

const Family* choose_family(std::string_view candidates, int32_t capability, Status* status) {
  std::string reasons;
  for (size_t begin = 0; begin <= candidates.size();) {
    const size_t comma = std::min(candidates.find(',', begin), candidates.size());
    const std::string_view name = candidates.substr(begin, comma - begin);
    begin = comma + 1;
    const Family* found = nullptr;
    for (const Family& family : families()) {
      if (name == family.name) found = &family;
    }
    if (found != nullptr && found->runs_on(capability)) return found;
    reasons += (reasons.empty() ? "" : "; ") + std::string(name);
    reasons += found == nullptr
                   ? " is not in this build"
                   : " needs compute capability " + std::to_string(found->min_capability / 10) + "." +
                         std::to_string(found->min_capability % 10) + (found->exact ? " exactly" : " or newer");
  }
  *status = Status::error("no kernel family serves a device of compute capability " + std::to_string(capability / 10) +
                          "." + std::to_string(capability % 10) + ": " + reasons);
  return nullptr;
}

Status read_device(int32_t ordinal, Device* device) {
  static std::mutex mutex;
  static std::array<Device, kMaxDevices> cache;
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Status::error("device ordinal " + std::to_string(ordinal) + " is not in 0.." + std::to_string(kMaxDevices - 1));
  }
  const std::lock_guard<std::mutex> lock(mutex);
  Device& entry = cache[ordinal];
  if (entry.capability == 0) {
    int major = 0, minor = 0, num_sms = 0;
    for (const auto& [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&num_sms, cudaDevAttrMultiProcessorCount}}) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, ordinal);
      if (error != cudaSuccess) return cuda_error("reading the device's attributes", error);
    }
    entry = Device{ordinal, 10 * major + minor, num_sms};
  }
  *device = entry;
  return {};
}

DeviceGuard::DeviceGuard(int32_t ordinal) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != ordinal) {
    error = cudaSetDevice(ordinal);
    if (error == cudaSuccess) previous_ = current;
  }
  if (error != cudaSuccess) status_ = cuda_error("selecting the device of the call", error);
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace jax_na
