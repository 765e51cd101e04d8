#include "bench/bench.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "bench/cpu_layer.h"
#if QUIRE_CUDA
#include "bench/cuda_bench.h"
#endif
#include "bench/layer.h"
#include "bench/paged_batch.h"
#include "bench/statistics.h"

namespace quire::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Of the last-level cache: see Options::rotation_bytes.
constexpr std::int64_t kRotationFactor = 8;
constexpr std::int64_t kMaxCaches = 64;
constexpr std::size_t kMaxSamples = 10'000;
constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

std::string with_digits(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

// Where one workload's bytes go.
struct MemoryNeed {
  std::int64_t cache_bytes = 0;  // one cache
  std::int64_t write_bytes = 0;  // CUDA: new tokens of a cache of its own, and what the copy moves
  std::int64_t other_bytes = 0;  // query, output, new tokens
  std::int64_t num_caches = 1;
  std::int64_t total() const { return (cache_bytes + write_bytes) * num_caches + other_bytes; }
};

MemoryNeed memory_need(const Workload& workload, const Options& options,
                       std::int64_t rotation_bytes, std::int64_t budget) {
  const Model& model = workload.model;
  const ElementSizes sizes = element_sizes(options);
  const std::int64_t tokens = std::max(workload.num_tokens(), kFillTokens);
  MemoryNeed need;
  need.cache_bytes = 2 * count_blocks(workload, options.block_size) * options.block_size *
                     model.num_kv_heads * sizes.kv_row(model.head_size);
  need.other_bytes =
      2 * tokens * (model.num_heads + model.num_kv_heads) * model.head_size * sizes.query;
  if (options.device == DeviceType::kCuda) {
    need.write_bytes = 2 * tokens * model.num_kv_heads * model.head_size * sizes.query +
                       write_bytes(workload, sizes);
  }
  const std::int64_t wanted = (rotation_bytes + need.cache_bytes - 1) / need.cache_bytes;
  // Of each layer of a chain as many.
  const std::int64_t layers = options.num_layers;
  const std::int64_t caches_each =
      (std::clamp<std::int64_t>(wanted, 1, kMaxCaches) + layers - 1) / layers;
  need.num_caches = caches_each * layers;
  while (need.num_caches > layers && need.total() > budget) need.num_caches -= layers;
  return need;
}

void check_memory(const Workload& workload, const MemoryNeed& need, std::int64_t budget,
                  double scale) {
  if (need.total() <= budget) return;
  const double fitting =
      0.9 * scale * static_cast<double>(budget) / static_cast<double>(need.total());
  throw std::runtime_error(workload.name + " needs " +
                           with_digits(static_cast<double>(need.total()) / kGiB, 3) + " GiB and " +
                           with_digits(static_cast<double>(budget) / kGiB, 3) +
                           " GiB are free for it: try --scale " + with_digits(fitting, 2) +
                           ", or leave it out with --only");
}

// Calls `body(i)` with i = 0, 1, ... until both bounds are met; microseconds of each call.
template <class Body>
std::vector<double> time_calls(std::size_t min_calls, double min_ms, const Body& body) {
  std::vector<double> samples;
  double total_us = 0.0;
  while ((samples.size() < min_calls || total_us < 1000.0 * min_ms) &&
         samples.size() < kMaxSamples) {
    const Clock::time_point begin = Clock::now();
    body(samples.size());
    samples.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    total_us += samples.back();
  }
  return samples;
}

Result measure(const Workload& workload, const Options& options, const MemoryNeed& need,
               ThreadPool& threads) {
  CpuLayer layer(workload, options, need.num_caches, threads);
  Result result;
  result.workload = workload;
  result.flops = flops(workload);
  result.bytes = bytes(workload, element_sizes(options));
  result.write_bytes = write_bytes(workload, element_sizes(options));
  result.num_caches = static_cast<int>(need.num_caches);
  result.cache_bytes = layer.cache_bytes();

  layer.plan();  // the first one sets up the workspace
  result.plan_us = time_calls(21, 1.0, [&](std::size_t) { layer.plan(); });
  layer.write(0);
  result.write_us = time_calls(5, 10.0, [&](std::size_t call) { layer.write(call); });
  time_calls(1, 0.1 * options.min_time_ms, [&](std::size_t call) { layer.attend(call); });
  result.attention_us =
      time_calls(static_cast<std::size_t>(options.min_repeats), options.min_time_ms,
                 [&](std::size_t call) { layer.attend(call); });
  result.workspace_bytes = layer.workspace_bytes();
  check_output(layer.output(), workload.name);
  return result;
}

// The backend that serves the options, as Plan would choose it.
const AttentionBackend& backend_of(const Workload& workload, const Options& options) {
  AttentionConfig config;
  config.dtype = options.dtype;
  config.num_heads = workload.model.num_heads;
  config.num_kv_heads = workload.model.num_kv_heads;
  config.head_size = workload.model.head_size;
  config.block_size = options.block_size;
  config.kv_cache_dtype = options.kv_cache_dtype;
  config.backend = options.backend;
  config.device.type = options.device;
  return attention_backend(Plan(config).backend_name());
}

std::int64_t memory_budget(const Machine& machine) {
  if (machine.available_memory_bytes == 0) return std::int64_t{1} << 60;
  return static_cast<std::int64_t>(0.8 * static_cast<double>(machine.available_memory_bytes));
}

}  // namespace

