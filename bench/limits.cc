#include "bench/limits.h"

#include <algorithm>

#include "bench/statistics.h"

namespace quire::bench {

LimitSample median_of(const std::vector<LimitSample>& samples) {
  std::vector<double> bytes;
  std::vector<double> flops;
  for (const LimitSample& sample : samples) {
    bytes.push_back(sample.bytes_per_second);
    flops.push_back(sample.flops_per_second);
  }
  return {median(bytes), median(flops)};
}

double limit_us(const LimitSample& limits, double flops, double bytes) {
  return 1e6 * std::max(flops / limits.flops_per_second, bytes / limits.bytes_per_second);
}

bool is_memory_bound(const LimitSample& limits, double flops, double bytes) {
  return bytes / limits.bytes_per_second >= flops / limits.flops_per_second;
}

}  // namespace quire::bench
