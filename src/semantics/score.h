// From a scaled dot product to a logit. `Ops` is the number type's vocabulary (mul, add, tanh,
// sqrt, max, neg, zero): float in CUDA fragments, a SIMD vector on the CPU, double in the
// reference.
#pragma once

#include "semantics/host_device.h"

namespace quire::semantics {

// cap * tanh(s / cap)
template <class Ops, class V>
QUIRE_HOST_DEVICE V soft_cap(const Ops& ops, V s, V cap, V inverse_cap) {
  return ops.mul(cap, ops.tanh(ops.mul(s, inverse_cap)));
}

// s + slope * (j - p)
template <class Ops, class V>
QUIRE_HOST_DEVICE V alibi(const Ops& ops, V s, V slope, V j_minus_p) {
  return ops.add(s, ops.mul(slope, j_minus_p));
}

// s + slope * (j <= p ? -sqrt(p - j) : 0): for j > p the square root sees max(p - j, 0) = 0.
template <class Ops, class V>
QUIRE_HOST_DEVICE V alibi_sqrt(const Ops& ops, V s, V slope, V j_minus_p) {
  const V root = ops.sqrt(ops.max(ops.neg(j_minus_p), ops.zero()));
  return ops.add(s, ops.mul(slope, ops.neg(root)));
}

}  // namespace quire::semantics
