// Storage types against their definition in ggml, computed here in double.
#include "examples/llm/dequantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "tests/llm/gguf_writer.h"

namespace quire::llm {
namespace {

// Two rows of 64 elements from raw bytes.
std::vector<float> dequantize(std::uint32_t type, std::vector<std::byte> data,
                              std::uint64_t cols = 64) {
  GgufWriter writer;
  const std::size_t rows = 2;
  writer.add_tensor("weight", {cols, rows}, type, std::move(data));
  const auto bytes = writer.bytes();
  const GgufFile file = GgufFile::parse(bytes, "test");
  std::vector<float> out(cols * rows, -1.0F);
  // Row by row, so that offsets within the tensor are seen to be right.
  dequantize_rows(file.tensors()[0], 1, 2, out.data() + cols);
  dequantize_rows(file.tensors()[0], 0, 1, out.data());
  return out;
}

std::vector<std::byte> pseudo_random(std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::uint32_t state = 12345;
  for (std::byte& byte : bytes) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<std::byte>(state >> 24);
  }
  return bytes;
}

constexpr std::uint16_t kHalf0p25 = 0x3400;
constexpr std::uint16_t kHalfMinus1p5 = 0xBE00;
constexpr std::uint16_t kHalfSmallest = 0x0001;  // 2^-24

TEST(Dequantize, Half) {
  std::vector<std::byte> data;
  const std::uint16_t halves[] = {0x0000, 0x8000, 0x3C00, 0xC000, 0x7BFF, 0x0001,
                                  0x83FF, 0x0400, 0x7C00, 0xFC00, 0x7E00, 0x3555};
  const float expected[] = {0.0F,
                            -0.0F,
                            1.0F,
                            -2.0F,
                            65504.0F,
                            0x1p-24F,
                            -1023.0F * 0x1p-24F,
                            0x1p-14F,
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN(),
                            1365.0F / 4096.0F};
  data.resize(sizeof(halves));
  for (std::size_t i = 0; i < 12; ++i) poke(data, 2 * i, halves[i]);
  const std::vector<float> out = dequantize(1, data, 6);
  for (std::size_t i = 0; i < 12; ++i) {
    if (std::isnan(expected[i])) {
      EXPECT_TRUE(std::isnan(out[i]));
    } else {
      EXPECT_EQ(out[i], expected[i]) << i;
      EXPECT_EQ(std::signbit(out[i]), std::signbit(expected[i])) << i;
    }
  }
}

TEST(Dequantize, BFloat16) {
  std::vector<std::byte> data(8);
  const std::uint16_t values[] = {0x3F80, 0xC000, 0x0000, 0x7F80};
  for (std::size_t i = 0; i < 4; ++i) poke(data, 2 * i, values[i]);
  const std::vector<float> out = dequantize(30, data, 2);
  EXPECT_EQ(out[0], 1.0F);
  EXPECT_EQ(out[1], -2.0F);
  EXPECT_EQ(out[2], 0.0F);
  EXPECT_EQ(out[3], std::numeric_limits<float>::infinity());
}

TEST(Dequantize, Q8_0) {
  std::vector<std::byte> data = pseudo_random(4 * 34);
  for (std::size_t b = 0; b < 4; ++b) poke(data, b * 34, b == 3 ? kHalfSmallest : kHalf0p25);
  const std::vector<float> out = dequantize(8, data);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t block = i / 32;
    const auto quant = static_cast<std::int8_t>(data[block * 34 + 2 + i % 32]);
    EXPECT_EQ(out[i], quant * (block == 3 ? 0x1p-24 : 0.25)) << i;
  }
}

TEST(Dequantize, Q4_0) {
  std::vector<std::byte> data = pseudo_random(4 * 18);
  for (std::size_t b = 0; b < 4; ++b) poke(data, b * 18, kHalfMinus1p5);
  const std::vector<float> out = dequantize(2, data);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const int byte = static_cast<int>(data[i / 32 * 18 + 2 + i % 16]);
    const int quant = i % 32 < 16 ? byte & 15 : byte >> 4;
    EXPECT_EQ(out[i], (quant - 8) * -1.5) << i;
  }
}

TEST(Dequantize, Q4_1) {
  std::vector<std::byte> data = pseudo_random(4 * 20);
  for (std::size_t b = 0; b < 4; ++b) {
    poke(data, b * 20, kHalf0p25);
    poke(data, b * 20 + 2, kHalfMinus1p5);
  }
  const std::vector<float> out = dequantize(3, data);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const int byte = static_cast<int>(data[i / 32 * 20 + 4 + i % 16]);
    const int quant = i % 32 < 16 ? byte & 15 : byte >> 4;
    EXPECT_EQ(out[i], quant * 0.25 - 1.5) << i;
  }
}

}  // namespace
}  // namespace quire::llm
