// merge_states, one row: two results over disjoint keys into one.
#pragma once

#include <cstdint>

#include "semantics/quant.h"
#include "semantics/softmax_state.h"

namespace quire::semantics {

template <class T>
struct MergedRow {
  T weight_a;
  T weight_b;
  T lse;

  // Element i of the rows `a` and `b`, merged. A row of weight 0 is not read, since it may hold
  // NaN; a weight of NaN makes NaN.
  QUIRE_HOST_DEVICE float element(const void* a, const void* b, DType dtype, std::int64_t i) const {
    const T part_a = weight_a != 0 ? weight_a * load_element(a, dtype, i) : T{0};
    const T part_b = weight_b != 0 ? weight_b * load_element(b, dtype, i) : T{0};
    return static_cast<float>(part_a + part_b);
  }
};

template <class T>
QUIRE_HOST_DEVICE MergedRow<T> merge_rows(T lse_a, T lse_b) {
  const CombinedState<T> merged =
      combine(SoftmaxState<T>{lse_a, T{1}}, SoftmaxState<T>{lse_b, T{1}});
  const NormalisedRow<T> normalised = normalise(merged.state, false, T{0});
  return {merged.weight_a * normalised.output_scale, merged.weight_b * normalised.output_scale,
          normalised.lse};
}

}  // namespace quire::semantics
