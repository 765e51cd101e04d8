// What a benchmark runs on: random numbers, page tables, medians, limits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#include "bench/limits.h"
#include "bench/machine.h"
#include "bench/paged_batch.h"
#include "bench/random_data.h"
#include "bench/statistics.h"
#include "bench/workload.h"

namespace quire::bench {
namespace {

TEST(RandomData, Float16RoundsToNearestEven) {
  EXPECT_EQ(to_float16(0.0F), 0x0000);
  EXPECT_EQ(to_float16(-1.0F), 0xBC00);
  EXPECT_EQ(to_float16(1.0F + 0x1p-11F), 0x3C00);        // halfway, to even
  EXPECT_EQ(to_float16(1.0F + 3 * 0x1p-11F), 0x3C02);    // halfway, to even
  EXPECT_EQ(to_float16(2.0F - 0x1p-12F), 0x4000);        // carries into the exponent
  EXPECT_EQ(to_float16(0x1p-24F), 0x0001);               // smallest denormal
  EXPECT_EQ(to_float16(0x1p-14F - 0x1p-26F), 0x0400);    // denormal rounds up to normal
  for (std::uint32_t bits = 0; bits < 0x7C00; ++bits) {  // every finite value survives
    EXPECT_EQ(to_float16(from_float16(static_cast<std::uint16_t>(bits))), bits);
  }
}

TEST(RandomData, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1.0F), 0x3F80);
  EXPECT_EQ(to_bfloat16(1.0F + 0x1p-8F), 0x3F80);
  EXPECT_EQ(to_bfloat16(1.0F + 3 * 0x1p-8F), 0x3F82);
  EXPECT_EQ(from_bfloat16(0xC040), -3.0F);
}

