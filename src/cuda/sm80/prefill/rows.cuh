// A warp's rows of the prefill kernel, in registers: scores, the running softmax, O. A thread holds
// two rows of each 16-row tile, two columns of each 8, as tensor cores lay them out.
#pragma once

#include "cuda/kernel/score_mod.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm80/prefill/loader.cuh"

namespace quire::cuda::sm80 {

// Out of line, four scores at a time: ALiBi and query-query bias are rare, their code is long.
template <int kRows>
__device__ __noinline__ float4 modify_scores(const KernelParams& p, const RowTable<kRows>& rows,
                                             const WorkTile& tile, int row, int key, float4 s) {
  return make_float4(modify_score<FloatOps>(p, rows, tile, row, key, s.x),
                     modify_score<FloatOps>(p, rows, tile, row, key + 1, s.y),
                     modify_score<FloatOps>(p, rows, tile, row + 8, key, s.z),
                     modify_score<FloatOps>(p, rows, tile, row + 8, key + 1, s.w));
}

template <class C>
class PrefillRows : protected PrefillLoader<C> {
 protected:
  using Base = PrefillLoader<C>;
  using Base::lane;
  using Base::p_;
  using Base::shared_;
  using Base::warp;

  static constexpr int kNTiles = C::kStepKeys / 8;
  static constexpr int kColumnTiles = C::kHeadSizeV / 8;
  using Scores = float[C::kMTiles][kNTiles][4];
  using Weights = std::uint32_t[C::kMTiles][C::kStepKeys / 16][4];  // P as the A operand

  __device__ __forceinline__ PrefillRows(const KernelParams& p, char* memory) : Base(p, memory) {
    const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
  }

  static __device__ __forceinline__ int warp_row() { return warp() * 16 * C::kMTiles; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[mt][n][e] = 0.0F;
      }
      max_[mt][0] = max_[mt][1] = -INFINITY;
      sum_[mt][0] = sum_[mt][1] = 0.0F;
    }
    if constexpr (C::kUnmappedApart) {
      __syncwarp();
      const int row = lane();
      if (row < 16 * C::kMTiles) {
        shared_.unmapped_max[warp_row() + row] = -INFINITY;
        shared_.unmapped_sum[warp_row() + row] = 0.0F;
      }
      __syncwarp();
    }
  }

  // Multiplies each key's column of S or P.
  __device__ __forceinline__ void scale_columns(const float* scales, Scores& s) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 scale =
          *reinterpret_cast<const float2*>(scales + ptx::fragment_column(lane()) + n * 8);
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] *= e % 2 == 0 ? scale.x : scale.y;
      }
    }
  }

  // S -> P in place; updates (max_, sum_) and perhaps o_. All rows of a thread together, so that
  // their chains of dependent operations overlap.
  __device__ __forceinline__ void softmax(Scores& s) {
    const float to_log2 = C::kScoreMod ? kLog2E : score_scale_ * kLog2E;
    float top[C::kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even = s[mt][0][2 * h];
        float odd = s[mt][0][2 * h + 1];
#pragma unroll
        for (int n = 1; n < kNTiles; ++n) {
          even = fmaxf(even, s[mt][n][2 * h]);
          odd = fmaxf(odd, s[mt][n][2 * h + 1]);
        }
        top[mt][h] = fmaxf(even, odd);
      }
    }
    bool rare = false;
