// Normal numbers of any dtype at the price of a copy: large cases hold tens of millions, and
// drawing and rounding each costs a hundred times more than copying it. Each kind is drawn once a
// process; rows then start anywhere in it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conformance/random.h"
#include "quire/types.h"

namespace quire::conformance {

inline constexpr std::int64_t kMostNoise = 1024;

// kMostNoise elements of mean 0.
const std::byte* noise(DType dtype, double deviation, Rng* rng);

}  // namespace quire::conformance
