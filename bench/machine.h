// The machine a benchmark runs on: what it is called, how much memory and cache there is, and
// memory in large pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace quire::bench {

struct Machine {
  std::string cpu_name;
  int num_cpus = 0;  // that this process may use
  std::int64_t memory_bytes = 0;
  // Now, within the container's bounds if there are any; 0 if the system does not tell.
  std::int64_t available_memory_bytes = 0;
  std::int64_t last_level_cache_bytes = 0;  // as the system reports it; 32 MiB if it does not
};

Machine inspect_machine();

// Memory for caches and other large data: aligned to a cache line, in large pages where the system
// gives them (walking random 32 KiB pages in 4 KiB ones measures the TLB), touched for the first
// time by the caller. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t num_bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t size() const { return num_bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t num_bytes_ = 0;
};

}  // namespace quire::bench
