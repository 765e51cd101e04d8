// quire verify: random cases of the conformance suite, or stored outputs of vLLM's Triton kernel,
// on a device of this machine.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "quire/quire.h"
#include "tests/conformance/covering.h"
#include "tests/conformance/golden.h"
#include "tests/conformance/runner.h"

namespace quire::cli {
namespace {

constexpr std::int64_t kMostCases = 1'000'000'000'000;

struct Options {
  std::string device = "cpu";
  std::int64_t cases = 1000;
  std::uint64_t seed = 1;
  std::int64_t only_case = -1;
  bool covering = false;
  std::string isa;
  std::vector<std::string> golden;
};

// Counts verdicts and says now and then how far it is.
class Tally {
 public:
  explicit Tally(std::int64_t total) : total_(total) {}

  void add(const std::string& problem) {
    if (problem.empty()) {
      ++passed_;
    } else {
      ++failed_;
      std::printf("FAILED %s\n", problem.c_str());
      std::fflush(stdout);
    }
    const auto now = std::chrono::steady_clock::now();
    if (now - last_report_ < std::chrono::seconds(5)) return;
    last_report_ = now;
    std::fprintf(stderr, "%lld of %lld, %lld failed\n", static_cast<long long>(passed_ + failed_),
                 static_cast<long long>(total_), static_cast<long long>(failed_));
  }

  void finish() const {
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed_),
                static_cast<long long>(failed_));
    std::fflush(stdout);
    if (failed_ > 0) throw CLI::RuntimeError(1);
  }

 private:
  std::int64_t total_;
  std::int64_t passed_ = 0;
  std::int64_t failed_ = 0;
  std::chrono::steady_clock::time_point last_report_ = std::chrono::steady_clock::now();
};

// The library reads these when it is first used, which is after this.
void set_environment(const Options& options) {
  if (!options.isa.empty()) setenv("QUIRE_CPU_ISA", options.isa.c_str(), 1);
  // Cache writes name no backend: the environment does.
  setenv("QUIRE_BACKEND", options.device.c_str(), 1);
}

const AttentionBackend& backend_of(const Options& options) {
  std::string known;
  for (const AttentionBackend* backend : attention_backends()) {
    known += (known.empty() ? "" : ", ") + std::string(backend->name());
    if (options.device != backend->name()) continue;
    if (backend->available()) return *backend;
    throw std::runtime_error("--device " + options.device +
                             " cannot run here: " + backend->instruction_set());
  }
  throw std::runtime_error("--device: expected one of " + known + ", got " + options.device);
}

void verify_golden(const AttentionBackend& backend, const Options& options) {
  std::vector<conformance::GoldenCase> cases;
  for (const std::string& path : options.golden) {
    for (conformance::GoldenCase& c : conformance::read_golden(path)) cases.push_back(std::move(c));
  }
  Tally tally(static_cast<std::int64_t>(cases.size()));
  for (const conformance::GoldenCase& c : cases) {
    const std::string problem = conformance::run_golden(c, backend);
    tally.add(problem.empty() ? "" : c.name + ": " + problem);
  }
  tally.finish();
}

void verify_random(const AttentionBackend& backend, const Options& options) {
  const bool one = options.only_case >= 0;
  const std::int64_t begin = one ? options.only_case : 0;
  const std::int64_t end = one ? begin + 1 : options.cases;
  if (one) {
    const auto spec = conformance::random_spec(options.seed, begin);
    std::printf("case %lld: %s\n", static_cast<long long>(begin),
                conformance::describe(spec).c_str());
  }
  Tally tally(end - begin);
  for (std::int64_t index = begin; index < end; ++index) {
    tally.add(conformance::run_random_case(backend, options.seed, index));
  }
  tally.finish();
}

// Fails too if a kernel of the backend's table was never launched. Names differ: the table's are
// short, the device's are C++.
void verify_covering(const AttentionBackend& backend) {
  Tally tally(static_cast<std::int64_t>(conformance::covering_specs().size()));
  const std::set<std::string> reached =
      conformance::run_covering(backend, [&](const std::string& problem) { tally.add(problem); });
  const std::vector<KernelInfo> table = backend.kernel_table();
  for (const std::string& kernel : reached) std::printf("reached %s\n", kernel.c_str());
  if (!table.empty()) {
    tally.add(reached.size() == table.size()
                  ? ""
                  : "reached " + std::to_string(reached.size()) + " kernels of the " +
                        std::to_string(table.size()) + " in this build");
  }
  tally.finish();
}

void run(const Options& options) {
  set_environment(options);
  const AttentionBackend& backend = backend_of(options);
  std::printf("backend %s on %s\n", backend.name(), backend.instruction_set().c_str());
  std::fflush(stdout);
  if (options.covering) {
    verify_covering(backend);
  } else if (options.golden.empty()) {
    verify_random(backend, options);
  } else {
    verify_golden(backend, options);
  }
}

}  // namespace

void add_verify_command(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "verify",
      "Check a device against the float64 reference on random cases, or against stored "
      "outputs of vLLM's Triton kernel");
  command->add_option("--device", options->device, "Backend to check: cpu, reference, ...")
      ->capture_default_str();
  command->add_option("--cases", options->cases, "How many random cases")
      ->capture_default_str()
      ->check(CLI::Range(std::int64_t{0}, kMostCases));
  command->add_option("--seed", options->seed, "Seed of the random cases")->capture_default_str();
  command->add_option("--case", options->only_case, "Run this one case of the seed only")
      ->check(CLI::Range(std::int64_t{0}, kMostCases));
  command->add_flag("--covering", options->covering,
                    "Run a few small cases that reach every kernel instead of random ones, and "
                    "name the CUDA kernels that were reached");
  command->add_option("--isa", options->isa,
                      "Instruction set of the CPU backend: AVX3, AVX2, NEON, SCALAR, ...");
  command
      ->add_option("--golden", options->golden,
                   "Stored cases to run instead of random ones (safetensors)")
      ->check(CLI::ExistingFile);
  command->callback([options] { run(*options); });
}

}  // namespace quire::cli
