#include "conformance/device_memory.h"

#include <cstring>
#include <map>
#include <memory>
#include <new>

namespace quire::conformance {

#if QUIRE_CUDA
std::unique_ptr<DeviceMemory> make_cuda_memory();  // cuda_memory.cc
#endif

// guarded_memory.cc
std::unique_ptr<DeviceMemory> make_guarded_memory();
std::unique_ptr<DeviceMemory> make_arena(std::unique_ptr<DeviceMemory> base);

namespace {

class CpuMemory : public DeviceMemory {
 public:
  Device device() const override { return {DeviceType::kCpu, 0}; }
  void* allocate(std::size_t bytes) override { return ::operator new(bytes, kAlignment); }
  void release(void* memory) override { ::operator delete(memory, kAlignment); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void synchronize() override {}
  bool poisonable() const override { return true; }

 private:
  static constexpr std::align_val_t kAlignment{64};
};

struct Entry {
  std::function<std::unique_ptr<DeviceMemory>()> make;
  std::unique_ptr<DeviceMemory> memory;
};

std::map<DeviceType, Entry>& registry() {
  static std::map<DeviceType, Entry> entries = [] {
    std::map<DeviceType, Entry> initial;
    initial[DeviceType::kCpu].make = [] { return std::make_unique<CpuMemory>(); };
#if QUIRE_CUDA
    initial[DeviceType::kCuda].make = make_cuda_memory;
#endif
    return initial;
  }();
  return entries;
}

}  // namespace

DeviceMemory& memory_of(DeviceType type) {
  const auto found = registry().find(type);
  if (found == registry().end()) {
    throw Error("device", "a device whose memory the conformance suite knows",
                to_string(Device{type, 0}));
  }
  Entry& entry = found->second;
  if (entry.memory == nullptr) entry.memory = entry.make();
  return *entry.memory;
}

void use_guard_pages() {
  registry()[DeviceType::kCpu].make = [] { return make_guarded_memory(); };
}

void use_arena() {
  Entry& entry = registry()[DeviceType::kCuda];
  if (!entry.make) return;
  entry.make = [make = entry.make] { return make_arena(make()); };
}

}  // namespace quire::conformance
