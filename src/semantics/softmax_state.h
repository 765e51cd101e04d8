// The running softmax of one row, (m, l): maximum logit and sum of exp(S - m). The empty state is
// (-inf, 0). States over disjoint keys are combined with weights that scale their unnormalised
// outputs. A NaN logit makes the sum NaN from then on; the maximum may miss it. (Milakov &
// Gimelshein, 2018; FlashAttention.)
#pragma once

#include <cmath>
#include <limits>

#include "semantics/host_device.h"

namespace quire::semantics {

template <class T>
struct SoftmaxState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
};

// What to subtract from logits: the maximum, or 0 where nothing is visible (-inf - -inf is NaN).
template <class T>
QUIRE_HOST_DEVICE T softmax_shift(T max) {
  return max == -std::numeric_limits<T>::infinity() ? T{0} : max;
}

template <class T>
struct CombinedState {
  SoftmaxState<T> state;
  T weight_a;  // multiplies the unnormalised output of `a`
  T weight_b;
};

// An empty state adds 0 to the sum, and its weight is 0 unless the other state is NaN.
template <class T>
QUIRE_HOST_DEVICE CombinedState<T> combine(const SoftmaxState<T>& a, const SoftmaxState<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  const T shift = softmax_shift(max);
  const T weight_a = std::exp(a.max - shift);
  const T weight_b = std::exp(b.max - shift);
  return {{max, a.sum * weight_a + b.sum * weight_b}, weight_a, weight_b};
}

template <class T>
struct NormalisedRow {
  T output_scale;  // multiplies the unnormalised output
  T lse;           // natural logarithm of the denominator
};

// The last step of a row: what divides its output by l. The sink, if there is one, enters the
// maximum and the denominator here and nowhere else.
template <class T>
QUIRE_HOST_DEVICE NormalisedRow<T> normalise(SoftmaxState<T> row, bool has_sink, T sink) {
  T weight = 1;
  if (has_sink) {
    const CombinedState<T> combined = combine(row, SoftmaxState<T>{sink, T{1}});
    row = combined.state;
    weight = combined.weight_a;
  }
  // No key was visible. Where the sum is NaN some key was, whatever the maximum.
  if (row.max == -std::numeric_limits<T>::infinity() && row.sum == row.sum) return {T{0}, row.max};
  return {weight / row.sum, row.max + std::log(row.sum)};
}

}  // namespace quire::semantics