ElementSizes element_sizes(const Options& options) {
  return {.query = size_of(options.dtype),
          .kv_bits = stored_head_size(options.kv_cache_dtype, 8) *
                     size_of(storage_dtype(options.kv_cache_dtype, options.dtype)),
          .kv_scale = is_per_token_head(options.kv_cache_dtype) ? 4 : 0};
}

double Report::fraction(const Result& result) const {
  return limit_us(limits, static_cast<double>(result.flops), static_cast<double>(result.bytes)) /
         median(result.attention_us);
}

Report run(const std::vector<Workload>& workloads, const Options& options,
           const Progress& progress) {
  const bool on_cuda = options.device == DeviceType::kCuda;
#if !QUIRE_CUDA
  if (on_cuda) throw std::runtime_error("this build of quire bench measures the CPU only");
#endif
  if (workloads.empty()) throw std::runtime_error("no workloads to run");
  if (options.num_layers > 1 && !on_cuda) {
    throw std::runtime_error("layers are chained in CUDA graphs: --layers needs --device cuda");
  }
  std::unique_ptr<ThreadPool> own_threads;
  if (options.num_threads > 0) own_threads = make_thread_pool(options.num_threads);
  ThreadPool& threads = own_threads ? *own_threads : default_thread_pool();

  Report report;
  report.options = options;
  report.machine = inspect_machine();
  report.num_threads = threads.num_threads();
  const AttentionBackend& backend = backend_of(workloads.front(), options);
  report.backend = backend.name();
  report.instruction_set = backend.instruction_set();

  std::int64_t budget = memory_budget(report.machine);
  std::int64_t cache_bytes = report.machine.last_level_cache_bytes;
  std::unique_ptr<LimitMeter> meter;
#if QUIRE_CUDA
  if (on_cuda) {
    const CudaMachine machine = inspect_cuda_machine();
    budget = machine.free_bytes * 9 / 10;
    cache_bytes = machine.l2_bytes;
    meter = make_cuda_limit_meter();
  }
#endif
  if (!on_cuda) meter = make_cpu_limit_meter(threads, static_cast<std::size_t>(budget) / 4);
  report.read_method = meter->read_method();
  report.flops_method = meter->flops_method();

  const std::int64_t rotation_bytes =
      options.rotation_bytes > 0 ? options.rotation_bytes : kRotationFactor * cache_bytes;
  std::vector<Workload> small;
  std::vector<MemoryNeed> needs;
  for (const Workload& workload : workloads) {
    small.push_back(scaled(workload, options.scale));
    // The meter's buffer took a quarter of the budget at most.
    needs.push_back(memory_need(small.back(), options, rotation_bytes, budget * 3 / 4));
    check_memory(small.back(), needs.back(), budget * 3 / 4, options.scale);
  }
  for (std::size_t i = 0; i < small.size(); ++i) {
    if (progress) progress(static_cast<int>(i), static_cast<int>(small.size()), small[i]);
    report.limit_samples.push_back(meter->measure());
#if QUIRE_CUDA
    if (on_cuda) {
      report.results.push_back(measure_cuda(small[i], options, needs[i].num_caches));
      continue;
    }
#endif
    report.results.push_back(measure(small[i], options, needs[i], threads));
  }
  report.limit_samples.push_back(meter->measure());
  report.limits = median_of(report.limit_samples);
  return report;
}

}  // namespace quire::bench
