// The plain code of pairs.h, for tests on machines without the instructions, and the tables of bytes.
#include "cpu/pairs.h"

#include "cpu/kernels.h"
#include "cpu/portable_bf16.h"

namespace quire::cpu {
namespace {

void pair_scores(const PairScores& p) {
  const std::uint32_t* q = p.q;
  for (std::int32_t first = 0; first < p.rows;) {
    const std::int32_t lanes = pair_lanes(p.rows, first);
    for (std::int32_t r = 0; r < lanes; ++r) {
      for (std::int32_t t = 0; t < p.count; ++t) {
        const auto* key = static_cast<const std::uint16_t*>(p.keys[t]);
        float sum = 0.0F;
        // Of each pair the odd product first, as the instruction.
        for (std::int32_t i = 0; i < p.head_size; i += 2) {
          const std::uint32_t pair = q[i / 2 * lanes + r];
          sum = add_product(sum, static_cast<std::uint16_t>(pair >> 16), key[i + 1]);
          sum = add_product(sum, static_cast<std::uint16_t>(pair), key[i]);
        }
        p.s[(first + r) * p.s_stride + t] = sum * p.scale;
      }
    }
    q += std::int64_t{p.head_size} / 2 * lanes;
    first += lanes;
  }
}

void pair_values(const PairValues& p) {
  for (std::int32_t r = 0; r < p.rows; ++r) {
    for (std::int32_t i = 0; i < p.head_size_v; ++i) {
      float* o = p.o + r * p.o_stride + i;
      float sum = p.alpha[r] * *o;
      const std::uint16_t* weights = p.weights + r * p.weights_stride;
      for (std::int32_t t = 0; t < p.count; t += 2) {
        const auto value = [&](std::int32_t key) {
          return static_cast<const std::uint16_t*>(p.values[key])[i];
        };
        sum = add_product(sum, weights[t + 1], value(t + 1));
        sum = add_product(sum, weights[t], value(t));
      }
      *o = sum;
    }
  }
}

void widen(const void* bytes, std::int32_t count, const ByteTable& table, std::uint16_t* to) {
  const auto* from = static_cast<const std::uint8_t*>(bytes);
  for (std::int32_t i = 0; i < count; ++i) {
    to[i] = static_cast<std::uint16_t>(table.high[from[i]] << 8 | table.low[from[i]]);
  }
}

ByteTable make_table(float (*value_of)(std::uint8_t code)) {
  ByteTable table;
  for (int code = 0; code < 256; ++code) {
    const std::uint16_t bits = semantics::float_to_bf16(value_of(static_cast<std::uint8_t>(code)));
    table.low[code] = static_cast<std::uint8_t>(bits);
    table.high[code] = static_cast<std::uint8_t>(bits >> 8);
  }
  return table;
}

}  // namespace

const ByteTable& byte_table(DType dtype) {
  static const ByteTable kE4M3 = make_table(semantics::e4m3_to_float);
  static const ByteTable kE5M2 = make_table(semantics::e5m2_to_float);
  static const ByteTable kInt8 = make_table(
      [](std::uint8_t code) { return static_cast<float>(static_cast<std::int8_t>(code)); });
  if (dtype == DType::kFloat8E4M3) return kE4M3;
  return dtype == DType::kFloat8E5M2 ? kE5M2 : kInt8;
}

const PairKernels kPairKernelsPortable = {pair_scores, pair_values, widen};

}  // namespace quire::cpu
