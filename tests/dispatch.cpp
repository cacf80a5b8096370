// cuda/ffi/dispatch.cc over pretended GPUs, for tests/test_dispatch.py: device 0 has compute capability 8.0, device 1 has
// 9.0, device 2 has 12.0, device 3 has 7.5.
#include "ffi/dispatch.h"

#include <atomic>
#include <string>

namespace {

constexpr int kCapability[] = {80, 90, 120, 75};
constexpr int kNumSms[] = {108, 132, 170, 40};
constexpr int kNumDevices = 4;
thread_local int current_device = 0;  // as in CUDA
std::atomic<int> num_reads = 0;

}  // namespace

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device >= kNumDevices) return cudaErrorInvalidDevice;
  ++num_reads;
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? kCapability[device] / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? kCapability[device] % 10
                                                            : kNumSms[device];
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device >= kNumDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidDevice"; }
const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }

namespace jax_na {

// Each family says which it is and where it was called.
#define JAX_NA_PRETEND_FAMILY(name)                                                                              \
  namespace name {                                                                                               \
  Status forward(const Problem&, const ForwardBuffers&, const CallOptions& options, cudaStream_t) {              \
    return Status::error(#name " on device " + std::to_string(options.device) + ", current " +                   \
                         std::to_string(current_device) + ", " + std::to_string(options.num_sms) + " SMs");      \
  }                                                                                                              \
  Status backward(const Problem&, const BackwardBuffers&, const CallOptions&, cudaStream_t) { return Status(); } \
  }
JAX_NA_PRETEND_FAMILY(naive)
JAX_NA_PRETEND_FAMILY(fused)
JAX_NA_PRETEND_FAMILY(hopper)

}  // namespace jax_na

// What the forward handler does with the device of a call: read it, choose, select, run. Returns what the family said, or
// the error.
extern "C" const char* serve(int device_ordinal, const char* candidates) {
  using namespace jax_na;
  thread_local std::string said;
  Device device;
  Status status = read_device(device_ordinal, &device);
  if (status.ok()) {
    const Family* family = choose_family(candidates, device.capability, &status);
    if (family != nullptr) {
      const DeviceGuard guard(device.ordinal);
      CallOptions options;
      options.device = device.ordinal;
      options.num_sms = device.num_sms;
      status = guard.status().ok() ? family->forward(Problem(), ForwardBuffers(), options, nullptr) : guard.status();
    }
  }
  said = status.message;
  return said.c_str();
}

extern "C" int device_now() { return current_device; }
extern "C" int attribute_reads() { return num_reads; }
