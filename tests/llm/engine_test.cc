// The whole engine over a small random model: answers depend on the request alone.
#include "examples/llm/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr std::int64_t kAnswer = 24;

std::vector<std::vector<std::int32_t>> prompts() {
  std::vector<std::vector<std::int32_t>> list;
  const std::vector<std::int32_t> shared = tiny_prompt(37, 100);
  for (unsigned i = 0; i < 6; ++i) {
    std::vector<std::int32_t> prompt = i % 2 == 0 ? shared : std::vector<std::int32_t>{};
    const std::vector<std::int32_t> own = tiny_prompt(3 + 5 * i, i);
    prompt.insert(prompt.end(), own.begin(), own.end());
    list.push_back(std::move(prompt));
  }
  return list;
}

struct Outcome {
  std::vector<std::vector<std::int32_t>> answers;
  EngineStats stats;
  BlockStats blocks;
};

Outcome generate(const ModelOptions& options, const SamplingParams& sampling = {}) {
  TinyEngine engine(options);
  for (const auto& prompt : prompts()) {
    Request request{prompt, kAnswer, sampling};
    request.sampling.seed += prompt.size();
    engine->add(request);
  }
  engine.run();
  Outcome outcome;
  for (std::size_t i = 0; i < prompts().size(); ++i) {
    outcome.answers.push_back(engine.answer(static_cast<std::int64_t>(i)));
  }
  outcome.stats = engine->stats();
  outcome.blocks = engine->block_stats();
  return outcome;
}

// Each prompt by itself in a fresh engine, in one chunk: nothing shared, nothing batched.
std::vector<std::vector<std::int32_t>> generate_alone(const SamplingParams& sampling = {}) {
  std::vector<std::vector<std::int32_t>> answers;
  for (const auto& prompt : prompts()) {
    TinyEngine engine({.num_blocks = 64, .block_size = 16});
    Request request{prompt, kAnswer, sampling};
    request.sampling.seed += prompt.size();
    engine->add(request);
    engine.run();
    answers.push_back(engine.answer(0));
  }
  return answers;
}

TEST(Engine, AnswersDoNotDependOnTheBatch) {
  const auto alone = generate_alone();
  EXPECT_TRUE(std::any_of(alone.begin(), alone.end(),
                          [](const auto& answer) { return answer.size() == kAnswer; }));
  const Outcome together = generate({.num_blocks = 64, .block_size = 16});
  EXPECT_EQ(together.answers, alone);
  EXPECT_EQ(together.blocks.peak_shared, 2);
  EXPECT_EQ(together.blocks.reused, 4);
  EXPECT_EQ(together.stats.num_preemptions, 0);
}

TEST(Engine, AnswersDoNotDependOnChunksAndBlockSizes) {
  const auto alone = generate_alone();
  for (const std::int64_t block_size : {1, 3, 8, 32}) {
    for (const std::int64_t max_batch_tokens : {4, 17, 512}) {
      const Outcome outcome = generate({.num_blocks = 512,
                                        .block_size = block_size,
                                        .max_batch_tokens = max_batch_tokens,
                                        .max_seqs = 4});
      EXPECT_EQ(outcome.answers, alone) << block_size << " " << max_batch_tokens;
    }
  }
}

TEST(Engine, AnswersSurvivePreemption) {
  const Outcome outcome =
      generate({.num_blocks = 22, .block_size = 4, .max_batch_tokens = 64, .max_seqs = 8});
  EXPECT_EQ(outcome.answers, generate_alone());
  EXPECT_GT(outcome.stats.num_preemptions, 0);
  EXPECT_LE(outcome.blocks.peak_used, 22);
  EXPECT_EQ(outcome.blocks.used, 0);
}

TEST(Engine, SeedsBelongToRequests) {
  const SamplingParams sampling{.temperature = 1.0F, .top_p = 0.95F, .seed = 11};
  const auto alone = generate_alone(sampling);
  EXPECT_NE(alone, generate_alone());
  EXPECT_EQ(generate({.num_blocks = 64, .block_size = 16}, sampling).answers, alone);
  EXPECT_EQ(
      generate({.num_blocks = 60, .block_size = 2, .max_batch_tokens = 9, .max_seqs = 3}, sampling)
          .answers,
      alone);
}

TEST(Engine, AgreesWithTheReferenceBackend) {
  EXPECT_EQ(generate({.num_blocks = 64, .block_size = 16, .backend = "reference"}).answers,
            generate_alone());
}

// Smaller types change answers; the model's own type does not.
TEST(Engine, RunsWithEveryCacheType) {
  for (const char* name : {"auto", "float16", "bfloat16", "float32", "fp8", "fp8_e5m2",
                           "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"}) {
    ModelOptions options{.num_blocks = 64, .block_size = 16};
    options.kv_cache_dtype = parse_kv_cache_dtype(name);
    const Outcome outcome = generate(options);
    for (const auto& answer : outcome.answers) EXPECT_FALSE(answer.empty()) << name;
    if (std::string_view(name) == "float32") {
      EXPECT_EQ(outcome.answers, generate_alone());
    }
  }
}

TEST(Engine, CountsWhatItComputes) {
  TinyEngine engine({.num_blocks = 64, .block_size = 16, .max_batch_tokens = 16, .max_seqs = 4});
  engine->add({tiny_prompt(40, 1), 3, {}});
  engine.run();
  const EngineStats stats = engine->stats();
  EXPECT_EQ(stats.prefill_tokens, 40);
  EXPECT_EQ(stats.decode_tokens, static_cast<std::int64_t>(engine.answer(0).size()) - 1);
  EXPECT_EQ(stats.num_steps, 3 + stats.decode_tokens);
  EXPECT_GT(stats.attention_seconds, 0.0);
}

TEST(Engine, StopsAtTheContextsEnd) {
  TinyEngine engine({.num_blocks = 64, .block_size = 16});
  engine->add({tiny_prompt(kTinyContext - 2, 1), 100, {}});
  engine.run();
  EXPECT_LE(engine.answer(0).size(), 2U);
}

TEST(Engine, RefusesWhatItCannotServe) {
  TinyEngine engine({.num_blocks = 4, .block_size = 16});
  EXPECT_THAT(
      [&] {
        engine->add({tiny_prompt(50, 1), 40, {}});
      },
      ThrowsMessage<RequestError>(HasSubstr("but the cache has 4")));
  EXPECT_THAT(
      [&] {
        engine->add({tiny_prompt(kTinyContext, 1), 1, {}});
      },
      ThrowsMessage<RequestError>(HasSubstr("shorter than the model's context of 256")));
  EXPECT_THAT(
      [&] {
        engine->add({{1, 2, 120}, 1, {}});
      },
      ThrowsMessage<RequestError>(HasSubstr("expected tokens below 120, got 120")));
  EXPECT_THROW(engine->add({{1, -1}, 1, {}}), RequestError);
  EXPECT_THROW(engine->add({{}, 1, {}}), RequestError);
  EXPECT_THROW(engine->add({{1}, 0, {}}), RequestError);
  EXPECT_TRUE(engine->done());
  EXPECT_TRUE(engine->step().empty());
}

}  // namespace
}  // namespace quire::llm
