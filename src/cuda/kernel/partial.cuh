// Partial results of rows, and how two become one.
//
// m is the maximum logit in natural kv_tiles, l the sum of exp(S - m), O the sum of exp(S - m) V.
#pragma once

#include <cstdint>

#include "semantics/softmax_state.h"

namespace quire::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

// The result of a split or chunk: rows of `pitch` floats.
struct Result {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  int pitch = 0;
};

// Running combine of num_partials in key order. Written out operation by operation: a combine gives the same
// bits wherever it is done.
struct Combine {
  float max = -INFINITY;
  float sum = 0.0F;
  float weight_before = 0.0F;
  float weight_part = 0.0F;
  __device__ void add(float part_max, float part_sum) {
    const float new_max = fmaxf(max, part_max);
    const float shift = semantics::softmax_shift(new_max);
    weight_before = expf(max - shift);
    weight_part = expf(part_max - shift);
    max = new_max;
    sum = __fmaf_rn(part_sum, weight_part, __fmul_rn(sum, weight_before));
  }
  __device__ float value(float before, float part) const {
    return __fmaf_rn(part, weight_part, __fmul_rn(before, weight_before));
  }
  __device__ float4 value(const float4& a, const float4& b) const {
    return make_float4(value(a.x, b.x), value(a.y, b.y), value(a.z, b.z), value(a.w, b.w));
  }
};

}  // namespace quire::cuda
