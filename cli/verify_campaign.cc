#include "cli/verify_campaign.h"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "cli/common/output.h"
#include "conformance/campaign.h"
#include "conformance/device_memory.h"

namespace quire::cli {
namespace {

using conformance::CampaignCase;
using conformance::Mode;
using conformance::Size;
using Clock = std::chrono::steady_clock;

constexpr unsigned kCaseSeconds = 240;  // a case that takes longer hangs
constexpr int kMostFailures = 20;       // of one process: after a fault of the GPU all fail

// What the handler of a fatal signal prints: the case that was running.
char running_case[256];

void die_with_the_case(int signal_number) {
  const char* what = signal_number == SIGALRM ? "FAILED no end within 240 seconds"
                                              : "FAILED crashed, or was ended by a signal";
  for (const char* text : {what, "\n  ", static_cast<const char*>(running_case), "\n"}) {
    if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) break;
  }
  _exit(3);
}

void remember_case(const AttentionBackend& backend, const CampaignCase& which) {
  std::snprintf(running_case, sizeof running_case,
                "quire verify --device %s --mode %s --size %s --seed %llu --case %lld",
                backend.name(), to_string(which.mode), to_string(which.size),
                static_cast<unsigned long long>(which.seed), static_cast<long long>(which.index));
  alarm(kCaseSeconds);
}

CampaignCase case_of(const CampaignOptions& options, std::uint64_t seed, std::int64_t index) {
  if (options.mode.empty()) {
    return conformance::draw_campaign_case(seed, index, options.large_share);
  }
  CampaignCase which;
  for (const Mode mode : conformance::kModes) {
    if (options.mode == to_string(mode)) which.mode = mode;
  }
  which.size = options.size == to_string(Size::kSmall) ? Size::kSmall : Size::kLarge;
  which.seed = seed;
  which.index = index;
  return which;
}

struct Count {
  std::int64_t cases = 0;
  std::int64_t failures = 0;
  double seconds = 0;
};

}  // namespace

void add_campaign_options(CLI::App* command, CampaignOptions* options) {
  std::vector<std::string> modes;
  for (const Mode mode : conformance::kModes) modes.emplace_back(to_string(mode));
  command->add_flag("--campaign", options->campaign,
                    "Random cases of every size in every mode, see docs/reliability.md");
  command->add_option("--mode", options->mode, "Campaign cases of this mode only")
      ->check(CLI::IsMember(modes));
  command->add_option("--size", options->size, "Their size: small, large")
      ->capture_default_str()
      ->check(CLI::IsMember({"small", "large"}));
  command
      ->add_option("--large-share", options->large_share,
                   "How many of a hundred campaign cases are large")
      ->capture_default_str()
      ->check(CLI::Range(0, 100));
  command->add_option("--first", options->first, "Campaign: index of the first case")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--seconds", options->seconds, "Campaign: end after this time; 0: when done")
      ->check(CLI::NonNegativeNumber);
}

void prepare_campaign(const CampaignOptions& options) {
  conformance::use_guard_pages();
  // Not for one mode alone, which is how compute-sanitizer is run: it knows allocations.
  if (options.mode.empty()) conformance::use_arena();
}

void verify_campaign(const AttentionBackend& backend, const CampaignOptions& options,
                     std::uint64_t seed, std::int64_t cases, std::int64_t only_case) {
  for (const int ending : {SIGALRM, SIGTERM}) std::signal(ending, die_with_the_case);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they report more
  for (const int fatal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    std::signal(fatal, die_with_the_case);
  }
#endif
  const std::int64_t begin = only_case >= 0 ? only_case : options.first;
  const std::int64_t end = only_case >= 0 ? begin + 1 : begin + cases;
  if (only_case >= 0) {
    const CampaignCase which = case_of(options, seed, only_case);
    std::printf("%s %s: %s\n", to_string(which.mode), to_string(which.size),
                describe(campaign_spec(which, backend)).c_str());
  }
  std::map<std::pair<Size, Mode>, Count> counts;
  std::int64_t failures = 0;
  std::int64_t index = begin;
  const auto start = Clock::now();
  const auto seconds_since = [](Clock::time_point then) {
    return std::chrono::duration<double>(Clock::now() - then).count();
  };
  for (; index < end && failures < kMostFailures; ++index) {
    if (options.seconds > 0 && seconds_since(start) > options.seconds) break;
    const CampaignCase which = case_of(options, seed, index);
    remember_case(backend, which);
    const auto case_start = Clock::now();
    const std::string problem = conformance::run_campaign_case(which, backend);
    Count& count = counts[{which.size, which.mode}];
    ++count.cases;
    count.seconds += seconds_since(case_start);
    if (problem.empty()) continue;
    ++count.failures;
    ++failures;
    std::printf("FAILED %s\n", problem.c_str());
    flush_stdout();
  }
  alarm(0);
  for (const auto& [kind, count] : counts) {
    std::printf("ran %s %s %lld cases %lld failed %.1f s\n", to_string(kind.first),
                to_string(kind.second), static_cast<long long>(count.cases),
                static_cast<long long>(count.failures), count.seconds);
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(index - begin - failures),
              static_cast<long long>(failures));
  flush_stdout();
  if (failures > 0) throw CLI::RuntimeError(1);
}

}  // namespace quire::cli
