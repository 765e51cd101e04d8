// quire bench: how fast attention runs over a set of workloads, beside the limits of the machine
// measured in the same run.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "bench/kernel/bench.h"
#include "bench/kernel/report.h"
#include "bench/kernel/workload.h"
#include "cli/commands.h"
#include "quire/quire.h"

namespace quire::cli {
namespace {

// Of the CPU: the whole table takes about a minute on two cores.
constexpr double kDefaultCpuScale = 0.25;

struct Arguments {
  std::string device = "cpu";
  std::string workload_file;
  std::vector<std::string> only;
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

// Before the benchmark, so that a mistyped path does not cost a run.
std::ofstream open_output(const std::string& path) {
  std::ofstream file(path);
  if (!file) throw std::runtime_error("--json: cannot write " + path);
  return file;
}

// One line that is overwritten, if people look at it.
void show_progress(int index, int count, const bench::Workload& workload) {
  if (isatty(STDERR_FILENO) == 0) return;
  std::fprintf(stderr, "\r\x1b[K[%d/%d] %s", index + 1, count, workload.name.c_str());
  std::fflush(stderr);
}

void run_bench(Arguments arguments) {
  set_device(&arguments);
  if (arguments.options.scale == 0.0) {
    arguments.options.scale = arguments.options.device == DeviceType::kCpu ? kDefaultCpuScale : 1.0;
  }
  arguments.options.kv_cache_dtype = parse_kv_cache_dtype(arguments.kv_cache_dtype);
  const std::string path =
      arguments.workload_file.empty() ? find_default_workloads() : arguments.workload_file;
  const std::vector<bench::Workload> workloads =
      select(bench::load_workloads(path), arguments.only);
  std::ofstream json;
  if (!arguments.json_file.empty()) json = open_output(arguments.json_file);

  const bench::Report report = bench::run(workloads, arguments.options, show_progress);
  if (isatty(STDERR_FILENO) != 0) std::fputs("\r\x1b[K", stderr);
  std::fputs(bench::to_table(report).c_str(), stdout);
  if (json.is_open()) {
    json << bench::to_json(report).dump(1) << '\n';
    if (!json.flush()) throw std::runtime_error("--json: writing " + arguments.json_file);
  }
}

void add_options(CLI::App* command, Arguments* arguments) {
  const std::map<std::string, DType> dtypes = {
      {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}, {"float32", DType::kFloat32}};
  bench::Options* options = &arguments->options;
  options->scale = 0.0;  // 0: the device's own
  command
      ->add_option("--device", arguments->device, "cpu, cuda, or reference for its float64 loops")
      ->check(CLI::IsMember({"cpu", "cuda", "reference"}))
      ->capture_default_str();
  command->add_option("--workload", arguments->workload_file,
                      "Workload file; default: bench/cases/workloads.json");
  command->add_option("--only", arguments->only, "Run these workloads only: NAME,...")
      ->delimiter(',');
  command
      ->add_option(
          "--scale", options->scale,
          "Shrink each workload to about this part of its flops, in (0, 1]; default 0.25 on "
          "the CPU, 1 on CUDA")
      ->check(CLI::Range(1e-6, 1.0));
  command->add_option("--repeat", options->min_repeats, "Timed calls, at least")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  command->add_option("--min-time", options->min_time_ms, "Milliseconds of timed calls, at least")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  command->add_option("--threads", options->num_threads, "Threads; 0: one for each CPU")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "bfloat16, float16 or float32; default bfloat16")
      ->transform(CLI::CheckedTransformer(dtypes));
  command
      ->add_option("--kv-cache-dtype", arguments->kv_cache_dtype,
                   "auto, float16, bfloat16, float32, fp8_e4m3, fp8_e5m2, "
                   "int8_per_token_head, fp8_per_token_head")
      ->capture_default_str();
  command->add_option("--block-size", options->block_size, "Tokens of a block")
      ->check(CLI::Range(1, 65'536))
      ->capture_default_str();
  command->add_flag("--hnd", options->heads_first, "Pages with heads first instead of slots first");
  command->add_flag("--batch-invariant", options->batch_invariant,
                    "Results that do not depend on the rest of the batch");
  command->add_flag("!--no-cascade", options->cascade,
                    "Announce no shared prefixes: each sequence reads its own keys");
  command->add_option("--seed", options->seed, "Of page order and data")->capture_default_str();
  command->add_option("--json", arguments->json_file, "Write everything, all samples included");
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
