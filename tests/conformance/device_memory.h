// Memory of the device under test. The suite prepares everything on the host and moves bytes
// through this interface, so that it runs unchanged on every kind of device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "quire/types.h"

namespace quire::conformance {

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  virtual Device device() const = 0;
  virtual void* allocate(std::size_t bytes) = 0;  // aligned to 64 bytes or better
  virtual void release(void* memory) = 0;
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  // Returns when all queued work is done; throws if it failed.
  virtual void synchronize() = 0;

  // Names of the kernels that `work` launches on the context's stream. It is run twice. None where
  // a device has no such thing.
  virtual std::set<std::string> launched_kernels(
      const std::function<void(const Context&)>& /*work*/) {
    return {};
  }

  // Whether AddressSanitizer watches this memory, so that guard zones can be closed for reads too.
  virtual bool poisonable() const { return false; }
};

// Throws Error for a device type that no memory is registered for.
DeviceMemory& memory_of(DeviceType type);

// A device's backend registers its memory once (CUDA does it from its own translation unit).
void register_memory(DeviceType type, std::function<std::unique_ptr<DeviceMemory>()> make);

}  // namespace quire::conformance
