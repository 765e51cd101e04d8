// quire bench: how fast attention runs over a set of workloads, beside the limits of the machine
// measured in the same run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "bench/bench.h"
#include "bench/report.h"
#include "bench/workload.h"
#include "cli/commands.h"
#include "cli/common/options.h"
#include "cli/common/output.h"
#include "quire/quire.h"

namespace quire::cli {
namespace {

// Of the CPU: the whole table takes about a minute on two cores.
constexpr double kDefaultCpuScale = 0.25;

struct Arguments {
  std::string device = "cpu";
  std::string workload_file;
  std::vector<std::string> only;
  std::string dtype = "bfloat16";
  std::string kv_cache_dtype = "auto";
  std::string json_file;
  bench::Options options;
};

std::filesystem::path executable_path() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error);  // empty where there is none
}

// The workload file of the installation or of the source tree around the executable or the working
// directory.
std::string find_default_workloads() {
  constexpr const char* kPlaces[] = {"share/quire/bench/workloads.json",
                                     "bench/cases/workloads.json"};
  std::error_code error;
  for (std::filesystem::path start :
       {executable_path().parent_path(), std::filesystem::current_path(error)}) {
    for (; !start.empty(); start = start.parent_path()) {
      for (const char* place : kPlaces) {
        if (std::filesystem::is_regular_file(start / place, error)) return start / place;
      }
      if (start == start.root_path()) break;
    }
  }
  throw std::runtime_error(
      "bench/cases/workloads.json is neither around the executable nor around the working "
      "directory: name a workload file with --workload");
}

std::vector<bench::Workload> select(const std::vector<bench::Workload>& all,
                                    const std::vector<std::string>& names) {
  if (names.empty()) return all;
  std::vector<bench::Workload> selected;
  for (const std::string& name : names) {
    const auto found = std::find_if(all.begin(), all.end(),
                                    [&](const bench::Workload& w) { return w.name == name; });
    if (found == all.end()) {
      std::string known;
      for (const bench::Workload& w : all) known += " " + w.name;
      throw std::runtime_error("--only: no workload is called \"" + name + "\"; there are" + known);
    }
    selected.push_back(*found);
  }
  return selected;
}

// "cpu" and "cuda" are devices; "reference" is a backend of the CPU.
void set_device(Arguments* arguments) {
  if (arguments->device == "cuda") {
    arguments->options.device = DeviceType::kCuda;
  } else if (arguments->device != "cpu") {
    arguments->options.backend = arguments->device;
  }
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

DType dtype_of(const std::string& name) {
  return *std::find_if(std::begin(kDTypes), std::end(kDTypes),
                       [&](DType dtype) { return to_string(dtype) == name; });
}

void run_bench(Arguments arguments) {
  set_device(&arguments);
  if (arguments.options.scale == 0.0) {
    arguments.options.scale = arguments.options.device == DeviceType::kCpu ? kDefaultCpuScale : 1.0;
  }
  arguments.options.dtype = dtype_of(arguments.dtype);
  arguments.options.kv_cache_dtype = parse_kv_cache_dtype(arguments.kv_cache_dtype);
  const std::string path =
      arguments.workload_file.empty() ? find_default_workloads() : arguments.workload_file;
  const std::vector<bench::Workload> workloads =
      select(bench::load_workloads(path), arguments.only);
  std::optional<OutputFile> json;
  if (!arguments.json_file.empty()) json.emplace("--json", arguments.json_file);

  ProgressLine progress;
  const bench::Report report = bench::run(
      workloads, arguments.options, [&](int index, int count, const bench::Workload& workload) {
        progress.show("[" + std::to_string(index + 1) + "/" + std::to_string(count) + "] " +
                      workload.name);
      });
  progress.clear();
  std::fputs(bench::to_table(report).c_str(), stdout);
  flush_stdout();
  if (json) json->write(bench::to_json(report).dump(1) + '\n');
}

void add_options(CLI::App* command, Arguments* arguments) {
  bench::Options* options = &arguments->options;
  options->scale = 0.0;  // 0: the device's own
  command
      ->add_option("--device", arguments->device, "cpu, cuda, or reference for its float64 loops")
      ->check(CLI::IsMember({"cpu", "cuda", "reference"}))
      ->capture_default_str();
  command
      ->add_option("--workload", arguments->workload_file,
                   "Workload file; default: bench/cases/workloads.json")
      ->check(not_empty());
  command->add_option("--only", arguments->only, "Run these workloads only: NAME,...")
      ->delimiter(',');
  command
      ->add_option(
          "--scale", options->scale,
          "Shrink each workload to about this part of its flops, in (0, 1]; default 0.25 on "
          "the CPU, 1 on CUDA")
      ->check(number_in(1e-6, 1.0));
  command->add_option("--repeat", options->min_repeats, "Timed calls, at least")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  command->add_option("--min-time", options->min_time_ms, "Milliseconds of timed calls, at least")
      ->check(number_in(0.0, 1e6))
      ->capture_default_str();
  command->add_option("--threads", options->num_threads, "Threads; 0: one for each CPU")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  std::vector<std::string> dtypes;
  for (const DType dtype : kDTypes) dtypes.emplace_back(to_string(dtype));
  command->add_option("--dtype", arguments->dtype, "Of query, key and value")
      ->check(CLI::IsMember(dtypes))
      ->capture_default_str();
  command
      ->add_option("--kv-cache-dtype", arguments->kv_cache_dtype,
                   "Of the paged cache; auto: that of key and value")
      ->check(kv_cache_dtype_name())
      ->capture_default_str();
  command->add_option("--block-size", options->block_size, "Tokens of a block")
      ->check(CLI::Range(1, 65'536))
      ->capture_default_str();
  command
      ->add_option("--layers", options->num_layers,
                   "CUDA: also time so many layers in a chain, cache write and attention each")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_flag("--hnd", options->heads_first, "Pages with heads first instead of slots first");
  command->add_flag("--batch-invariant", options->batch_invariant,
                    "Results that do not depend on the rest of the batch");
  command->add_flag("!--no-cascade", options->cascade,
                    "Announce no shared prefixes: each sequence reads its own keys");
  add_seed_option(*command, options->seed, "Of page order and data");
  command->add_option("--json", arguments->json_file, "Write everything, all samples included")
      ->check(not_empty());
}

}  // namespace

void add_bench_command(CLI::App& app) {
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* command =
      app.add_subcommand("bench", "Measure attention against the limits of the machine");
  add_options(command, arguments.get());
  command->callback([arguments] { run_bench(*arguments); });
}

}  // namespace quire::cli
