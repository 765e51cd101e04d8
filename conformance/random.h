// Random numbers that are the same on every machine and standard library: a failing case must be
// reproducible from its seed and index alone (std::normal_distribution and friends are not).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace quire::conformance {

// SplitMix64 (Steele et al., 2014).
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}
  // Independent streams of one seed: case `index` does not depend on the cases before it.
  Rng(std::uint64_t seed, std::uint64_t index)
      : state_(Rng(seed * 0x9E3779B97F4A7C15U + index).next() ^ (index << 32U)) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }

  // In [low, high], both included.
  std::int64_t uniform(std::int64_t low, std::int64_t high) {
    const auto span = static_cast<std::uint64_t>(high - low) + 1;
    return low + static_cast<std::int64_t>(next() % span);
  }

  // In [0, 1).
  double unit() { return static_cast<double>(next() >> 11U) * 0x1.0p-53; }

  bool chance(double probability) { return unit() < probability; }

  // Nearly normal, mean 0 and variance 1, within +-4.25: six 10-bit uniforms of one draw.
  double normal() {
    std::uint64_t bits = next();
    std::int64_t sum = 0;
    for (int i = 0; i < 6; ++i, bits >>= 10U) sum += static_cast<std::int64_t>(bits & 1023U);
    return static_cast<double>(2 * sum - 6 * 1023) / (2 * 1023 * 0.70710678);
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[uniform(0, static_cast<std::int64_t>(choices.size()) - 1)];
  }

  template <class T>
  void shuffle(std::vector<T>* items) {
    for (std::int64_t i = static_cast<std::int64_t>(items->size()) - 1; i > 0; --i) {
      std::swap((*items)[i], (*items)[uniform(0, i)]);
    }
  }

 private:
  std::uint64_t state_;
};

}  // namespace quire::conformance
