#include "cpu/pairs.h"

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
        for (std::int32_t i = 0; i < p.head_size;
             i += 2) {  // the odd one first, as the instruction
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

}  // namespace

const PairKernels kPairKernelsPortable = {pair_scores, pair_values};

}  // namespace quire::cpu
