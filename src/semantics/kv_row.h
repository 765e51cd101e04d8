// One (slot, head) vector of the cache: how it is stored and read back.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics/quant.h"

namespace quire::semantics {

// Stores x[0..size) of `from` as `to`. Per tensor: divides by `scale`. With `token_scale`: computes
// that vector's scale, writes it there, and multiplies by its inverse.
QUIRE_HOST_DEVICE void store_kv_row(const void* x, DType from, std::int64_t size, void* row,
                                    DType to, float scale, float* token_scale) {
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
