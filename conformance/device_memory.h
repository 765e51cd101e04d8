// Memory of the device under test. The suite prepares everything on the host and moves bytes
// through this interface, so that it runs unchanged on every kind of device.
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string>

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

  // A stream of its own for Context::stream; null where a device has none.
  virtual void* make_stream() { return nullptr; }
  virtual void release_stream(void* /*stream*/) {}

  // Runs `work` and then records it as a graph: calling the result runs the record, and returns
  // when it is done. Empty where a device has no such thing.
  virtual std::function<void()> record(const std::function<void(const Context&)>& /*work*/) {
    return {};
  }

  // Bytes with a known pattern that belong before and behind each buffer; 0 where the memory guards
  // its ends by itself.
  virtual std::size_t guard_bytes() const { return 256; }

  // Whether AddressSanitizer watches this memory, so that guard zones can be closed for reads too.
  virtual bool poisonable() const { return false; }
};

// Throws Error for a device type that no memory is registered for.
DeviceMemory& memory_of(DeviceType type);

// CPU memory from now on lies against pages that cannot be touched, at its end or at its start by
// turns: a read outside ends the process. Before the first use of memory_of().
void use_guard_pages();

// CUDA memory from now on comes out of one large allocation: sixteen processes that allocate and
// free at the same time wait for each other most of the time. Before the first use of memory_of().
void use_arena();

}  // namespace quire::conformance
