// Random cases and golden cases. The CPU backend's run once for each instruction set that this
// machine has: ctest sets QUIRE_CPU_ISA.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "conformance/golden.h"
#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

std::int64_t number_from_environment(const char* name, std::int64_t fallback) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoll(text, nullptr, 10) : fallback;
}

bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "AVX3") return __builtin_cpu_supports("avx512bw") != 0;
  if (isa == "AVX3_BF16") return __builtin_cpu_supports("avx512bf16") != 0;
  if (isa == "AVX2") return __builtin_cpu_supports("avx2") != 0;
  if (isa == "AMX") {
    std::ifstream cpuinfo("/proc/cpuinfo");
    const std::string text(std::istreambuf_iterator<char>(cpuinfo), {});
    return text.find(" amx_bf16") != std::string::npos;
  }
  if (isa == "AMX_PORTABLE") return true;
  return isa == "SCALAR";
#else
  return isa == "NEON";  // the baseline there: no scalar build
#endif
}

// Whether the forced instruction set can run here. If the library refuses it, this machine must
// really lack it.
bool forced_isa_runs() {
  const char* forced = std::getenv("QUIRE_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return true;
  try {
    EXPECT_EQ(attention_backend("cpu").instruction_set(), forced);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.argument(), "QUIRE_CPU_ISA");
    EXPECT_FALSE(cpu_has(forced)) << error.what();
    std::cout << "this machine has no " << forced << ": nothing to test\n";
    return false;
  }
}

void run_cases(const AttentionBackend& backend, std::int64_t count) {
  const auto seed = static_cast<std::uint64_t>(number_from_environment("QUIRE_TEST_SEED", 1));
  std::cout << count << " cases of seed " << seed << " on " << backend.name() << " ("
            << backend.instruction_set() << ")\n";
  std::int64_t failures = 0;
  for (std::int64_t index = 0; index < count && failures < 10; ++index) {
    const std::string problem = run_random_case(backend, seed, index);
    failures += problem.empty() ? 0 : 1;
    EXPECT_EQ(problem, "");
  }
}

TEST(RandomCases, Cpu) {
  if (!forced_isa_runs()) return;
  run_cases(attention_backend("cpu"), number_from_environment("QUIRE_TEST_CASES", 1500));
}

TEST(RandomCases, Cuda) {
  const std::vector<const AttentionBackend*> best = best_backends();
  const auto cuda = std::find_if(best.begin(), best.end(), [](const AttentionBackend* backend) {
    return backend->device_type() == DeviceType::kCuda;
  });
  if (cuda == best.end()) GTEST_SKIP() << "no CUDA device";
  run_cases(**cuda, number_from_environment("QUIRE_TEST_CASES", 1500));
}

// The reference against the transcription of semantics.md.
TEST(RandomCases, Reference) {
  run_cases(attention_backend("reference"), number_from_environment("QUIRE_TEST_CASES", 1500) / 3);
}

void run_golden_file(const std::string& path) {
  for (const GoldenCase& golden : read_golden(path)) {
    for (const AttentionBackend* backend : available_backends()) {
      EXPECT_EQ(run_golden(golden, *backend), "") << golden.name << " on " << backend->name();
    }
  }
}

TEST(GoldenCases, Shipped) {
  if (!forced_isa_runs()) return;
  for (const char* name :
       {"triton.safetensors", "triton033.safetensors", "triton033_int4.safetensors"}) {
    run_golden_file(std::string(QUIRE_SOURCE_DIR) + "/tests/golden/" + name);
  }
}

// The whole set, where somebody has it: QUIRE_GOLDEN_DIR=<folder>.
TEST(GoldenCases, OfTheEnvironment) {
  const char* folder = std::getenv("QUIRE_GOLDEN_DIR");
  if (folder == nullptr || *folder == '\0' || !forced_isa_runs()) return;
  std::int64_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".safetensors") continue;
    run_golden_file(entry.path().string());
    ++files;
  }
  EXPECT_GT(files, 0) << folder << " holds no .safetensors file";
}

}  // namespace
}  // namespace quire::conformance
