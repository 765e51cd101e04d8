// Unmapped keys, those whose block does not exist, read as zeros: like a sink, they have weight but
// no value. In fp16 they must not set the maximum, or the weights of all other keys could underflow
// and the whole output with them. So they get a state of their own, a maximum and a sum a row in
// shared memory, which is combined with the row's at the end in fp32. (In bf16 weights have the
// range of fp32.)
#pragma once

#include "cuda/kernel/partial.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/math.cuh"

namespace quire::cuda::sm80 {

// Takes the scores of unmapped keys out of `s`, a warp's scores as tensor cores lay them out
// (16-row tiles, 8 keys), into the states of its rows. Bit k of `unmapped` is key k.
template <int kTiles, int kKeyTiles>
__device__ __forceinline__ void set_unmapped_apart(std::uint32_t unmapped, float to_natural,
                                                   float (&s)[kTiles][kKeyTiles][4], float* max,
                                                   float* sum) {
  const auto lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
  const std::uint32_t mine = unmapped >> ptx::fragment_column(lane);
#pragma unroll
  for (int i = 0; i < kTiles * 2; ++i) {
    const int mt = i / 2;
    const int h = i % 2;
    float top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kKeyTiles * 2; ++k) {
      const bool is_unmapped = ((mine >> (k / 2 * 8 + k % 2)) & 1U) != 0;
      if (is_unmapped) top = fmaxf(top, s[mt][k / 2][2 * h + k % 2]);
    }
    top = fmaxf(top, __shfl_xor_sync(~0U, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0U, top, 2));
    const float shift = semantics::softmax_shift(top);
    float weight = 0.0F;
#pragma unroll
    for (int k = 0; k < kKeyTiles * 2; ++k) {
      const bool is_unmapped = ((mine >> (k / 2 * 8 + k % 2)) & 1U) != 0;
      float& score = s[mt][k / 2][2 * h + k % 2];
      if (is_unmapped) {
        weight += ptx::exp2_approx((score - shift) * to_natural * kLog2E);
        score = -INFINITY;
      }
    }
    weight += __shfl_xor_sync(~0U, weight, 1);
    weight += __shfl_xor_sync(~0U, weight, 2);
    if (ptx::is_first_of_row(lane)) {
      const int row = mt * 16 + h * 8 + ptx::fragment_row(lane);
      Combine combine{max[row], sum[row]};
      combine.add(top * to_natural, weight);
      max[row] = combine.max;
      sum[row] = combine.sum;
    }
  }
}

}  // namespace quire::cuda::sm80
