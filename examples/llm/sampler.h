// Picks the next token from a model's logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace quire::llm {

struct SamplingParams {
  float temperature = 0.0F;  // 0: greedy, the most likely token
  float top_p = 1.0F;        // nucleus sampling (Holtzman et al., 2020): 1 keeps every token
  std::uint64_t seed = 0;
};

// Throws std::invalid_argument on a negative or non-finite temperature, or a top_p outside (0, 1].
void check(const SamplingParams& params);

// One for each request: what it draws depends on its seed and its logits alone, not on what else
// runs in the batch. The generator and the arithmetic are fixed by the C++ standard, so a seed
// gives the same draws everywhere.
class Sampler {
 public:
  // Throws as check() does.
  explicit Sampler(const SamplingParams& params);

  // The next token. Of equally likely ones the first counts as the likeliest.
  std::int32_t sample(std::span<const float> logits);

 private:
  std::int32_t sample_nucleus(std::span<const float> logits);

  SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<std::pair<float, std::int32_t>> candidates_;  // logit, token: scratch
};

}  // namespace quire::llm
