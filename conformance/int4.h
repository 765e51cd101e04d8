// int4_per_token_head as docs/guide/semantics.md has it, written for the tests alone: nothing here
// is shared with src/.
#pragma once

#include <cstdint>
#include <vector>

namespace quire::conformance {

// The signs, 1 or -1, of the elements of a block of the rotation: those of the longest block.
const std::vector<double>& rotation_signs();

// Stores a head vector of bf16, fp16 or fp32 values: count / 2 bytes and the scale.
void store_int4_row(const double* values, std::int64_t count, std::uint8_t* stored, float* scale);

// The vector that was stored, rotated back.
void read_int4_row(const std::uint8_t* stored, float scale, std::int64_t count, double* values);

// What a scale says: the step, and the zero point.
struct Int4Parts {
  float step;
  int zero;
};
Int4Parts parts_of_int4_scale(float scale);

}  // namespace quire::conformance
