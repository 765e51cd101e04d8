// Partial results of rows, and how two become one.
//
// m is the maximum logit in natural units, l the sum of exp(S - m), O the sum of exp(S - m) V.
#pragma once

#include <cstdint>

#include "semantics/softmax_state.h"

namespace quire::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

// Rows of a split or a kv chunk, `pitch` floats apart, in shared or global memory.
struct PartialRows {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  int pitch = 0;
};

// Combines partials of a row in key order. Written out operation by operation, so that the result
// has the same bits in whichever kernel it is computed.
struct Combine {
  float max = -INFINITY;
  float sum = 0.0F;
  float weight_before = 0.0F;
  float weight_added = 0.0F;
  __device__ void add(float added_max, float added_sum) {
    const float new_max = fmaxf(max, added_max);
    const float shift = semantics::softmax_shift(new_max);
    weight_before = expf(max - shift);
    weight_added = expf(added_max - shift);
    max = new_max;
    sum = __fmaf_rn(added_sum, weight_added, __fmul_rn(sum, weight_before));
  }
  __device__ float value(float before, float added) const {
    return __fmaf_rn(added, weight_added, __fmul_rn(before, weight_before));
  }
  __device__ float4 value(const float4& a, const float4& b) const {
    return make_float4(value(a.x, b.x), value(a.y, b.y), value(a.z, b.z), value(a.w, b.w));
  }
};

}  // namespace quire::cuda
