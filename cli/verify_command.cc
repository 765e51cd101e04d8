// quire verify: random cases of the conformance suite, or stored outputs of vLLM's Triton kernel,
// on a device of this machine.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common/options.h"
#include "cli/common/output.h"
#include "cli/verify_campaign.h"
#include "conformance/covering.h"
#include "conformance/golden.h"
#include "conformance/runner.h"
#include "quire/quire.h"

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
  CampaignOptions campaign;
};

// Counts verdicts and shows people who look on how far it is.
class Tally {
 public:
  explicit Tally(std::int64_t total) : total_(total) {}

  void add(const std::string& problem) {
    if (problem.empty()) {
      ++passed_;
    } else {
      ++failed_;
      progress_.clear();
      std::printf("FAILED %s\n", problem.c_str());
      flush_stdout();
    }
    if (progress_.due()) {
      progress_.show(std::to_string(passed_ + failed_) + " of " + std::to_string(total_) + ", " +
                     std::to_string(failed_) + " failed");
    }
  }

  void clear_progress() { progress_.clear(); }

  // `all_well` false: something that is no case's fault is wrong.
  void finish(bool all_well = true) {
    progress_.clear();
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed_),
                static_cast<long long>(failed_));
    flush_stdout();
    if (failed_ > 0 || !all_well) throw CLI::RuntimeError(1);
  }

 private:
  std::int64_t total_;
  std::int64_t passed_ = 0;
  std::int64_t failed_ = 0;
  ProgressLine progress_;
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
  Tally tally(conformance::num_covering_cases());
  const std::set<std::string> reached =
      conformance::run_covering(backend, [&](const std::string& problem) { tally.add(problem); });
  tally.clear_progress();
  for (const std::string& kernel : reached) std::printf("reached %s\n", kernel.c_str());
  const std::vector<KernelInfo> table = backend.kernel_table();
  const auto in_build = static_cast<std::size_t>(std::count_if(
      table.begin(), table.end(), [](const KernelInfo& kernel) { return kernel.same_as.empty(); }));
  if (in_build > 0) std::printf("%zu of %zu kernels reached\n", reached.size(), in_build);
  tally.finish(in_build == 0 || reached.size() == in_build);
}

void run(const Options& options) {
  set_environment(options);
  if (options.campaign.wanted()) prepare_campaign(options.campaign);
  const AttentionBackend& backend = backend_of(options);
  std::printf("backend %s on %s\n", backend.name(), backend.instruction_set().c_str());
  flush_stdout();
  if (options.campaign.wanted()) {
    verify_campaign(backend, options.campaign, options.seed, options.cases, options.only_case);
  } else if (options.covering) {
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
  CLI::Option* cases = command->add_option("--cases", options->cases, "How many random cases")
                           ->capture_default_str()
                           ->check(CLI::Range(std::int64_t{0}, kMostCases));
  CLI::Option* seed = add_seed_option(*command, options->seed, "Seed of the random cases");
  CLI::Option* one = command
                         ->add_option("--case", options->only_case,
                                      "Run this one case of the seed only, and describe it")
                         ->check(CLI::Range(std::int64_t{0}, kMostCases))
                         ->excludes(cases);
  CLI::Option* covering =
      command->add_flag("--covering", options->covering,
                        "Run a few small cases that reach every kernel instead of random ones, and "
                        "name the CUDA kernels that were reached");
  command
      ->add_option("--isa", options->isa,
                   "Instruction set of the CPU backend: AVX3, AVX2, NEON, SCALAR, ...")
      ->check(not_empty());
  CLI::Option* golden = command
                            ->add_option("--golden", options->golden,
                                         "Stored cases to run instead of random ones (safetensors)")
                            ->check(CLI::ExistingFile);
  for (CLI::Option* random : {cases, seed, one}) random->excludes(covering)->excludes(golden);
  golden->excludes(covering);
  add_campaign_options(command, &options->campaign);
  for (const char* campaign : {"--campaign", "--mode"}) {
    command->get_option(campaign)->excludes(covering)->excludes(golden);
  }
  command->callback([options] { run(*options); });
}

}  // namespace quire::cli
