// A kv tile of an 8-bit cache in the decode kernel (members of DecodeAttention):
//
//   K's bytes -> registers -> fp16 -> S^T = K Q^T, meanwhile V's bytes -> registers
//   -> tokens' scales, mask, softmax -> P^T to shared memory
//   V's registers -> fp16 -> O^T += V^T P^T
//
// Where tokens have scales of their own, a weight is multiplied by its V's. Such products may be of
// any size, so they are relative to a second reference of their row, kept as log2 of what O is
// to be multiplied by: weights in fp16 then have the bits that they have without scales.
//
// Tile at d128: 16 KiB, 1,250 clocks of HBM for one of an H100's multiprocessors.
#pragma once

#include "cuda/sm90/decode/attention.cuh"

namespace quire::cuda::sm90 {

template <class C>
__device__ __forceinline__ void DecodeAttention<C>::attend_byte_tile(int first, State& state) {
  constexpr bool kValuesLate = C::kRows >= 32 || C::kCtas == 4;
  const bool masked = !all_visible(first);
  // Opaque: addresses are computed here, not ahead of the loop and then kept in registers.
  lane_ = static_cast<int>(ptx::opaque(static_cast<std::uint32_t>(lane_)));
  const int key = key_of(0);
  const auto scales_of_tile = [&] {
    const float* scales = shared_.token_scales[tile_.index];
    return make_float2(scales[key], scales[key + 8]);
  };
  float2 key_scales = make_float2(1.0F, 1.0F);
  Scores s;
  std::uint32_t unmapped;
  {
    ByteKeys<C::kHeadSize> keys;
    tile_.wait_full(shared_.tile_barriers);
    keys.load(tile_address(), warp_, lane_);
    if (p_.k.token_scales != nullptr) key_scales = scales_of_tile();
    unmapped = shared_.unmapped[tile_.index];
    give_tile_back();
    if (masked) clear_values(first);
    multiply_byte_keys(keys, s);
  }
  if (kValuesLate) {
    ptx::wgmma::wait<0>();
    ptx::wgmma::keep(s);
  }
  ByteValues<C::kHeadSize> values;
  tile_.wait_full(shared_.tile_barriers);
  values.load(tile_address(), warp_, lane_);
  if (scales_values()) value_scales_ = scales_of_tile();
  give_tile_back();
  if (!kValuesLate) {
    ptx::wgmma::wait<0>();
    ptx::wgmma::keep(s);
  }
  scale_scores(key_scales, s);
  if (masked) mask(first, s);
  if (unmapped != 0) set_unmapped_apart(unmapped, s);
  soften(s, state);
  multiply_byte_values(values, state);
  weights_ ^= 1;
}

// Without waiting for the result.
template <class C>
__device__ __forceinline__ void DecodeAttention<C>::multiply_byte_keys(
    const ByteKeys<C::kHeadSize>& keys, Scores& s) const {
  constexpr int kSteps = ByteKeys<C::kHeadSize>::kWords;
  std::uint32_t a[kSteps][4];
  keys.widen(p_.k.dtype, a);
  ptx::wgmma::fence();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    ptx::wgmma::multiply<ptx::Half, C::kRows, 0>(
        s, a[i], ptx::wgmma::swizzled(query_, i / 4 * C::kRows * 128 + i % 4 * 32, 1024), i > 0);
  }
  ptx::wgmma::commit();
}

template <class C>
__device__ __forceinline__ void DecodeAttention<C>::multiply_byte_values(
    const ByteValues<C::kHeadSize>& values, State& state) const {
  using Values = ByteValues<C::kHeadSize>;
  const std::uint32_t weights = ptx::wgmma::descriptor_low(weights_address(), 128);
  std::uint32_t a[Values::kSteps][Values::kColumns][4];
  values.widen(p_.v.dtype, a);
  ptx::wgmma::fence();
#pragma unroll
  for (int i = 0; i < Values::kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < Values::kColumns; ++h) {
      ptx::wgmma::multiply<ptx::Half, C::kRows, 1>(
          state.o[h], a[i][h], ptx::wgmma::unswizzled(weights, i * 256, 1024), true);
    }
  }
  ptx::wgmma::commit();
  ptx::wgmma::wait<0>();
