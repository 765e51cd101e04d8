#include "examples/llm/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>

namespace quire::llm {
namespace {

TEST(Sampler, GreedyTakesTheFirstOfTheLikeliest) {
  Sampler sampler({});
  EXPECT_EQ(sampler.sample(std::vector<float>{0.5F, 2.0F, -1.0F, 2.0F}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-3.0F}), 0);
}

std::vector<std::int32_t> draw(const SamplingParams& params, int count) {
  std::vector<float> logits(1000);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = std::sin(static_cast<float>(i * i % 997));
  }
  Sampler sampler(params);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(sampler.sample(logits));
  return tokens;
}

TEST(Sampler, SameSeedSameTokens) {
  const SamplingParams params{.temperature = 0.8F, .top_p = 0.9F, .seed = 42};
  EXPECT_EQ(draw(params, 50), draw(params, 50));
  SamplingParams other = params;
  other.seed = 43;
  EXPECT_NE(draw(params, 50), draw(other, 50));
}

// Frequencies against probabilities worked out by hand: softmax of logits / temperature.
TEST(Sampler, FollowsTheDistribution) {
  const std::vector<float> logits{0.0F, std::log(2.0F), std::log(4.0F), std::log(1.0F)};
  for (const float temperature : {1.0F, 0.5F}) {
    std::vector<double> expected;
    for (const float logit : logits) {
      expected.push_back(std::exp(static_cast<double>(logit) / temperature));
    }
    const double total = std::accumulate(expected.begin(), expected.end(), 0.0);
    Sampler sampler({.temperature = temperature, .seed = 1});
    std::map<std::int32_t, int> counts;
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) ++counts[sampler.sample(logits)];
    for (std::size_t t = 0; t < logits.size(); ++t) {
      EXPECT_NEAR(counts[static_cast<std::int32_t>(t)] / static_cast<double>(kDraws),
                  expected[t] / total, 0.015);
    }
  }
}

// Probabilities 0.5, 0.25, 0.125, 0.125: the smallest sets that hold 0.5, 0.6 and 0.76.
TEST(Sampler, TopPKeepsTheSmallestSet) {
  const std::vector<float> logits{std::log(1.0F), std::log(4.0F), std::log(2.0F), std::log(1.0F)};
  const auto drawn = [&](float top_p) {
    Sampler sampler({.temperature = 1.0F, .top_p = top_p, .seed = 5});
    std::map<std::int32_t, int> counts;
    for (int i = 0; i < 2000; ++i) ++counts[sampler.sample(logits)];
    std::vector<std::int32_t> tokens;
    for (const auto& entry : counts) tokens.push_back(entry.first);
    return tokens;
  };
  EXPECT_EQ(drawn(0.499F), (std::vector<std::int32_t>{1}));
  EXPECT_EQ(drawn(0.6F), (std::vector<std::int32_t>{1, 2}));
  EXPECT_EQ(drawn(0.76F), (std::vector<std::int32_t>{0, 1, 2}));
  EXPECT_EQ(drawn(1.0F), (std::vector<std::int32_t>{0, 1, 2, 3}));
}

TEST(Sampler, TinyTemperatureIsGreedy) {
  const std::vector<float> logits{1.0F, 1.001F, 0.0F};
  Sampler sampler({.temperature = 1e-6F, .seed = 9});
  for (int i = 0; i < 100; ++i) EXPECT_EQ(sampler.sample(logits), 1);
}

TEST(Sampler, RefusesBadParameters) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(Sampler({.temperature = -1.0F}), std::invalid_argument);
  EXPECT_THROW(Sampler({.temperature = nan}), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_p = 0.0F}), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_p = 1.5F}), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_p = nan}), std::invalid_argument);
}

}  // namespace
}  // namespace quire::llm
