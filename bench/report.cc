#include "bench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <vector>

#include "bench/statistics.h"

namespace quire::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kGiga = 1e9;
constexpr double kMiB = 1024.0 * 1024.0;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void append(std::string* out, const char* pattern, ...) {
  char line[512];
  std::va_list args;
  va_start(args, pattern);
  std::vsnprintf(line, sizeof line, pattern, args);
  va_end(args);
  *out += line;
}

// What is derived from a result, under the report's limits.
struct Figures {
  double time_us;
  double limit_us;
  double fraction;
  double gb_per_s;
  double gflop_per_s;
  bool memory_bound;
  double write_us;
  double write_gb_per_s;
  double copy_us;  // 0: not measured
  double write_fraction;
  double layer_us;           // 0: not measured
  double layer_overhead_us;  // over cache write and attention for themselves
};

Figures figures_of(const Report& report, const Result& result) {
  const auto num_flops = static_cast<double>(result.flops);
  const auto num_bytes = static_cast<double>(result.bytes);
  Figures f{};
  f.time_us = median(result.attention_us);
  f.limit_us = limit_us(report.limits, num_flops, num_bytes);
  f.fraction = report.fraction(result);
  f.gb_per_s = num_bytes / f.time_us * 1e6 / kGiga;
  f.gflop_per_s = num_flops / f.time_us * 1e6 / kGiga;
  f.memory_bound = is_memory_bound(report.limits, num_flops, num_bytes);
  f.write_us = median(result.write_us);
  f.write_gb_per_s = static_cast<double>(result.write_bytes) / f.write_us * 1e6 / kGiga;
  if (!result.copy_us.empty()) {
    f.copy_us = median(result.copy_us);
    f.write_fraction = f.copy_us / f.write_us;
  }
  if (!result.layer_us.empty()) {
    f.layer_us = median(result.layer_us);
    f.layer_overhead_us = f.layer_us - f.write_us - f.time_us;
  }
  return f;
}

// Whether the limits moved so much during the run that its figures deserve doubt.
bool is_unsteady(const Report& report) {
  constexpr double kTolerance = 0.1;
  int num_far = 0;
  for (const LimitSample& sample : report.limit_samples) {
    const double read = sample.bytes_per_second / report.limits.bytes_per_second;
    const double compute = sample.flops_per_second / report.limits.flops_per_second;
    if (std::fabs(read - 1.0) > kTolerance || std::fabs(compute - 1.0) > kTolerance) ++num_far;
  }
  return 4 * num_far > static_cast<int>(report.limit_samples.size());
}

struct Means {
  std::vector<double> all;
  std::vector<double> memory_bound;
  std::vector<double> compute_bound;
};

Means fractions_of(const Report& report) {
  Means means;
  for (const Result& result : report.results) {
    const Figures f = figures_of(report, result);
    means.all.push_back(f.fraction);
    (f.memory_bound ? means.memory_bound : means.compute_bound).push_back(f.fraction);
  }
  return means;
}

void append_mean(std::string* out, const char* name, const std::vector<double>& fractions) {
  if (fractions.empty()) return;
  append(out, "  %-16s %.3f  (%zu workloads)\n", name, geometric_mean(fractions), fractions.size());
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

Json options_json(const Options& options) {
  return {{"backend", options.backend},
          {"scale", options.scale},
          {"dtype", to_string(options.dtype)},
          {"kv_cache_dtype", to_string(options.kv_cache_dtype)},
          {"kv_layout", options.heads_first ? "HND" : "NHD"},
          {"block_size", options.block_size},
          {"batch_invariant", options.batch_invariant},
          {"cascade", options.cascade},
          {"min_repeats", options.min_repeats},
          {"min_time_ms", options.min_time_ms},
          {"num_layers", options.num_layers},
          {"seed", options.seed}};
}

Json machine_json(const Report& report) {
  const Machine& machine = report.machine;
  return {{"device", to_string(Device{report.options.device, 0})},
          {"cpu", machine.cpu_name},
          {"num_cpus", machine.num_cpus},
          {"num_threads", report.num_threads},
          {"memory_bytes", machine.memory_bytes},
          {"last_level_cache_bytes", machine.last_level_cache_bytes},
          {"backend", report.backend},
          {"instruction_set", report.instruction_set}};
}

Json limits_json(const Report& report) {
  Json samples = Json::array();
  for (const LimitSample& sample : report.limit_samples) {
    samples.push_back({{"gb_per_s", sample.bytes_per_second / kGiga},
                       {"gflop_per_s", sample.flops_per_second / kGiga}});
  }
  return {{"gb_per_s", report.limits.bytes_per_second / kGiga},
          {"gflop_per_s", report.limits.flops_per_second / kGiga},
          {"read_method", report.read_method},
          {"flops_method", report.flops_method},
          {"steady", !is_unsteady(report)},
          {"samples", samples}};
}

void append_writes(std::string* out, const Report& report) {
  if (report.results.empty() || report.results.front().copy_us.empty()) return;
  *out += "\nnew tokens into the cache, beside device-to-device copies of as many bytes\n";
  append(out, "%-20s %6s %8s %9s %7s %9s %8s\n", "workload", "tokens", "MB", "time us", "TB/s",
         "copy us", "fraction");
  for (const Result& result : report.results) {
    const Figures f = figures_of(report, result);
    append(out, "%-20s %6lld %8.2f %9.2f %7.3f %9.2f %8.3f\n", result.workload.name.c_str(),
           static_cast<long long>(result.workload.num_tokens()),
           1e-6 * static_cast<double>(result.write_bytes), f.write_us, 1e-3 * f.write_gb_per_s,
           f.copy_us, f.write_fraction);
  }
}

void append_layers(std::string* out, const Report& report) {
  if (report.results.empty() || report.results.front().layer_us.empty()) return;
  append(out, "\ncache write and attention of %d layers in a chain, beside both for themselves\n",
         report.options.num_layers);
  append(out, "%-20s %11s %9s %13s %11s\n", "workload", "layer us", "write us", "attention us",
         "overhead us");
  for (const Result& result : report.results) {
    const Figures f = figures_of(report, result);
    append(out, "%-20s %11.2f %9.2f %13.2f %11.2f\n", result.workload.name.c_str(), f.layer_us,
           f.write_us, f.time_us, f.layer_overhead_us);
  }
}

Json result_json(const Report& report, const Result& result) {
  const Figures f = figures_of(report, result);
  Json batch = Json::array();
  for (const Sequence& s : result.workload.batch) batch.push_back({s.query_len, s.seq_len});
  Json json = {{"name", result.workload.name},
               {"model", result.workload.model.name},
               {"scale", result.workload.scale},
               {"flops", result.flops},
               {"bytes", result.bytes},
               {"time_us", f.time_us},
               {"limit_us", f.limit_us},
               {"bound", f.memory_bound ? "memory" : "compute"},
               {"fraction", f.fraction},
               {"gb_per_s", f.gb_per_s},
               {"gflop_per_s", f.gflop_per_s},
               {"plan_us", median(result.plan_us)},
               {"write_bytes", result.write_bytes},
               {"write_us", f.write_us},
               {"write_gb_per_s", f.write_gb_per_s},
               {"host_us", median(result.host_us)},
               {"num_caches", result.num_caches},
               {"cache_bytes", result.cache_bytes},
               {"workspace_bytes", result.workspace_bytes},
               {"batch", batch},
               {"samples_us", result.attention_us},
               {"plan_samples_us", result.plan_us},
               {"write_samples_us", result.write_us}};
  if (!result.copy_us.empty()) {
    json["copy_us"] = f.copy_us;
    json["write_fraction"] = f.write_fraction;
    json["copy_samples_us"] = result.copy_us;
  }
  if (report.options.device == DeviceType::kCuda) json["max_error"] = result.max_error;
  if (!result.layer_us.empty()) {
    json["layer_us"] = f.layer_us;
    json["layer_overhead_us"] = f.layer_overhead_us;
    json["layer_samples_us"] = result.layer_us;
  }
  return json;
}

}  // namespace

