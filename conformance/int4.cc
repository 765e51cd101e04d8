#include "conformance/int4.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

std::int64_t block_of(std::int64_t count) {
  std::int64_t block = 1;
  while (count % (2 * block) == 0) block *= 2;
  return block;
}

// The product with a Hadamard matrix: that of both halves, then their sum and difference.
template <class T>
void multiply_by_hadamard(T* x, std::int64_t size) {
  if (size == 1) return;
  const std::int64_t half = size / 2;
  multiply_by_hadamard(x, half);
  multiply_by_hadamard(x + half, half);
  for (std::int64_t i = 0; i < half; ++i) {
    const T sum = x[i] + x[half + i];
    x[half + i] = x[i] - x[half + i];
    x[i] = sum;
  }
}

float nearest_bf16(double x) {
  std::uint16_t code = 0;
  encode(DType::kBFloat16, x, &code);
  return static_cast<float>(decode(DType::kBFloat16, &code));
}

int code_of(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::clamp(std::floor(x), 0.0F, 15.0F));
}

}  // namespace

const std::vector<double>& rotation_signs() {
  // torch.bernoulli(0.5) of a CPU generator with this seed: 24 bits of a word, below a half or not.
  static const std::vector<double> signs = [] {
    std::mt19937 words(0x9E3779B9U);
    std::vector<double> drawn(512);
    for (double& sign : drawn) sign = words() % (1U << 24U) < 1U << 23U ? 1.0 : -1.0;
    return drawn;
  }();
  return signs;
}

void store_int4_row(const double* values, std::int64_t count, std::uint8_t* stored, float* scale) {
  const std::int64_t block = block_of(count);
  const std::vector<double>& signs = rotation_signs();
  std::vector<float> y(count);
  for (std::int64_t i = 0; i < count; ++i) {
    y[i] = static_cast<float>(signs[i % block]) * nearest_bf16(values[i]);
  }
  for (std::int64_t i = 0; i < count; i += block) multiply_by_hadamard(y.data() + i, block);
  float low = 0;
  float high = 0;
  for (float& x : y) {
    x = nearest_bf16(x);
    if (std::isnan(x)) high = std::numeric_limits<float>::infinity();
    low = std::min(low, x);
    high = std::max(high, x);
  }
  const float step = std::max((high - low) * (1.0F / 15.0F), 1e-6F);
  const float inverse = 1.0F / step;
  const int zero = code_of(std::fma(-low, inverse, 0.5F));
  const auto code = [&](float x) {
    return code_of(std::fma(x, inverse, static_cast<float>(zero) + 0.5F));
  };
  for (std::int64_t i = 0; i < count; i += 2) {
    stored[i / 2] = static_cast<std::uint8_t>(code(y[i]) + 16 * code(y[i + 1]));
  }
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(step);
  *scale = std::bit_cast<float>(bits / 16 * 16 + static_cast<std::uint32_t>(zero));
}

Int4Parts parts_of_int4_scale(float scale) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(scale);
  const float step = std::bit_cast<float>(bits / 16 * 16);
  return {std::isfinite(step) ? step : std::numeric_limits<float>::quiet_NaN(),
          static_cast<int>(bits % 16)};
}

void read_int4_row(const std::uint8_t* stored, float scale, std::int64_t count, double* values) {
  const Int4Parts parts = parts_of_int4_scale(scale);
  for (std::int64_t i = 0; i < count; ++i) {
    const int code = i % 2 == 0 ? stored[i / 2] % 16 : stored[i / 2] / 16;
    values[i] = double{parts.step} * (code - parts.zero);
  }
  const std::int64_t block = block_of(count);
  const std::vector<double>& signs = rotation_signs();
  for (std::int64_t i = 0; i < count; i += block) multiply_by_hadamard(values + i, block);
  for (std::int64_t i = 0; i < count; ++i) {
    values[i] *= signs[i % block] / static_cast<double>(block);
  }
}

}  // namespace quire::conformance
