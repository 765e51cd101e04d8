#include "bench/machine.h"

#include <algorithm>
#include <fstream>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace quire::bench {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The value of the first line "<key> ... : value" of a file like /proc/cpuinfo; "" if there is
// none.
std::string value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(key, 0) != 0) continue;
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

// "23872 kB", "32768K", "12345": bytes; 0 for anything else ("max").
std::int64_t parse_bytes(const std::string& text) {
  std::istringstream stream(text);
  std::int64_t number = 0;
  std::string unit;
  if (!(stream >> number)) return 0;
  stream >> unit;
  if (unit == "kB" || unit == "K") return number << 10;
  if (unit == "M") return number << 20;
  return number;
}

// The number behind `key` in a file of lines "key number"; 0 if there is none.
std::int64_t field_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::int64_t number = 0;
  while (file >> name >> number) {
    if (name == key) return number;
  }
  return 0;
}

std::int64_t last_level_cache_bytes() {
  std::int64_t largest = 0;
  for (int i = 0; i < 8; ++i) {
    const std::string size =
        first_line("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size");
    largest = std::max(largest, parse_bytes(size));
  }
  return largest > 0 ? largest : std::int64_t{32} << 20;
}

int num_usable_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

Machine inspect_machine() {
  Machine machine;
  machine.cpu_name = value_of("/proc/cpuinfo", "model name");
  if (machine.cpu_name.empty()) machine.cpu_name = "unknown CPU";
  machine.num_cpus = num_usable_cpus();
  machine.memory_bytes = parse_bytes(value_of("/proc/meminfo", "MemTotal"));
  machine.available_memory_bytes = parse_bytes(value_of("/proc/meminfo", "MemAvailable"));
  const std::int64_t bound = parse_bytes(first_line("/sys/fs/cgroup/memory.max"));
  if (bound > 0) {
    const std::int64_t used = parse_bytes(first_line("/sys/fs/cgroup/memory.current")) -
                              field_of("/sys/fs/cgroup/memory.stat", "inactive_file");
    machine.available_memory_bytes =
        std::min(machine.available_memory_bytes, std::max<std::int64_t>(bound - used, 0));
  }
  machine.last_level_cache_bytes = last_level_cache_bytes();
  return machine;
}

Buffer::Buffer(std::size_t num_bytes) : num_bytes_(num_bytes) {
  const std::size_t alignment = num_bytes >= kLargePage ? kLargePage : 64;
  data_ = ::operator new(std::max<std::size_t>(num_bytes, 1), std::align_val_t(alignment));
#ifdef MADV_HUGEPAGE
  // Best effort: without large pages the figures are lower, not wrong.
  if (num_bytes >= kLargePage) {
    (void)madvise(data_, num_bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
  }
#endif
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  const std::size_t alignment = num_bytes_ >= kLargePage ? kLargePage : 64;
  ::operator delete(data_, std::align_val_t(alignment));
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

}  // namespace quire::bench
