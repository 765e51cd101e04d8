// Measures attention over workloads: time of a call, of planning a step and of the cache write,
// each workload beside the limits of the machine in the same run.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/limits.h"
#include "bench/machine.h"
#include "bench/workload.h"
#include "quire/quire.h"

namespace quire::bench {

struct Options {
  DeviceType device = DeviceType::kCpu;
  std::string backend;  // "": the best one of the device
  double scale = 1.0;
  DType dtype = DType::kBFloat16;  // of query, key and value
  KvCacheDType kv_cache_dtype = KvCacheDType::kAuto;
  bool heads_first = false;  // HND pages instead of NHD ones
  std::int64_t block_size = 16;
  bool batch_invariant = false;
  bool cascade = true;  // shared prefixes are announced; else read by each sequence for itself
  int min_repeats = 3;
  double min_time_ms = 300.0;
  int num_threads = 0;  // 0: one for each CPU
  // Calls rotate over caches of this size together, so that one is gone from the last-level cache
  // when its turn comes again; 0: eight times the last-level cache.
  std::int64_t rotation_bytes = 0;
  int num_layers = 1;  // CUDA: above 1, so many are also timed in a chain
  std::uint64_t seed = 1;
};

struct Result {
  Workload workload;  // as it ran, scaled
  std::int64_t flops = 0;
  std::int64_t bytes = 0;
  int num_caches = 0;            // that the calls rotate over
  std::int64_t cache_bytes = 0;  // of one of them
  std::int64_t workspace_bytes = 0;
  std::vector<double> attention_us;
  std::vector<double> plan_us;
  std::int64_t write_bytes = 0;  // read and written by a cache write
  std::vector<double> write_us;
  std::vector<double> copy_us;  // CUDA: of a device-to-device copy that moves as many bytes
  std::vector<double> host_us;  // CUDA: of the host, for an eager cache write and attention
  // CUDA, more than one layer: of a cache write and attention, in a graph of such pairs.
  std::vector<double> layer_us;
  // CUDA: largest_row_error() of the output; a run whose output is wrong throws.
  double max_error = 0.0;
};

struct Report {
  Options options;
  Machine machine;
  std::string backend;
  std::string instruction_set;
  int num_threads = 0;
  std::string read_method;
  std::string flops_method;
  std::vector<LimitSample> limit_samples;  // before each workload, and after the last
  LimitSample limits;                      // their medians
  std::vector<Result> results;

  double fraction(const Result& result) const;  // of the limit, by the median time
};

// Sizes of a stored element for the options' dtypes.
ElementSizes element_sizes(const Options& options);

// Told before each workload, for people who wait.
using Progress = std::function<void(int index, int count, const Workload& workload)>;

// Runs all workloads (unscaled ones: the options scale them). Throws std::runtime_error before
// anything runs if one does not fit into memory, quire::Error if the backend does not support one.
Report run(const std::vector<Workload>& workloads, const Options& options,
           const Progress& progress = {});

}  // namespace quire::bench
