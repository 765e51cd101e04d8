// The benchmark from end to end on small workloads, and its reports.
#include "bench/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/report.h"

namespace quire::bench {
namespace {

using testing::HasSubstr;

std::vector<Workload> small_workloads() {
  Workload decode;
  decode.name = "small_decode";
  decode.model = {.name = "m", .num_heads = 4, .num_kv_heads = 2, .head_size = 32};
  decode.batch = {{1, 100}, {1, 37}, {3, 65}};
  Workload prefill = decode;
  prefill.name = "small_prefill";
  prefill.model.sliding_window = 24;
  prefill.model.soft_cap = 30.0F;
  prefill.model.sinks = true;
  prefill.batch = {{50, 50}, {20, 90}};
  return {decode, prefill};
}

Options quick_options() {
  Options options;
  options.min_repeats = 3;
  options.min_time_ms = 0.0;
  options.num_threads = 2;
  options.rotation_bytes = 1 << 20;
  return options;
}

bool can_run(DeviceType device) {
  for (const AttentionBackend* backend : attention_backends()) {
    if (backend->device_type() == device && backend->available()) return true;
  }
  return false;
}

// That this build has a backend for.
std::set<DeviceType> devices() {
  std::set<DeviceType> types;
  for (const AttentionBackend* backend : attention_backends()) types.insert(backend->device_type());
  return types;
}

class BenchOnDevice : public testing::TestWithParam<DeviceType> {
 protected:
  void SetUp() override {
    if (!can_run(GetParam())) GTEST_SKIP() << "no " << to_string(Device{GetParam(), 0});
  }
  static Options quick_options() {
    Options options = bench::quick_options();
    options.device = GetParam();
    return options;
  }
};

TEST_P(BenchOnDevice, MeasuresEveryWorkload) {
  std::vector<std::string> told;
  const Report report = run(small_workloads(), quick_options(),
                            [&](int, int, const Workload& w) { told.push_back(w.name); });
  EXPECT_EQ(told, (std::vector<std::string>{"small_decode", "small_prefill"}));
  EXPECT_EQ(report.num_threads, 2);
  EXPECT_EQ(report.limit_samples.size(), 3U);
  ASSERT_EQ(report.results.size(), 2U);
  for (const Result& result : report.results) {
    EXPECT_GE(result.attention_us.size(), 3U);
    EXPECT_GE(result.plan_us.size(), 3U);
    EXPECT_GE(result.write_us.size(), 3U);
    EXPECT_EQ(result.write_bytes, write_bytes(result.workload));
    EXPECT_EQ(result.copy_us.empty(), GetParam() == DeviceType::kCpu);
    EXPECT_EQ(result.flops, flops(result.workload));
    EXPECT_GT(report.fraction(result), 0.0);
    EXPECT_GT(result.num_caches, 1);
  }
}

TEST_P(BenchOnDevice, TakesEveryCacheDtypeAndLayout) {
  for (const KvCacheDType dtype :
       {KvCacheDType::kFloat32, KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead,
        KvCacheDType::kInt4PerTokenHead}) {
    Options options = quick_options();
    options.kv_cache_dtype = dtype;
    options.dtype = DType::kFloat16;
    options.heads_first = true;
    options.block_size = 8;
    const Report report = run({small_workloads().front()}, options);
    EXPECT_EQ(report.results.front().bytes,
              bytes(report.results.front().workload, element_sizes(options)));
    EXPECT_GT(report.fraction(report.results.front()), 0.0);
  }
}

TEST_P(BenchOnDevice, ChainsLayersOnCuda) {
  Options options = quick_options();
  options.num_layers = 3;
  if (GetParam() == DeviceType::kCpu) {
    EXPECT_THROW(run(small_workloads(), options), std::runtime_error);
    return;
  }
  const Report report = run(small_workloads(), options);
  for (const Result& result : report.results) {
    EXPECT_EQ(result.num_caches % 3, 0);
    EXPECT_GE(result.layer_us.size(), 3U);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, BenchOnDevice, testing::ValuesIn(devices()),
                         [](const testing::TestParamInfo<DeviceType>& device) {
                           return device.param == DeviceType::kCpu ? "cpu" : "cuda";
                         });

TEST(Bench, RunsTheReferenceToo) {
  Options options = quick_options();
  options.backend = "reference";
  const Report report = run({small_workloads().front()}, options);
  EXPECT_EQ(report.backend, "reference");
}

TEST(Bench, RefusesWhatItCannotDo) {
  EXPECT_THROW(run({}, quick_options()), std::runtime_error);
  Options options = quick_options();
  options.device = DeviceType::kCuda;
  if (!can_run(options.device)) {
    EXPECT_THROW(run(small_workloads(), options), std::exception);
  }
  options = quick_options();
  options.backend = "abacus";
  EXPECT_THROW(run(small_workloads(), options), Error);
}

TEST(Bench, SaysWhatDoesNotFitIntoMemory) {
  Workload huge = small_workloads().front();
  huge.name = "huge";
  huge.model.num_kv_heads = huge.model.num_heads = 64;
  huge.model.head_size = 128;
  huge.batch.assign(1000, {1, 1 << 20});
  try {
    run({huge}, quick_options());
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("huge needs"));
    EXPECT_THAT(error.what(), HasSubstr("--scale"));
  }
}

// A report with round figures: 10 GB/s and 100 GFLOP/s.
Report made_up_report() {
  Report report;
  report.backend = "cpu";
  report.instruction_set = "TEST";
  report.limits = {10e9, 100e9};
  report.limit_samples = {report.limits};
  Result memory;
  memory.workload = small_workloads()[0];
  memory.bytes = 1'000'000;  // 100 us
  memory.flops = 1'000'000;
  memory.attention_us = {150.0, 200.0, 1000.0};
  memory.plan_us = {1.5};
  memory.write_us = {2.5};
  memory.write_bytes = 5'000'000;
  memory.copy_us = {2.0, 1.0, 2.4};
  Result compute = memory;
  compute.workload = small_workloads()[1];
  compute.flops = 100'000'000;  // 1000 us
  compute.attention_us = {1250.0};
  report.results = {memory, compute};
  return report;
}

TEST(BenchReport, TableHoldsTheFigures) {
  const std::string table = to_table(made_up_report());
  EXPECT_THAT(table, HasSubstr("10.0 GB/s"));
  EXPECT_THAT(table, HasSubstr("100.0 GFLOP/s"));
  EXPECT_THAT(table, testing::ContainsRegex("small_decode .* 200.0 .* memory +0.500 +1.5 +2.5"));
  EXPECT_THAT(table, testing::ContainsRegex("small_prefill .* 1250.0 .* compute +0.800"));
  EXPECT_THAT(table, testing::ContainsRegex("all +0.632"));
  EXPECT_THAT(table, testing::ContainsRegex("small_decode +5 +5.00 +2.50 +2.000 +2.00 +0.800"));
}

TEST(BenchReport, SaysWhenTheMachineWasNotQuiet) {
  Report report = made_up_report();
  EXPECT_THAT(to_table(report), testing::Not(HasSubstr("not quiet")));
  EXPECT_EQ(to_json(report).at("limits").at("steady"), true);
  report.limit_samples = {{10e9, 100e9}, {10e9, 100e9}, {5e9, 100e9}, {10e9, 150e9}};
  EXPECT_THAT(to_table(report), HasSubstr("not quiet"));
  EXPECT_EQ(to_json(report).at("limits").at("steady"), false);
}

TEST(BenchReport, LayersInAChainAreComparedWithTheirParts) {
  Report report = made_up_report();
  EXPECT_THAT(to_table(report), testing::Not(HasSubstr("in a chain")));
  EXPECT_FALSE(to_json(report).at("workloads").at(0).contains("layer_us"));
  report.options.num_layers = 10;
  report.results[0].layer_us = {300.0, 204.0, 203.0};
  report.results[1].layer_us = {1252.0};
  const std::string table = to_table(report);
  EXPECT_THAT(table, HasSubstr("10 layers in a chain"));
  EXPECT_THAT(table, testing::ContainsRegex("small_decode +204.00 +2.50 +200.00 +1.50"));
  EXPECT_THAT(table, testing::ContainsRegex("small_prefill +1252.00 +2.50 +1250.00 +-0.50"));
  const auto json = to_json(report);
  EXPECT_EQ(json.at("options").at("num_layers"), 10);
  EXPECT_DOUBLE_EQ(json.at("workloads").at(0).at("layer_us").get<double>(), 204.0);
  EXPECT_DOUBLE_EQ(json.at("workloads").at(0).at("layer_overhead_us").get<double>(), 1.5);
  EXPECT_EQ(json.at("workloads").at(0).at("layer_samples_us").size(), 3U);
}

TEST(BenchReport, JsonHoldsEverything) {
  const auto json = to_json(made_up_report());
  EXPECT_NEAR(json.at("geometric_mean").get<double>(), 0.6325, 1e-4);
  EXPECT_DOUBLE_EQ(json.at("limits").at("gb_per_s").get<double>(), 10.0);
  const auto& first = json.at("workloads").at(0);
  EXPECT_EQ(first.at("name"), "small_decode");
  EXPECT_EQ(first.at("samples_us").size(), 3U);
  EXPECT_DOUBLE_EQ(first.at("time_us").get<double>(), 200.0);
  EXPECT_DOUBLE_EQ(first.at("fraction").get<double>(), 0.5);
  EXPECT_EQ(first.at("bound"), "memory");
  EXPECT_DOUBLE_EQ(first.at("write_gb_per_s").get<double>(), 2000.0);
  EXPECT_DOUBLE_EQ(first.at("copy_us").get<double>(), 2.0);
  EXPECT_DOUBLE_EQ(first.at("write_fraction").get<double>(), 0.8);
  EXPECT_EQ(first.at("batch").at(2), (nlohmann::json{3, 65}));
}

}  // namespace
}  // namespace quire::bench
