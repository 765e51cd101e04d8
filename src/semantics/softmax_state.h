// The running softmax of one row, (m, l): maximum logit and sum of exp(S - m). The empty state is
// (-inf, 0). Parts over disjoint keys merge with weights that scale their unnormalised outputs.
// A NaN logit makes the sum NaN, which stays; maxima may lose it on the way.
// (Milakov & Gimelshein, 2018; FlashAttention.)
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
  T weight_a;  // multiplies part a's unnormalised output
  T weight_b;
};

// An empty part adds 0 to the sum, and its weight is 0 unless the other part is NaN.
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

// Closes a row. The sink, if any, takes part in the maximum and the denominator exactly once, here.
template <class T>
QUIRE_HOST_DEVICE NormalisedRow<T> normalise(SoftmaxState<T> row, bool has_sink, T sink) {
  T weight = 1;
  if (has_sink) {
    const CombinedState<T> combined = combine(row, SoftmaxState<T>{sink, T{1}});
    row = combined.state;
    weight = combined.weight_a;
  }
  // Nothing seen. A sum of NaN is not nothing, whatever the maximum.
  if (row.max == -std::numeric_limits<T>::infinity() && row.sum == row.sum) return {T{0}, row.max};
  return {weight / row.sum, row.max + std::log(row.sum)};
}

}  // namespace quire::semantics
