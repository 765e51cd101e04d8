// Conversions between double and every element type, written for the tests alone: nothing here is
// shared with src/, so a wrong rounding there cannot hide.
#pragma once

#include <cstdint>

#include "quire/kv_cache.h"
#include "quire/types.h"

namespace quire::conformance {

// The element's value. Integers and bools too.
double decode(DType dtype, const void* element);

// Stores the nearest value, ties to even. NaN stays NaN; fp8 saturates to the largest finite value,
// 16-bit floats overflow to infinity, integers are clamped.
void encode(DType dtype, double value, void* element);

// `count` elements of a row at once.
void decode_row(DType dtype, const void* elements, std::int64_t count, double* values);

bool is_float(DType dtype);
bool is_float8(DType dtype);
// The distance between neighbours next to zero.
double smallest_step(DType dtype);

// Position of an fp8 value in the order of all values of its type: neighbours differ by 1, and
// -0 and +0 are the same. Not for NaN.
int ordinal_of_float8(std::uint8_t code);

// Fills with what no correct result contains: NaN for floats, the lowest value for integers.
void fill_poison(DType dtype, void* elements, std::int64_t count);

// Relative Frobenius error that semantics.md ("Tolerances") grants to that type.
double tolerance_of(DType dtype);

// The cache write of semantics.md for one head vector: stores `count` values of type `from` at
// `stored`, and the vector's own scale at `own_scale` for per-token-head caches. Arithmetic in
// float32, as the definition has it.
void quantise_row(KvCacheDType kind, DType from, const void* values, std::int64_t count,
                  float tensor_scale, DType storage, void* stored, float* own_scale);

}  // namespace quire::conformance
