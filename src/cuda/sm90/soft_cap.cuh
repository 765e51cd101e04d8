// The soft cap in a few instructions.
#pragma once

#include "cuda/kernel/score_mod.cuh"
#include "cuda/ptx/math.cuh"

namespace quire::cuda::sm90 {

// From products to natural logits: cap * tanh(x), with an absolute error of about 1e-7 of the cap
// (tanh.approx's is 5e-4 of it).
class SoftCap {
 public:
  __device__ __forceinline__ SoftCap(float cap, float score_scale)
      : cap_(cap),
        score_scale_(score_scale),
        // Finite where a denormal cap's inverse is not: a score of 0 stays 0.
        in_(fminf(score_scale * score::inverse_of_cap(cap) * (2.0F * kLog2E), 3.4e38F)) {}

  __device__ __forceinline__ float operator()(float score) const {
    return fmaf(-2.0F * cap_, ptx::reciprocal_approx(ptx::exp2_approx(score * in_) + 1.0F), cap_);
  }

  // Scores of up to three quarters of the cap, as they mostly are, with an error of 1e-7 of
  // themselves: tanh(x) = x + x^3 p(x^2), here in y = 2 x log2(e). It takes no special functions,
  // of which a multiprocessor gives 16 a clock.
  __device__ __forceinline__ bool is_low(float magnitude) const { return magnitude * in_ < 2.164F; }
  __device__ __forceinline__ float of_low(float score) const {
    constexpr float kUnit = 0.1201132535F;  // of x^2 a y^2
    const float y = score * in_;
    const float z = y * y;
    float p = fmaf(-4.789075814e-3F * kUnit * kUnit * kUnit * kUnit * kUnit, z,
                   1.969182678e-2F * kUnit * kUnit * kUnit * kUnit);
    p = fmaf(p, z, -5.340301618e-2F * kUnit * kUnit * kUnit);
    p = fmaf(p, z, 1.332675964e-1F * kUnit * kUnit);
    p = fmaf(p, z, -3.333308101e-1F * kUnit);
    const float linear = score * score_scale_;
    return fmaf(linear, p * z, linear);
  }

 private:
  float cap_;
  float score_scale_;
  float in_;
};

}  // namespace quire::cuda::sm90
