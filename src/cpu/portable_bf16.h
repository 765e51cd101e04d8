// The arithmetic of the CPUs' bf16 instructions in plain code, for tests on other machines.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "semantics/quant.h"

namespace quire::cpu {

// They take what is too small to be normal as 0, and give 0 for it.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0F, x) : x; }

inline float add_product(float sum, std::uint16_t a, std::uint16_t b) {
  return flushed(sum + flushed(semantics::bf16_to_float(a)) * flushed(semantics::bf16_to_float(b)));
}

}  // namespace quire::cpu
