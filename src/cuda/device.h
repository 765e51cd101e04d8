// What the backend needs to know about a device, asked once a process.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "quire/types.h"

namespace quire::cuda {

struct DeviceInfo {
  int sm_count = 0;
  int major = 0;
  int minor = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  std::int64_t l2_bytes = 0;
  std::int64_t memory_bytes_per_us = 0;  // by its clock
  std::string name;
};

// Devices that can run our kernels (sm_80 and newer); 0 and a reason if there are none. Never
// throws: machines without a driver ask too.
struct Inventory {
  int count = 0;
  std::string reason;
};
const Inventory& inventory();

// Of one of the inventory's devices. Throws Error if it is older than sm_80.
const DeviceInfo& device_info(int index);

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(Device device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream); }
bool is_capturing(cudaStream_t stream);

}  // namespace quire::cuda
