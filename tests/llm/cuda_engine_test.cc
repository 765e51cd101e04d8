// The model and the engine on the GPU against the CPU: logits within float32's rounding, and the
// same tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/llm/devices.h"
#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

constexpr std::int64_t kBlockSize = 16;

class CudaEngine : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(DeviceType::kCuda); !reason.empty()) {
      GTEST_SKIP() << reason;
    }
  }
};

// The next tokens of several sequences, sequence i in blocks 8 i to 8 i + 7; all logits are wanted.
Batch batch_of(const std::vector<std::vector<std::int32_t>>& tokens,
               const std::vector<std::int32_t>& computed) {
  Batch batch;
  batch.query_start_loc = {0};
  batch.max_blocks = 8;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto first_block = static_cast<std::int32_t>(8 * i);
    std::int32_t position = computed[i];
    for (const std::int32_t token : tokens[i]) {
      batch.logit_rows.push_back(static_cast<std::int32_t>(batch.tokens.size()));
      batch.tokens.push_back(token);
      batch.slot_mapping.push_back(first_block * kBlockSize + position);
      batch.positions.push_back(position++);
    }
    batch.query_start_loc.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.seq_lens.push_back(position);
    for (std::int32_t block = 0; block < 8; ++block) {
      batch.block_table.push_back(first_block + block);
    }
  }
  return batch;
}

void expect_close(std::span<const float> cuda, std::span<const float> cpu) {
  ASSERT_EQ(cuda.size(), cpu.size());
  float largest = 0.0F;
  float error = 0.0F;
  for (std::size_t i = 0; i < cpu.size(); ++i) {
    ASSERT_TRUE(std::isfinite(cuda[i])) << i;
    largest = std::max(largest, std::abs(cpu[i]));
    error = std::max(error, std::abs(cuda[i] - cpu[i]));
  }
  // TF32, with its 10 bits, would be off by 1e-3.
  EXPECT_LT(error, 5e-5F * largest);
  EXPECT_GT(largest, 1.0F);
}

TEST_F(CudaEngine, LogitsAreTheCpus) {
  const auto bytes = tiny_model_writer().bytes();
  const GgufFile file = GgufFile::parse(bytes, "tiny");
  const ModelOptions options{.num_blocks = 32, .block_size = kBlockSize, .max_seqs = 64};
  const auto cpu_ops = make_ops(DeviceType::kCpu);
  const auto cuda_ops = make_ops(DeviceType::kCuda);
  Model cpu(file, *cpu_ops, options);
  Model cuda(file, *cuda_ops, options);
  const std::vector<Batch> steps = {
      batch_of({tiny_prompt(40, 1), tiny_prompt(7, 2)}, {0, 0}),
      batch_of({{3}, tiny_prompt(19, 3), tiny_prompt(33, 4)}, {40, 7, 0}),
      batch_of({{4}, {5}, {6}}, {41, 26, 33}),
  };
  for (const Batch& step : steps) expect_close(cuda.forward(step), cpu.forward(step));
  EXPECT_STREQ(cuda.backend_name(), "cuda");
}

std::vector<std::vector<std::int32_t>> answers(const ModelOptions& options, DeviceType device) {
  TinyEngine engine(options, device);
  for (unsigned i = 0; i < 6; ++i) engine->add({tiny_prompt(5 + 9 * i, i / 2), 24, {}});
  engine.run();
  std::vector<std::vector<std::int32_t>> all;
  for (std::int64_t i = 0; i < 6; ++i) all.push_back(engine.answer(i));
  return all;
}

TEST_F(CudaEngine, AnswersAreTheCpus) {
  const ModelOptions plain{.num_blocks = 64, .block_size = 16};
  const auto expected = answers(plain, DeviceType::kCpu);
  EXPECT_EQ(answers(plain, DeviceType::kCuda), expected);
  // Small chunks and odd blocks; too few blocks, so that sequences are computed again.
  EXPECT_EQ(answers({.num_blocks = 99, .block_size = 3, .max_batch_tokens = 17, .max_seqs = 4},
                    DeviceType::kCuda),
            expected);
  EXPECT_EQ(answers({.num_blocks = 22, .block_size = 4, .max_batch_tokens = 64, .max_seqs = 8},
                    DeviceType::kCuda),
            expected);
}

TEST_F(CudaEngine, RunsWithEveryCacheType) {
  for (const char* name : {"float16", "bfloat16", "float32", "fp8", "fp8_e5m2",
                           "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"}) {
    ModelOptions options{.num_blocks = 64, .block_size = 16};
    options.kv_cache_dtype = parse_kv_cache_dtype(name);
    for (const auto& answer : answers(options, DeviceType::kCuda)) {
      EXPECT_FALSE(answer.empty()) << name;
    }
  }
}

TEST_F(CudaEngine, SaysWhenMemoryIsNotEnough) {
  EXPECT_THROW(TinyEngine({.num_blocks = std::int64_t{1} << 38}, DeviceType::kCuda),
               std::runtime_error);
  // The failure left nothing behind.
  EXPECT_EQ(answers({.num_blocks = 64}, DeviceType::kCuda).size(), 6U);
}

}  // namespace
}  // namespace quire::llm
