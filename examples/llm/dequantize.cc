#include "dequantize.h"

#include <bit>
#include <cstddef>
#include <cstring>

namespace quire::llm {
namespace {

constexpr int kBlock = 32;  // elements of a Q4_0, Q4_1 or Q8_0 block

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// Exact for every half, subnormals, infinities and NaNs included. Normal halves are rebiased by a
// multiplication, which also normalises the subnormal ones.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7FFFU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(scaled);
  if ((half & 0x7C00U) == 0x7C00U) bits = magnitude | 0x7F800000U;
  return std::bit_cast<float>(bits | sign);
}

void dequantize_f16(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = half_to_float(load<std::uint16_t>(in + 2 * i));
}

void dequantize_bf16(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] =
        std::bit_cast<float>(static_cast<std::uint32_t>(load<std::uint16_t>(in + 2 * i)) << 16);
  }
}

void dequantize_q8_0(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kBlock, in += 34) {
    const float scale = half_to_float(load<std::uint16_t>(in));
    for (int j = 0; j < kBlock; ++j) {
      out[i + j] = scale * static_cast<float>(static_cast<std::int8_t>(in[2 + j]));
    }
  }
}

// The low nibbles of a 4-bit block are its first half, the high nibbles its second.
void dequantize_q4_0(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kBlock, in += 18) {
    const float scale = half_to_float(load<std::uint16_t>(in));
    for (int j = 0; j < kBlock / 2; ++j) {
      const int byte = static_cast<int>(in[2 + j]);
      out[i + j] = scale * static_cast<float>((byte & 0xF) - 8);
      out[i + kBlock / 2 + j] = scale * static_cast<float>((byte >> 4) - 8);
    }
  }
}

void dequantize_q4_1(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kBlock, in += 20) {
    const float scale = half_to_float(load<std::uint16_t>(in));
    const float minimum = half_to_float(load<std::uint16_t>(in + 2));
    for (int j = 0; j < kBlock / 2; ++j) {
      const int byte = static_cast<int>(in[4 + j]);
      out[i + j] = scale * static_cast<float>(byte & 0xF) + minimum;
      out[i + kBlock / 2 + j] = scale * static_cast<float>(byte >> 4) + minimum;
    }
  }
}

}  // namespace

void dequantize_rows(const GgufTensor& tensor, std::int64_t begin, std::int64_t end, float* out) {
  const std::int64_t row_bytes = static_cast<std::int64_t>(tensor.data.size()) / tensor.num_rows();
  const std::byte* in = tensor.data.data() + begin * row_bytes;
  const std::int64_t count = (end - begin) * tensor.row_size();
  switch (tensor.type) {
    case GgmlType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case GgmlType::kF16: return dequantize_f16(in, count, out);
    case GgmlType::kBF16: return dequantize_bf16(in, count, out);
    case GgmlType::kQ8_0: return dequantize_q8_0(in, count, out);
    case GgmlType::kQ4_0: return dequantize_q4_0(in, count, out);
    case GgmlType::kQ4_1: return dequantize_q4_1(in, count, out);
  }
}

}  // namespace quire::llm
