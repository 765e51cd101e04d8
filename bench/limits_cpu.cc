// The limits of the CPU. Compiled once for each instruction set (Highway), the best one is chosen
// at run time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/limits_cpu.cc"  // this file, again for each target
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bench/limits.h"
#include "bench/machine.h"
#include "bench/statistics.h"
#include "quire/backend.h"

// Accumulators that are in flight at a time. A multiply-add takes 4 cycles on 2 pipes, up to 4 on
// Arm: 8 to 16 hide that. 12 and two constants fit into the 16 registers of AVX2; with 32
// registers there are 24.
#undef QUIRE_BENCH_EACH_12
#define QUIRE_BENCH_EACH_12(DO) \
  DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#undef QUIRE_BENCH_EACH
#undef QUIRE_BENCH_NUM_CHAINS
#if HWY_TARGET <= HWY_AVX3 || (HWY_TARGET >= HWY_SVE2_128 && HWY_TARGET <= HWY_NEON)
#define QUIRE_BENCH_NUM_CHAINS 24
#define QUIRE_BENCH_EACH(DO) \
  QUIRE_BENCH_EACH_12(DO)    \
  DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) DO(18) DO(19) DO(20) DO(21) DO(22) DO(23)
#else
#define QUIRE_BENCH_NUM_CHAINS 12
#define QUIRE_BENCH_EACH(DO) QUIRE_BENCH_EACH_12(DO)
#endif
#define QUIRE_BENCH_START(i) auto sum##i = hn::Set(d, start + 0.01F * (i));
#define QUIRE_BENCH_STEP(i) sum##i = hn::MulAdd(sum##i, factor, addend);
#define QUIRE_BENCH_COLLECT(i) total = hn::Add(total, sum##i);

HWY_BEFORE_NAMESPACE();
namespace quire::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Runs `num_steps` multiply-adds on each of the chains; returns their flops. The values approach
// addend / (1 - factor): no infinities, no denormals. `sink` keeps the work from being dropped.
double run_fma(std::int64_t num_steps, float start, float* sink) {
  const hn::ScalableTag<float> d;
  const auto factor = hn::Set(d, 0.5F * start);
  const auto addend = hn::Set(d, start);
  QUIRE_BENCH_EACH(QUIRE_BENCH_START)
  for (std::int64_t i = 0; i < num_steps; ++i) {
    QUIRE_BENCH_EACH(QUIRE_BENCH_STEP)
  }
  auto total = hn::Zero(d);
  QUIRE_BENCH_EACH(QUIRE_BENCH_COLLECT)
  *sink = hn::GetLane(hn::SumOfLanes(d, total));
  return 2.0 * QUIRE_BENCH_NUM_CHAINS * static_cast<double>(num_steps) *
         static_cast<double>(hn::Lanes(d));
}

