// One element of a stored vector of K or V, whatever the type of the cache.
#pragma once

#include <cstdint>

#include "semantics/int4.h"
#include "semantics/quant.h"

namespace quire::semantics {

// What the elements of a stored vector are multiplied with, and what is taken from them before.
struct KvScale {
  float scale = 1.0F;
  float zero = 0.0F;

  // Of a token's own scale.
  static QUIRE_HOST_DEVICE KvScale of_token(float stored, DType dtype) {
    if (dtype != kInt4) return {stored, 0.0F};
    const Int4Scale int4(stored);
    return {int4.scale, int4.zero};
  }
};

// Element `i` less the zero point, unscaled. int4: of the rotated vector.
QUIRE_HOST_DEVICE float load_kv_element(const void* row, DType dtype, float zero, std::int64_t i) {
  return dtype == kInt4 ? int4_code(row, i) - zero : load_element(row, dtype, i);
}

}  // namespace quire::semantics
