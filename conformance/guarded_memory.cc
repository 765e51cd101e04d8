// Memory for long campaigns: pages that cannot be touched around every buffer on the CPU, and one
// large allocation for all buffers on a GPU.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "conformance/device_memory.h"

namespace quire::conformance {

std::unique_ptr<DeviceMemory> make_guarded_memory();
std::unique_ptr<DeviceMemory> make_arena(std::unique_ptr<DeviceMemory> base);

namespace {

class GuardedMemory : public DeviceMemory {
 public:
  Device device() const override { return {DeviceType::kCpu, 0}; }

  void* allocate(std::size_t bytes) override {
    const std::size_t pages = size_class((bytes + page_ - 1) / page_);
    std::byte* first = take(pages);
    // What behind the end is left of 4 bytes is all that a read could go unnoticed in.
    const std::size_t used = (bytes + 3) / 4 * 4;
    std::byte* start = at_end_ ? first + pages * page_ - used : first;
    at_end_ = !at_end_;
    live_[start] = {first, pages};
    return start;
  }
  void release(void* memory) override {
    const auto found = live_.find(static_cast<std::byte*>(memory));
    const auto [first, pages] = found->second;
    live_.erase(found);
    free_[pages].push_back(first);
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void synchronize() override {}
  std::size_t guard_bytes() const override { return 0; }

 private:
  // Mappings are kept: new ones cost a page fault for every 4 KB. Few sizes, so that they are used
  // again: four to each power of two.
  static std::size_t size_class(std::size_t pages) {
    std::size_t step = 1;
    while (step * 8 <= pages) step *= 2;
    return std::max<std::size_t>((pages + step - 1) / step * step, 1);
  }

  std::byte* take(std::size_t pages) {
    std::vector<std::byte*>& kept = free_[pages];
    if (!kept.empty()) {
      std::byte* first = kept.back();
      kept.pop_back();
      return first;
    }
    void* all = mmap(nullptr, (pages + 2) * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    std::byte* first = static_cast<std::byte*>(all) + page_;
    if (mprotect(first, pages * page_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    return first;
  }

  struct Pages {
    std::byte* first;
    std::size_t count;
  };
  std::size_t page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  bool at_end_ = true;
  std::map<std::byte*, Pages> live_;
  std::map<std::size_t, std::vector<std::byte*>> free_;
};

// Hands out one allocation from its start on, and starts again when all of it has come back.
class Arena : public DeviceMemory {
 public:
  explicit Arena(std::unique_ptr<DeviceMemory> base) : base_(std::move(base)) {}
  ~Arena() override {
    if (memory_ != nullptr) base_->release(memory_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Device device() const override { return base_->device(); }
  void* allocate(std::size_t bytes) override {
    if (memory_ == nullptr) memory_ = static_cast<std::byte*>(base_->allocate(kBytes));
    const std::size_t begin = (used_ + 255) / 256 * 256;
    if (begin + bytes > kBytes) return base_->allocate(bytes);
    used_ = begin + bytes;
    ++live_;
    return memory_ + begin;
  }
  void release(void* memory) override {
    auto* at = static_cast<std::byte*>(memory);
    if (at < memory_ || at >= memory_ + kBytes) return base_->release(memory);
    if (--live_ == 0) used_ = 0;
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    base_->upload(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    base_->download(to, from, bytes);
  }
  void synchronize() override { base_->synchronize(); }
  void* make_stream() override { return base_->make_stream(); }
  void release_stream(void* stream) override { base_->release_stream(stream); }
  std::function<void()> record(const std::function<void(const Context&)>& work) override {
    return base_->record(work);
  }
  std::set<std::string> launched_kernels(const std::function<void(const Context&)>& work) override {
    return base_->launched_kernels(work);
  }
  std::size_t guard_bytes() const override { return base_->guard_bytes(); }

 private:
  static constexpr std::size_t kBytes = std::size_t{768} << 20U;
  std::unique_ptr<DeviceMemory> base_;
  std::byte* memory_ = nullptr;
  std::size_t used_ = 0;
  std::int64_t live_ = 0;
};

}  // namespace

std::unique_ptr<DeviceMemory> make_guarded_memory() { return std::make_unique<GuardedMemory>(); }

std::unique_ptr<DeviceMemory> make_arena(std::unique_ptr<DeviceMemory> base) {
  return std::make_unique<Arena>(std::move(base));
}

}  // namespace quire::conformance
