// The soft cap in a few instructions.
#pragma once

#include "cuda/kernel/score_mod.cuh"
#include "cuda/ptx/math.cuh"

namespace quire::cuda::sm90 {

// From products to natural logits: cap * tanh(x), with an absolute error of about 1e-7 of the cap
// (tanh.approx's is 5e-4 of it).
class SoftCap {
 public:
  // What is computed once: the division is a call.
  static __device__ __forceinline__ float factor(float cap, float score_scale) {
    // Finite where a denormal cap's inverse is not: a score of 0 stays 0.
    return fminf(score_scale * score::inverse_of_cap(cap) * (2.0F * kLog2E), 3.4e38F);
  }
  __device__ __forceinline__ SoftCap(float cap, float factor) : cap_(cap), in_(factor) {}

  __device__ __forceinline__ float operator()(float score) const {
    return fmaf(-2.0F * cap_, ptx::reciprocal_approx(ptx::exp2_approx(score * in_) + 1.0F), cap_);
  }

 private:
  float cap_;
  float in_;
};

}  // namespace quire::cuda::sm90
