#include "bench/random_data.h"

#include <bit>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>

namespace quire::bench {
namespace {

constexpr std::size_t kTableSize = std::size_t{1} << 16;  // one index for 16 random bits

template <class T>
void fill_from(const std::vector<T>& table, T* out, std::size_t count, std::uint64_t bits_of_four) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = table[(bits_of_four >> (16 * i)) & 0xFFFF];
  }
}

}  // namespace

NormalSource::NormalSource(DType dtype, std::uint64_t seed)
    : dtype_(dtype), state_(seed * 0x9E3779B97F4A7C15U + 1) {
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    throw std::runtime_error(std::string("no random data of dtype ") + to_string(dtype));
  }
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < kTableSize; ++i) {
    const float value = normal(random);
    switch (dtype) {
      case DType::kFloat32: floats_.push_back(value); break;
      case DType::kFloat16: halves_.push_back(to_float16(value)); break;
      default: halves_.push_back(to_bfloat16(value)); break;
    }
  }
}

std::uint64_t NormalSource::next() {  // xorshift64*
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return state_ * 0x2545F4914F6CDD1DU;
}

void NormalSource::fill(void* out, std::size_t count) {
  for (std::size_t i = 0; i < count; i += 4) {
    const std::size_t step = count - i < 4 ? count - i : 4;
    if (dtype_ == DType::kFloat32) {
      fill_from(floats_, static_cast<float*>(out) + i, step, next());
    } else {
      fill_from(halves_, static_cast<std::uint16_t*>(out) + i, step, next());
    }
  }
}

std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t to_float16(float value) {
  const std::uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  // Below 2^-14 fp16 counts in steps of 2^-24.
  if (magnitude < 0x1p-14F) {
    return static_cast<std::uint16_t>(
        sign | static_cast<std::uint32_t>(std::nearbyint(magnitude * 0x1p24F)));
  }
  const auto bits = std::bit_cast<std::uint32_t>(magnitude);
  const std::uint32_t rounded = bits + 0xFFF + ((bits >> 13) & 1);
  return static_cast<std::uint16_t>(sign | ((rounded >> 13) - ((127 - 15) << 10)));
}

float from_float16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1F;
  const auto mantissa = static_cast<float>(bits & 0x3FF);
  const float magnitude =
      exponent == 0 ? mantissa * 0x1p-24F : std::ldexp(1024.0F + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace quire::bench
