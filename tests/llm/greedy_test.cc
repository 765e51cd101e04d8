// Greedy answers of the real model against transformers' on the same weights, token for token; see
// data/make_greedy_tokens.py. The closest decision there has a margin of 0.01 between the logits,
// a hundred times what float32 arithmetic in another order changes.
#include <gtest/gtest.h>

#include "examples/llm/chat_template.h"
#include "examples/llm/device_ops.h"
#include "examples/llm/engine.h"
#include "examples/llm/tokenizer.h"
#include "tests/llm/devices.h"
#include "tests/llm/real_model.h"

namespace quire::llm {
namespace {

struct Case {
  std::string name;
  ModelOptions options;
  bool expect_preemptions = false;
  DeviceType device = DeviceType::kCpu;
};

class Greedy : public testing::TestWithParam<Case> {};

TEST_P(Greedy, EqualsTransformers) {
  if (const std::string reason = missing(GetParam().device); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const GgufFile file = GgufFile::open(real_model_path());
  const Tokenizer tokenizer(file);
  const ChatTemplate chat(file);
  const std::unique_ptr<DeviceOps> ops = make_ops(GetParam().device);
  Model model(file, *ops, GetParam().options);
  Engine engine(model, [&](std::int32_t token) { return tokenizer.ends_answer(token); });

  const nlohmann::json document = test_data("greedy_tokens.json");
  const nlohmann::json& cases = document.at("cases");
  ASSERT_GE(cases.size(), 5U);
  for (const auto& item : cases) {
    const ChatMessage message{"user", item.at("prompt").get<std::string>()};
    const std::vector<std::int32_t> prompt = tokenizer.encode(chat.render({&message, 1}));
    EXPECT_EQ(prompt, item.at("prompt_tokens").get<std::vector<std::int32_t>>());
    engine.add({prompt, document.at("max_tokens").get<std::int64_t>(), {}});
  }
  while (!engine.done()) engine.step();
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Sequence& sequence = engine.sequence(static_cast<std::int64_t>(i));
    const std::vector<std::int32_t> answer(sequence.tokens.begin() + sequence.num_prompt,
                                           sequence.tokens.end());
    EXPECT_EQ(answer, cases[i].at("generated_tokens").get<std::vector<std::int32_t>>())
        << cases[i].at("prompt");
  }
  EXPECT_EQ(engine.stats().num_preemptions > 0, GetParam().expect_preemptions);
  EXPECT_GT(engine.block_stats().peak_shared, 0);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DeviceType device : devices_of_this_build()) {
    const std::string prefix = device == DeviceType::kCuda ? "Cuda" : "";
    all.push_back({prefix + "AllAtOnce", {.num_blocks = 128, .block_size = 16}, false, device});
    all.push_back({prefix + "SmallChunksOddBlocks",
                   {.num_blocks = 64, .block_size = 7, .max_batch_tokens = 24, .max_seqs = 3},
                   false,
                   device});
    all.push_back({prefix + "TooFewBlocks", {.num_blocks = 12, .block_size = 16}, true, device});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Real, Greedy, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace quire::llm
