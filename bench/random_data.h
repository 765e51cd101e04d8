// Random test data, fast: caches of several GiB are filled from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "quire/types.h"

namespace quire::bench {

// Normal numbers (mean 0, deviation 1) in fp16, bf16 or fp32, drawn from a table of 65536 of them.
class NormalSource {
 public:
  // Throws std::runtime_error for another dtype.
  NormalSource(DType dtype, std::uint64_t seed);

  // Fills `count` elements.
  void fill(void* out, std::size_t count);

 private:
  std::uint64_t next();

  DType dtype_;
  std::uint64_t state_;
  std::vector<float> floats_;          // fp32
  std::vector<std::uint16_t> halves_;  // fp16 and bf16
};

// Round to nearest even. Finite values within the range of the type only.
std::uint16_t to_bfloat16(float value);
std::uint16_t to_float16(float value);
float from_bfloat16(std::uint16_t bits);
float from_float16(std::uint16_t bits);

}  // namespace quire::bench