// Reads `num_words` (a multiple of 8 vectors) 64-bit words once, in order.
std::uint64_t read_words(const std::uint64_t* words, std::size_t num_words) {
  const hn::ScalableTag<std::uint64_t> d;
  const std::size_t lanes = hn::Lanes(d);
  auto a = hn::Zero(d);
  auto b = hn::Zero(d);
  auto c = hn::Zero(d);
  auto e = hn::Zero(d);
  for (std::size_t i = 0; i < num_words; i += 4 * lanes) {
    a = hn::Xor(a, hn::Load(d, words + i));
    b = hn::Xor(b, hn::Load(d, words + i + lanes));
    c = hn::Xor(c, hn::Load(d, words + i + 2 * lanes));
    e = hn::Xor(e, hn::Load(d, words + i + 3 * lanes));
  }
  return hn::GetLane(hn::Xor(hn::Xor(a, b), hn::Xor(c, e)));
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace quire::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quire::bench {
namespace {

HWY_EXPORT(run_fma);
HWY_EXPORT(read_words);
HWY_EXPORT(target_name);

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double run_best_fma(std::int64_t num_steps, float start, float* sink) {
  return HWY_DYNAMIC_DISPATCH(run_fma)(num_steps, start, sink);
}

class CpuLimitMeter final : public LimitMeter {
 public:
  CpuLimitMeter(ThreadPool& threads, std::size_t max_buffer_bytes)
      : threads_(threads), buffer_(buffer_bytes(max_buffer_bytes)) {
    run(
        [this](std::int64_t chunk) {  // first touch in large pieces; random bits are not needed
          std::uint64_t* words = buffer_.as<std::uint64_t>() + chunk * kChunkWords;
          for (std::int64_t i = 0; i < kChunkWords; ++i) {
            words[i] = static_cast<std::uint64_t>(i + chunk) * 0x9E3779B97F4A7C15U;
          }
        },
        num_chunks());
    const std::string isa = attention_backend("cpu").instruction_set();
    if (isa == "AMX") {
      multiply_ = run_tile_products;
      multiply_name_ = "bf16 AMX tile products";
    } else if (isa == "AVX3_BF16") {
      multiply_ = run_pair_products;
      multiply_name_ = "bf16 AVX-512 products";
    }
    multiply_steps_ = choose_multiply_steps();
  }

  LimitSample measure() override {
    std::vector<double> bytes;
    std::vector<double> flops;
    const Clock::time_point begin = Clock::now();
    do {
      bytes.push_back(measure_read());
      flops.push_back(measure_multiply());
    } while (bytes.size() < kMaxPasses && seconds_since(begin) < kMaxSeconds);
    return {median(bytes), median(flops)};
  }

  std::string read_method() const override {
    return std::to_string(buffer_.size() >> 20) + " MiB with " +
           HWY_DYNAMIC_DISPATCH(target_name)() + " loads, " +
           std::to_string(threads_.num_threads()) + " threads";
  }

  std::string flops_method() const override {
    return multiply_name_ + ", " + std::to_string(threads_.num_threads()) + " threads";
  }

 private:
  static constexpr std::size_t kMaxPasses = 3;
  static constexpr double kMaxSeconds = 0.3;             // reached by slow machines and sanitizers
  static constexpr double kMultiplyTaskSeconds = 0.005;  // long beside waking a thread
  static constexpr std::int64_t kChunkWords = std::int64_t{1} << 18;  // 2 MiB, taken by any thread
  static constexpr std::int64_t kChunkBytes = kChunkWords * 8;

  // Eight times the last-level cache, so that what is left in it from the pass before is little.
  static std::size_t buffer_bytes(std::size_t max_buffer_bytes) {
    const auto wanted = static_cast<std::size_t>(
        std::max<std::int64_t>(8 * inspect_machine().last_level_cache_bytes, 256 << 20));
    const std::size_t num_bytes = std::min(wanted, max_buffer_bytes);
    return std::max<std::size_t>(num_bytes / kChunkBytes, 1) * kChunkBytes;
  }

  // Enough for a task of kMultiplyTaskSeconds. The fastest of a few trials: the first one may have to
  // wake the vector unit, any may be interrupted.
  std::int64_t choose_multiply_steps() const {
    constexpr std::int64_t kTrialSteps = 10'000;
    double seconds = 1.0;
    for (int trial = 0; trial < 5; ++trial) {
      float sink = 0.0F;
      const Clock::time_point begin = Clock::now();
      multiply_(kTrialSteps, 1.0F, &sink);
      seconds = std::min(seconds, std::max(seconds_since(begin), 1e-7));
    }
    return static_cast<std::int64_t>(kTrialSteps * std::max(kMultiplyTaskSeconds / seconds, 1.0));
  }

  std::int64_t num_chunks() const {
    return static_cast<std::int64_t>(buffer_.size()) / kChunkBytes;
  }

  template <class Body>
  void run(const Body& body, std::int64_t num_tasks) {
    threads_.run(
        num_tasks,
        [](void* context, std::int64_t index, int) { (*static_cast<const Body*>(context))(index); },
        const_cast<Body*>(&body));
  }

  double measure_read() {
    std::atomic<std::uint64_t> sink{0};
    const Clock::time_point begin = Clock::now();
    run(
        [&](std::int64_t chunk) {
          const std::uint64_t* words = buffer_.as<std::uint64_t>() + chunk * kChunkWords;
          sink ^= HWY_DYNAMIC_DISPATCH(read_words)(words, kChunkWords);
        },
        num_chunks());
    const double seconds = seconds_since(begin);
    sink_ = static_cast<float>(sink.load());
    return static_cast<double>(buffer_.size()) / seconds;
  }

  double measure_multiply() {
    // Several tasks a thread, so that one held up by another process does not hold up all.
    const std::int64_t num_tasks = 4 * threads_.num_threads();
    std::vector<double> flops(static_cast<std::size_t>(num_tasks));
    std::vector<float> sinks(flops.size());
    const Clock::time_point begin = Clock::now();
    run(
        [&](std::int64_t task) {
          const auto i = static_cast<std::size_t>(task);
          flops[i] = multiply_(multiply_steps_, 1.0F, &sinks[i]);
        },
        num_tasks);
    const double seconds = seconds_since(begin);
    double total = 0.0;
    for (std::size_t i = 0; i < flops.size(); ++i) {
      total += flops[i];
      sink_ = sinks[i];
    }
    return total / seconds;
  }

  ThreadPool& threads_;
  Buffer buffer_;
  // The products that the kernels' instruction set has: fp32 multiply-adds, or bf16 tiles.
  double (*multiply_)(std::int64_t, float, float*) = run_best_fma;
  std::string multiply_name_ =
      std::string("fp32 ") + HWY_DYNAMIC_DISPATCH(target_name)() + " multiply-adds";
  std::int64_t multiply_steps_ = 0;
  volatile float sink_ = 0.0F;
};

}  // namespace

std::unique_ptr<LimitMeter> make_cpu_limit_meter(ThreadPool& threads,
                                                 std::size_t max_buffer_bytes) {
  return std::make_unique<CpuLimitMeter>(threads, max_buffer_bytes);
}

}  // namespace quire::bench
#endif  // HWY_ONCE