std::string to_table(const Report& report) {
  std::string out;
  append(&out, "%s, %d threads, backend %s (%s), %s, cache %s, scale %g\n",
         report.machine.cpu_name.c_str(), report.num_threads, report.backend.c_str(),
         report.instruction_set.c_str(), to_string(report.options.dtype),
         to_string(report.options.kv_cache_dtype), report.options.scale);
  append(&out, "limits, medians of %zu measurements in this run:\n", report.limit_samples.size());
  append(&out, "  read    %8.1f GB/s     (%s)\n", report.limits.bytes_per_second / kGiga,
         report.read_method.c_str());
  append(&out, "  compute %8.1f GFLOP/s  (%s)\n", report.limits.flops_per_second / kGiga,
         report.flops_method.c_str());
  if (is_unsteady(report)) {
    out +=
        "  note: over a quarter of the limit measurements lie more than 10 % off their median: the "
        "machine\n  was not quiet, and neither are the figures below\n";
  }
  append(&out, "\n%-20s %5s %6s %11s %7s %9s %11s %7s %8s %8s %8s\n", "workload", "seqs", "rows",
         "time us", "GB/s", "GFLOP/s", "limit us", "bound", "fraction", "plan us", "write us");
  const bool on_cuda = report.options.device == DeviceType::kCuda;
  for (const Result& result : report.results) {
    const Figures f = figures_of(report, result);
    append(&out, "%-20s %5zu %6lld %11.1f %7.2f %9.1f %11.1f %7s %8.3f %8.1f %8.1f\n",
           result.workload.name.c_str(), result.workload.batch.size(),
           static_cast<long long>(result.workload.num_tokens()), f.time_us, f.gb_per_s,
           f.gflop_per_s, f.limit_us, f.memory_bound ? "memory" : "compute", f.fraction,
           median(result.plan_us), f.write_us);
    if (on_cuda) {
      out.pop_back();
      append(&out, "  host %.1f us\n", median(result.host_us));
    }
  }
  append_writes(&out, report);
  append_layers(&out, report);
  const Means means = fractions_of(report);
  out += "\ngeometric mean of the fractions\n";
  append_mean(&out, "all", means.all);
  append_mean(&out, "memory-bound", means.memory_bound);
  append_mean(&out, "compute-bound", means.compute_bound);
  std::int64_t workspace = 0;
  for (const Result& result : report.results) {
    workspace = std::max(workspace, result.workspace_bytes);
  }
  append(&out, "largest workspace %.2f MiB\n", static_cast<double>(workspace) / kMiB);
  return out;
}

Json to_json(const Report& report) {
  Json results = Json::array();
  for (const Result& result : report.results) results.push_back(result_json(report, result));
  const Means means = fractions_of(report);
  return {{"quire_version", QUIRE_VERSION_STRING},
          {"date", utc_now()},
          {"machine", machine_json(report)},
          {"options", options_json(report.options)},
          {"limits", limits_json(report)},
          {"geometric_mean", geometric_mean(means.all)},
          {"geometric_mean_memory_bound", geometric_mean(means.memory_bound)},
          {"geometric_mean_compute_bound", geometric_mean(means.compute_bound)},
          {"workloads", results}};
}

}  // namespace quire::bench
