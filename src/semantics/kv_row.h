// One (slot, head) vector of the cache: how the host stores it.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics/int4.h"
#include "semantics/quant.h"

namespace quire::semantics {

// Stores x[0..size) of `from` as int4, and its scale.
inline void store_int4_row(const void* x, DType from, std::int64_t size, void* row,
                           float* token_scale) {
  float y[kMostInt4Elements];
  const auto count = static_cast<int>(size);
  rotate_row<OneThread>(x, from, count, y);
  Int4Range range;
  for (int i = 0; i < count; ++i) range.add(y[i]);
  const Int4Encoder encoder(range);
  *token_scale = encoder.stored_scale();
  for (int i = 0; i < count; i += 2) {
    static_cast<std::uint8_t*>(row)[i / 2] =
        static_cast<std::uint8_t>(encoder.code(y[i]) | encoder.code(y[i + 1]) << 4);
  }
}

// Stores x[0..size) of `from` as `to`. Per tensor: divides by `scale`. With `token_scale`: computes
// that vector's scale, writes it there, and multiplies by its inverse.
inline void store_kv_row(const void* x, DType from, std::int64_t size, void* row, DType to,
                         float scale, float* token_scale) {
  if (to == kInt4) return store_int4_row(x, from, size, row, token_scale);
  if (token_scale != nullptr) {
    float absmax = 0.0F;
    for (std::int64_t i = 0; i < size; ++i) {
      const float magnitude = std::fabs(load_element(x, from, i));
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    scale = token_head_scale(absmax, to == DType::kInt8 ? kInt8Max : kE4M3Max);
    *token_scale = scale;
  }
  const float inverse = 1.0F / scale;
  for (std::int64_t i = 0; i < size; ++i) {
    const float element = load_element(x, from, i);
    store_element(row, to, i, token_scale != nullptr ? element * inverse : element / scale);
  }
}

}  // namespace quire::semantics
