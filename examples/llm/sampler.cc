#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace quire::llm {

void check(const SamplingParams& params) {
  if (!std::isfinite(params.temperature) || params.temperature < 0.0F) {
    throw std::invalid_argument("temperature: expected a number >= 0, got " +
                                std::to_string(params.temperature));
  }
  if (!(params.top_p > 0.0F && params.top_p <= 1.0F)) {
    throw std::invalid_argument("top_p: expected a number above 0 and up to 1, got " +
                                std::to_string(params.top_p));
  }
}

Sampler::Sampler(const SamplingParams& params) : params_(params), random_(params.seed) {
  check(params);
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  if (params_.temperature > 0.0F) return sample_nucleus(logits);
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

std::int32_t Sampler::sample_nucleus(std::span<const float> logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  const auto weight = [&](float logit) {
    return std::exp((static_cast<double>(logit) - max) / params_.temperature);
  };
  double total = 0.0;
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    total += weight(logits[i]);
    candidates_.emplace_back(logits[i], static_cast<std::int32_t>(i));
  }
  const auto likelier = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  // Tokens are ordered only as far as they are needed, in growing steps: the nucleus is most often
  // a few of tens of thousands.
  std::size_t ordered = 0;
  const auto order_past = [&](std::size_t index) {
    while (index >= ordered && ordered < candidates_.size()) {
      const std::size_t next = std::min(candidates_.size(), ordered == 0 ? 64 : ordered * 8);
      std::partial_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(ordered),
                        candidates_.begin() + static_cast<std::ptrdiff_t>(next), candidates_.end(),
                        likelier);
      ordered = next;
    }
  };
  // 53 random bits make a double in [0, 1). std::uniform_real_distribution is not the same
  // everywhere.
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  // The smallest set of likeliest tokens that holds top_p of the mass, then one of it.
  double nucleus = total;
  if (params_.top_p < 1.0F) {
    nucleus = 0.0;
    for (std::size_t i = 0; i < candidates_.size() && nucleus < params_.top_p * total; ++i) {
      order_past(i);
      nucleus += weight(candidates_[i].first);
    }
  }
  double passed = 0.0;
  for (std::size_t i = 0; i < candidates_.size(); ++i) {
    order_past(i);
    passed += weight(candidates_[i].first);
    if (passed > uniform * nucleus) return candidates_[i].second;
  }
  return candidates_.front().second;  // only if no logit is a number
}

}  // namespace quire::llm