#pragma unroll
  for (int h = 0; h < C::kColumns; ++h) ptx::wgmma::keep(state.o[h]);
}

template <class C>
__device__ __forceinline__ void DecodeAttention<C>::scale_scores(float2 key_scales,
                                                                 Scores& s) const {
#pragma unroll
  for (int g = 0; g < C::kRows / 8; ++g) {
    const float2 factors = *reinterpret_cast<const float2*>(table_->score_factors + row_of(4 * g));
    s[4 * g] *= factors.x * key_scales.x;
    s[4 * g + 1] *= factors.y * key_scales.x;
    s[4 * g + 2] *= factors.x * key_scales.y;
    s[4 * g + 3] *= factors.y * key_scales.y;
  }
}

// weigh(), with tokens' scales of V. The product is taken of the scale itself, which may have a
// sign or be NaN.
template <class C>
__device__ __forceinline__ bool DecodeAttention<C>::weigh_scaled(
    const Scores& s, const State& state, float (&sum)[State::kOwnRows]) const {
  const float scales[2] = {value_scales_.x, value_scales_.y};
  const float log2_scales[2] = {log2_approx(fabsf(scales[0])), log2_approx(fabsf(scales[1]))};
  const std::uint32_t to = own_weights();
  float most = 0.0F;
#pragma unroll
  for (int g = 0; g < C::kRows / 8; ++g) {
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = weight_log2(s[4 * g + e], state.reference[2 * g + e % 2]);
      const float y = x - value_log2(row_of(4 * g + e));
      most = fmaxf(most, fmaxf(x, y + log2_scales[e / 2]));
      w[e] = ptx::exp2_approx(y) * scales[e / 2];
      if (e < 2) sum[2 * g + e] = ptx::exp2_approx(x);
      if (e >= 2) sum[2 * g + e - 2] += ptx::exp2_approx(x);
    }
    store_weights(to, g, w);
  }
  return most > kMostWeightLog2;
}

// The second reference, for those scores that weights are relative to now. To the change of log2 of
// what O is relative to it adds its own.
template <class C>
__device__ __forceinline__ void DecodeAttention<C>::find_value_log2(
    const Scores& s, const State& state, float (&log2_change)[State::kOwnRows]) {
  constexpr float kLeast = -60.0F;  // far from where weights without their scales would overflow
  const float log2_scales[2] = {log2_approx(fabsf(value_scales_.x)),
                                log2_approx(fabsf(value_scales_.y))};
  float(&maxima)[kWarpgroupWarps][C::kRows] = shared_.sum;
  Team::sync();  // all have read the scores' maxima
#pragma unroll
  for (int i = 0; i < State::kOwnRows; ++i) {
    const int element = i / 2 * 4 + i % 2;
    float max = -INFINITY;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float x = (s[element + 2 * j] - state.reference[i]) * to_log2_ + log2_scales[j];
      max = fmaxf(max, x);
    }
    for (int d = 4; d < 32; d *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, d));
    if (lane_ < 4) maxima[warp_][row_of(element)] = max;
  }
  Team::sync();
#pragma unroll
  for (int i = 0; i < State::kOwnRows; ++i) {
    const int row = row_of(i / 2 * 4 + i % 2);
    const float max =
        fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row]));
    const float before = value_log2(row);
    const float now = fmaxf(fmaxf(max, before + log2_change[i]), kLeast);
    log2_change[i] += before - now;
    __syncwarp();
    if (lane_ < 4) value_log2(row) = now;
    __syncwarp();
  }
}

}  // namespace quire::cuda::sm90