#pragma unroll
    for (int d = 1; d <= 2; d *= 2) {
#pragma unroll
      for (int i = 0; i < C::kMTiles * 2; ++i) {
        top[i / 2][i % 2] = fmaxf(top[i / 2][i % 2], __shfl_xor_sync(~0U, top[i / 2][i % 2], d));
      }
    }
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const float max = max_[i / 2][i % 2];
      rare |= (top[i / 2][i % 2] - max) * to_log2 > kSlack || !(fabsf(max) * to_log2 < kHuge);
    }
    if (__any_sync(~0U, rare)) rebase(top, to_log2, s);
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shift = scaled_shift(max_[mt][h], to_log2);
        float even = 0.0F;
        float odd = 0.0F;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          s[mt][n][2 * h] = ptx::exp2_approx(fmaf(s[mt][n][2 * h], to_log2, -shift));
          s[mt][n][2 * h + 1] = ptx::exp2_approx(fmaf(s[mt][n][2 * h + 1], to_log2, -shift));
          even += s[mt][n][2 * h];
          odd += s[mt][n][2 * h + 1];
        }
        sum_[mt][h] += even + odd;
      }
    }
  }

  // What P's exponents are relative to, max_, need not be the maximum: a row moves it when P would
  // pass 2^kSlack, so O is seldom rescaled. Each row decides for itself.
  static constexpr float kSlack = 8.0F;
  // From here on rounding the shift would move exponents by more than a sixteenth.
  static constexpr float kHuge = 1e6F;

  // 0 for a row that has seen nothing yet, and where rebase() has subtracted already.
  static __device__ __forceinline__ float scaled_shift(float max, float to_log2) {
    const float shift = max * to_log2;
    return fabsf(shift) < kHuge ? shift : 0.0F;
  }

  // Moves max_ where `top` has passed it by far; subtracts it from logits near the end of fp32's
  // range before anything can overflow.
  __device__ __forceinline__ void rebase(const float (&top)[C::kMTiles][2], float to_log2,
                                         Scores& s) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Without branches: they would cost registers.
        const float before = max_[mt][h];
        const bool moves = (top[mt][h] - before) * to_log2 > kSlack;
        const float max = moves ? top[mt][h] : before;
        const float alpha = moves ? ptx::exp2_approx((before - max) * to_log2) : 1.0F;
        const bool huge = max != -INFINITY && !(fabsf(max) * to_log2 < kHuge);
        const float drop = huge ? max : 0.0F;
        max_[mt][h] = max;
        sum_[mt][h] *= alpha;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          o_[mt][n][2 * h] *= alpha;
          o_[mt][n][2 * h + 1] *= alpha;
        }
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          s[mt][n][2 * h] -= drop;
          s[mt][n][2 * h + 1] -= drop;
        }
      }
    }
  }

  // To natural logits, with soft cap, ALiBi and query-query bias.
  __device__ __forceinline__ void modify(const Split& split, int first, Scores& s) {
    if (p_.layer.alibi_slopes == nullptr && p_.batch.qq_bias == nullptr) {
      // cap * tanh(x): absolute error about 1e-7 of the cap, unlike tanh.approx's 5e-4.
      const float cap = p_.layer.soft_cap;
      // Finite where a denormal cap's inverse is not: a score of 0 stays 0.
      float in = score_scale_ * score::inverse_of_cap(cap) * (2.0F * kLog2E);
      if (in > 3.4e38F) in = 3.4e38F;
#pragma unroll
      for (int i = 0; i < C::kMTiles * kNTiles * 4; ++i) {
        float& x = s[i / (kNTiles * 4)][i / 4 % kNTiles][i % 4];
        x = fmaf(-2.0F * cap, ptx::reciprocal_approx(ptx::exp2_approx(x * in) + 1.0F), cap);
      }
      return;
    }
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      const int row = warp_row() + mt * 16 + ptx::fragment_row(lane());
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        float(&x)[4] = s[mt][n];
        const float4 y = modify_scores(p_, shared_.rows, split.tile, row,
                                       first + n * 8 + ptx::fragment_column(lane()),
                                       make_float4(x[0] * score_scale_, x[1] * score_scale_,
                                                   x[2] * score_scale_, x[3] * score_scale_));
        x[0] = y.x;
        x[1] = y.y;
        x[2] = y.z;
        x[3] = y.w;
      }
    }
  }

  // Keys [first + begin, first + end) as bits.
  static __device__ __forceinline__ std::uint64_t key_bits(int begin, int end) {
    begin = min(max(begin, 0), C::kStepKeys);
    end = min(max(end, begin), C::kStepKeys);
    // Shifted in two steps: by 64 at once is undefined.
    return ~(~std::uint64_t{0} << (end / 2) << (end - end / 2)) &
           (~std::uint64_t{0} << (begin / 2) << (begin - begin / 2));
  }

  __device__ __forceinline__ void mask(int first, Scores& s) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int4 visible =
            shared_.rows.visible[warp_row() + mt * 16 + h * 8 + ptx::fragment_row(lane())];
        const std::uint64_t seen = (key_bits(visible.x - first, visible.y - first) |
                                    key_bits(visible.z - first, visible.w - first)) >>
                                   ptx::fragment_column(lane());
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((seen >> (n * 8 + e) & 1) == 0) s[mt][n][2 * h + e] = -INFINITY;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void pack(const Scores& s, Weights& weights) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int k = 0; k < C::kStepKeys / 16; ++k) {
        weights[mt][k][0] = C::Type::pack(s[mt][2 * k][0], s[mt][2 * k][1]);
        weights[mt][k][1] = C::Type::pack(s[mt][2 * k][2], s[mt][2 * k][3]);
        weights[mt][k][2] = C::Type::pack(s[mt][2 * k + 1][0], s[mt][2 * k + 1][1]);
        weights[mt][k][3] = C::Type::pack(s[mt][2 * k + 1][2], s[mt][2 * k + 1][3]);
      }
    }
  }

  float score_scale_;
  float o_[C::kMTiles][kColumnTiles][4];
  float max_[C::kMTiles][2];
  float sum_[C::kMTiles][2];
};

}  // namespace quire::cuda::sm80