TEST(RandomData, IsNormalRepeatableAndFillsNoMore) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    std::vector<float> memory(100'001, 42.0F);
    NormalSource(dtype, 7).fill(memory.data(), 99'999);
    EXPECT_EQ(memory.back(), 42.0F);
    double sum = 0.0;
    double sum_of_squares = 0.0;
    for (int i = 0; i < 99'999; ++i) {
      std::uint16_t half = 0;
      std::memcpy(&half, reinterpret_cast<const char*>(memory.data()) + 2 * i, sizeof half);
      const double value = dtype == DType::kFloat32   ? memory[static_cast<std::size_t>(i)]
                           : dtype == DType::kFloat16 ? from_float16(half)
                                                      : from_bfloat16(half);
      sum += value;
      sum_of_squares += value * value;
    }
    EXPECT_NEAR(sum / 99'999, 0.0, 0.02) << to_string(dtype);
    EXPECT_NEAR(sum_of_squares / 99'999, 1.0, 0.03) << to_string(dtype);
    std::vector<float> again(100'001, 42.0F);
    NormalSource(dtype, 7).fill(again.data(), 99'999);
    EXPECT_EQ(std::memcmp(memory.data(), again.data(), 4 * memory.size()), 0);
  }
  EXPECT_THROW(NormalSource(DType::kInt8, 1), std::runtime_error);
}

Workload make_workload(std::int64_t window) {
  Workload workload;
  workload.name = "w";
  workload.model = {
      .name = "m", .num_heads = 4, .num_kv_heads = 2, .head_size = 16, .sliding_window = window};
  workload.batch = {{1, 33}, {5, 64}, {1, 200}, {70, 70}};
  return workload;
}

TEST(PagedBatch, GivesEachSequenceBlocksOfItsOwn) {
  PagedBatch batch = make_paged_batch(make_workload(0), 16, 3);
  EXPECT_EQ(batch.num_blocks, 3 + 4 + 13 + 5);
  EXPECT_EQ(batch.max_blocks, 13);
  EXPECT_EQ(batch.num_tokens, 77);
  EXPECT_EQ(batch.query_start_loc, (std::vector<std::int32_t>{0, 1, 6, 7, 77}));
  std::set<std::int32_t> used;
  const std::vector<int> counts = {3, 4, 13, 5};
  for (std::size_t s = 0; s < counts.size(); ++s) {
    for (int b = 0; b < counts[s]; ++b) used.insert(batch.block_table[s * 13 + b]);
  }
  EXPECT_EQ(used.size(), 25U);
  EXPECT_EQ(*used.rbegin(), 24);
  EXPECT_FALSE(std::is_sorted(batch.block_table.begin() + 26, batch.block_table.begin() + 39));
  // The first sequence's only new token is its 33rd: slot 0 of its third block.
  EXPECT_EQ(batch.slot_mapping[0], batch.block_table[2] * 16);
  EXPECT_EQ(batch.metadata().block_table.shape[1], 13);
  EXPECT_EQ(batch.metadata().num_seqs(), 4);
}

TEST(PagedBatch, SharesTheBlocksOfThePrefix) {
  Workload workload = make_workload(0);
  workload.batch.pop_back();
  workload.shared_prefix = 32;
  const PagedBatch batch = make_paged_batch(workload, 16, 3);
  EXPECT_EQ(batch.num_blocks, 2 + 1 + 2 + 11);
  EXPECT_EQ(count_blocks(workload, 16), batch.num_blocks);
  std::set<std::int32_t> used;
  const std::vector<int> counts = {3, 4, 13};
  for (std::size_t s = 0; s < counts.size(); ++s) {
    for (int b = 0; b < counts[s]; ++b) used.insert(batch.block_table[s * 13 + b]);
    EXPECT_EQ(batch.block_table[s * 13], batch.block_table[0]);
    EXPECT_EQ(batch.block_table[s * 13 + 1], batch.block_table[1]);
  }
  EXPECT_EQ(used.size(), 16U);
}

TEST(PagedBatch, AllocatesNothingInFrontOfTheWindow) {
  const Workload workload = make_workload(20);
  const PagedBatch batch = make_paged_batch(workload, 16, 3);
  // 33 tokens need keys 13 to 32: all three blocks; 200 need 180 to 199: blocks 11 and 12.
  EXPECT_EQ(batch.num_blocks, 3 + 2 + 2 + 5);
  EXPECT_EQ(count_blocks(workload, 16), batch.num_blocks);
  for (const std::int32_t block : batch.block_table) {
    EXPECT_GE(block, 0);
    EXPECT_LT(block, batch.num_blocks);
  }
}

TEST(Statistics, MedianAndGeometricMean) {
  EXPECT_EQ(median({}), 0.0);
  EXPECT_EQ(median({3.0, 1.0, 2.0}), 2.0);
  EXPECT_EQ(median({4.0, 1.0, 2.0, 3.0}), 2.5);
  EXPECT_NEAR(geometric_mean({0.5, 2.0, 8.0}), 2.0, 1e-12);
}

TEST(Limits, TheSlowerOneCounts) {
  const LimitSample limits =
      median_of({{10e9, 90e9}, {1e9, 1e9}, {20e9, 100e9}, {10e9, 100e9}, {10e9, 200e9}});
  EXPECT_EQ(limits.bytes_per_second, 10e9);
  EXPECT_EQ(limits.flops_per_second, 100e9);
  EXPECT_DOUBLE_EQ(limit_us(limits, 1e6, 1e6), 100.0);
  EXPECT_TRUE(is_memory_bound(limits, 1e6, 1e6));
  EXPECT_DOUBLE_EQ(limit_us(limits, 1e8, 1e6), 1000.0);
  EXPECT_FALSE(is_memory_bound(limits, 1e8, 1e6));
}

TEST(Limits, TheCpuHasSome) {
  const std::unique_ptr<ThreadPool> threads = make_thread_pool(2);
  const std::unique_ptr<LimitMeter> meter = make_cpu_limit_meter(*threads, 4 << 20);
  const LimitSample sample = meter->measure();
  EXPECT_GT(sample.bytes_per_second, 1e7);
  EXPECT_GT(sample.flops_per_second, 1e7);
  EXPECT_NE(meter->read_method().find("4 MiB"), std::string::npos);
  EXPECT_NE(meter->flops_method().find("2 threads"), std::string::npos);
}

TEST(Machine, KnowsItself) {
  const Machine machine = inspect_machine();
  EXPECT_GE(machine.num_cpus, 1);
  EXPECT_FALSE(machine.cpu_name.empty());
  EXPECT_GT(machine.last_level_cache_bytes, 0);
  Buffer buffer(5 << 20);
  buffer.as<char>()[(5 << 20) - 1] = 1;
  const Buffer moved = std::move(buffer);
  EXPECT_EQ(moved.as<char>()[(5 << 20) - 1], 1);
  EXPECT_EQ(buffer.data(), nullptr);  // NOLINT(bugprone-use-after-move)
}

}  // namespace
}  // namespace quire::bench
