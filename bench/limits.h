// What the machine can do, measured beside the workloads in the same run: the rate at which it
// reads memory and the rate of its multiply-adds. A device has a LimitMeter of its own: the CPU's
// is make_cpu_limit_meter(), a CUDA device's stands on a copy kernel and a GEMM.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "quire/types.h"

namespace quire::bench {

struct LimitSample {
  double bytes_per_second = 0.0;
  double flops_per_second = 0.0;
};

class LimitMeter {
 public:
  virtual ~LimitMeter() = default;

  // Measures once, in about 0.1 s. The benchmark calls it before and after each workload.
  virtual LimitSample measure() = 0;

  // How each limit is measured, for people: "512 MiB with AVX3 loads", "fp32 AVX3 FMA".
  virtual std::string read_method() const = 0;
  virtual std::string flops_method() const = 0;
};

// Plain vector loads over a buffer far beyond the last-level cache, and chains of independent fp32
// multiply-adds in registers (bf16 products where the CPU backend uses instructions for these), both on
// all threads of the pool with the best instructions of this machine. `max_buffer_bytes` bounds the
// buffer where memory is short.
std::unique_ptr<LimitMeter> make_cpu_limit_meter(ThreadPool& threads, std::size_t max_buffer_bytes);

// Runs `num_steps` of AMX's tile products and returns their flops. Only where the CPU backend runs
// on AMX.
double run_tile_products(std::int64_t num_steps, float start, float* sink);
// The same by AVX-512's bf16 instructions. Only where the CPU backend uses them.
double run_pair_products(std::int64_t num_steps, float start, float* sink);

// The limits of a whole run: medians of all samples.
LimitSample median_of(const std::vector<LimitSample>& samples);

// The least time, in microseconds, that a workload of these costs can take, and which limit it is.
double limit_us(const LimitSample& limits, double flops, double bytes);
bool is_memory_bound(const LimitSample& limits, double flops, double bytes);

}  // namespace quire::bench
