// The rows of a consumer warpgroup, in registers: scores, the running softmax, O. A thread has two
// rows, h = 0 and 1, eight apart, and two columns of each eight: element i is of row i / 2 % 2 and
// column i / 4 * 8 + fragment_column(lane) + i % 2.
#pragma once

#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace quire::cuda::sm90 {

// Whether each row sees the keys from the tile's first on up to its own, and nothing else is to be
// known.
__device__ __forceinline__ bool is_plain_causal(const KernelParams& p) {
  const Mask& mask = p.layer.mask;
  return mask.causal && mask.window == WindowKind::kNone && p.batch.causal == nullptr &&
         p.batch.num_ranges == 0 && p.batch.visible_prefix_lens == nullptr &&
         !p.batch.has_positions() && p.schedule.shared_rows == nullptr;
}

// What a row sees of the keys, as two spans (RowTable::visible has no room in shared memory here).
__device__ __forceinline__ int4 visible_of_row(const KernelParams& p, const PrefillTask& task,
                                               int r) {
  const WorkTile& tile = task.split.tile;
  if (r >= tile.rows) return make_int4(0, 0, 0, 0);
  if (p.schedule.shared_rows != nullptr) return make_int4(0, 0, tile.common[2], tile.common[3]);
  const std::int32_t position = tile.first_pos + (tile.first_sub + r) / p.layer.group;
  if (is_plain_causal(p)) {
    return make_int4(0, 0, tile.kv_begin, min(position + 1, task.keys.kv_len));
  }
  const semantics::SequenceMask mask = sequence_mask(p.layer, p.batch, tile.seq, keys_of(p, tile));
  return visible_keys(clip(semantics::row_spans(mask, position), tile.kv_begin, task.keys.kv_len));
}

// Where what a row saw of a shared prefix is: row `r` of the prefix's own tile, or of one behind it.
struct PrefixRow {
  __device__ __forceinline__ PrefixRow(const KernelParams& p, const Split& split, int r) {
    const PrefixPartials& partials = p.schedule.prefix_partials;
    const RowPlace place = row_place(p, split.tile, split.head, r);
    const std::int64_t row = (split.tile.prefix_row + place.index) * p.layer.num_heads + place.head;
    o = partials.o + row * partials.pitch;
    max = partials.max + row * partials.passes;
    sum = partials.sum + row * partials.passes;
  }
  float* o;
  float* max;
  float* sum;
};

// The factor of O of row `r` of an item; writes its lse.
__device__ __forceinline__ float normalise_row(const KernelParams& p, const Split& split, int r,
                                               float max, float sum, bool writes_lse) {
  const bool has_sink = p.layer.sinks != nullptr;
  if (!has_sink && p.lse == nullptr) {
    // As below, in a few instructions: the end of an item is not overlapped with much.
    return max == -INFINITY && sum == sum ? 0.0F
                                          : value_of(p.v.scale) * ptx::reciprocal_approx(sum);
  }
  const RowPlace place = row_place(p, split.tile, split.head, r);
  const auto normalised = semantics::normalise(semantics::SoftmaxState<float>{max, sum}, has_sink,
                                               has_sink ? p.layer.sinks[place.head] : 0.0F);
  if (writes_lse && p.lse != nullptr && r < split.tile.rows) {
    p.lse[place.head * p.lse_head_stride + place.token * p.lse_token_stride] = normalised.lse;
  }
  return normalised.output_scale * value_of(p.v.scale);
}

// What a row sees of a kv tile of up to 255 keys, in one register: two spans, a byte an end. (The
// tiles' scores and O leave few registers.)
class VisibleKeys {
 public:
  VisibleKeys() = default;
  __device__ __forceinline__ VisibleKeys(const int4& visible, int first, int keys) {
    const auto clamp = [=](int key) {
      return static_cast<std::uint32_t>(min(::max(key - first, 0), keys));
    };
    ends_ =
        clamp(visible.x) | clamp(visible.y) << 8 | clamp(visible.z) << 16 | clamp(visible.w) << 24;
  }
  __device__ __forceinline__ VisibleKeys of_lane(int lane) const {
    VisibleKeys other;
    other.ends_ = __shfl_sync(~0U, ends_, lane);
    return other;
  }
  __device__ __forceinline__ int begin() const { return byte(2); }
  __device__ __forceinline__ int end() const { return byte(3); }
  __device__ __forceinline__ bool has_prefix() const { return byte(1) > byte(0); }
  // Behind the last key that it sees.
  __device__ __forceinline__ int last_end() const {
    return end() > begin() ? end() : (has_prefix() ? byte(1) : 0);
  }
  __device__ __forceinline__ bool sees(int key) const {
    return cuda::sees(make_int4(byte(0), byte(1), byte(2), byte(3)), key);
  }

 private:
  __device__ __forceinline__ int byte(int i) const {
    return static_cast<int>((ends_ >> (8 * i)) & 0xFFU);
  }
  std::uint32_t ends_;
};

template <class C>
class PrefillRows {
 public:
  static constexpr int kScores = C::kKeys / 2;
  static constexpr int kOutputs = C::kHeadSize / 2;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0F;
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0F;
  }

  __device__ __forceinline__ void apply(const SoftCap& cap) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = cap(s[i]);
  }

  // Scores of keys that a row does not see to -inf.
  __device__ __forceinline__ void mask(const VisibleKeys (&visible)[2]) {
    const int column = ptx::fragment_column(static_cast<int>(ptx::opaque(threadIdx.x) % 32));
    // Row by row: both at once would need more registers than there are.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const VisibleKeys& v = visible[h];
      if (__any_sync(~0U, v.has_prefix())) {
#pragma unroll
        for (int n = 0; n < kScores / 2; ++n) {
          if (!v.sees(column + n / 2 * 8 + n % 2)) s[n / 2 * 4 + 2 * h + n % 2] = -INFINITY;
        }
        continue;
      }
      const int end = v.end() - column;
#pragma unroll
      for (int n = 0; n < kScores / 2; ++n) {
        if (n / 2 * 8 + n % 2 >= end) s[n / 2 * 4 + 2 * h + n % 2] = -INFINITY;
      }
      if (__any_sync(~0U, v.begin() > 0)) {
        const int begin = v.begin() - column;
#pragma unroll
        for (int n = 0; n < kScores / 2; ++n) {
          if (n / 2 * 8 + n % 2 < begin) s[n / 2 * 4 + 2 * h + n % 2] = -INFINITY;
        }
      }
    }
  }

  // Unmapped keys, whose block does not exist, read as zeros: their score is 0 (NaN where the query
  // is not finite), their weight counts, their value does not. In fp16 they must not set the
  // maximum, or the weights of all other keys could underflow and the whole output with them (in
  // bf16 weights have the range of fp32). So those that rows see are taken out of the scores and
  // counted, in `count` of each row, as a state of its own with maximum 0. `boxes`: a bit for each
  // `box_keys` keys.
  __device__ __forceinline__ void set_unmapped_apart(std::uint32_t boxes, int box_keys,
                                                     float to_log2, float* count) {
    const int lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
    float added[2] = {0.0F, 0.0F};
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      if ((boxes >> (k * 16 / box_keys) & 1U) == 0) continue;
#pragma unroll
      for (int i = k * 8; i < k * 8 + 8; ++i) {
        added[i / 2 % 2] += ptx::exp2_approx(s[i] * to_log2);
        s[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      added[h] += __shfl_xor_sync(~0U, added[h], 1);
      added[h] += __shfl_xor_sync(~0U, added[h], 2);
      if (ptx::is_first_of_row(lane)) count[h * 8 + ptx::fragment_row(lane)] += added[h];
    }
  }

  // The states of the keys that were set apart, to those of the rows. max is in natural units here.
  __device__ __forceinline__ void combine_unmapped(const float* count) {
    const int lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float unmapped = count[h * 8 + ptx::fragment_row(lane)];
      if (unmapped == 0.0F) continue;
      Combine combine{max[h], sum[h]};
      combine.add(0.0F, unmapped);
      max[h] = combine.max;
      sum[h] = combine.sum;
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        if (i / 2 % 2 == h) o[i] *= combine.weight_before;
      }
    }
  }

  // S -> P, the A operand of the next product (16 keys are four words); updates max, sum and
  // perhaps O. `to_log2`: from scores to exponents of 2.
  __device__ __forceinline__ void softmax(float to_log2, std::uint32_t (&weights)[C::kKeys / 4]) {
    // Two chains a row: one would be 32 dependent instructions.
    float tops[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < kScores; ++i) tops[i % 4] = fmaxf(tops[i % 4], s[i]);
    float top[2] = {fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])};
#pragma unroll
    for (int d = 1; d <= 2; d *= 2) {
      top[0] = fmaxf(top[0], __shfl_xor_sync(~0U, top[0], d));
      top[1] = fmaxf(top[1], __shfl_xor_sync(~0U, top[1], d));
    }
    bool rare = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rare |= (top[h] - max[h]) * to_log2 > kSlack || !(fabsf(max[h]) * to_log2 < kHuge);
    }
    if (__any_sync(~0U, rare)) rebase(top, to_log2);
    const float shift[2] = {scaled_shift(max[0], to_log2), scaled_shift(max[1], to_log2)};
    float added[2] = {0.0F, 0.0F};
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const float x = ptx::exp2_approx(fmaf(s[i], to_log2, -shift[i / 2 % 2]));
      const float y = ptx::exp2_approx(fmaf(s[i + 1], to_log2, -shift[i / 2 % 2]));
      added[i / 2 % 2] += x + y;
      weights[i / 2] = C::Type::pack(x, y);
    }
    sum[0] += added[0];
    sum[1] += added[1];
  }

  // The sums of a row's four threads.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0U, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0U, sum[h], 2);
    }
  }

  // This thread's columns of O of row `h`, unnormalised, to a whole row,
  __device__ __forceinline__ void store(int h, float* to) const {
    to += ptx::fragment_column(static_cast<int>(ptx::opaque(threadIdx.x) % 32));
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(o[n * 4 + 2 * h], o[n * 4 + 2 * h + 1]);
    }
  }
  // or combined with what is there, of keys before.
  __device__ __forceinline__ void combine(int h, const float* from, const Combine& combine) {
    from += ptx::fragment_column(static_cast<int>(ptx::opaque(threadIdx.x) % 32));
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; ++n) {
      const float2 before = *reinterpret_cast<const float2*>(from + n * 8);
      o[n * 4 + 2 * h] = combine.value(before.x, o[n * 4 + 2 * h]);
      o[n * 4 + 2 * h + 1] = combine.value(before.y, o[n * 4 + 2 * h + 1]);
    }
  }

  float s[kScores];
  float o[kOutputs];
  float max[2];  // in units of the scores
  float sum[2];

 private:
  // What P's exponents are relative to, max, need not be the maximum: a row moves it when P would
  // pass 2^kSlack, so O is seldom rescaled (4 % of the time of a batch). Each row decides for
  // itself.
  static constexpr float kSlack = 8.0F;
  // From here on rounding the shift would move exponents by more than a sixteenth.
  static constexpr float kHuge = 1e6F;

  // 0 for a row that has seen nothing yet, and where rebase() has subtracted already.
  static __device__ __forceinline__ float scaled_shift(float max, float to_log2) {
    const float shift = max * to_log2;
    return fabsf(shift) < kHuge ? shift : 0.0F;
  }

  // Moves max of the rows that `top` has passed it by far of; subtracts it from the scores of rows
  // near the end of fp32's range, before anything can overflow.
  __device__ __forceinline__ void rebase(const float (&top)[2], float to_log2) {
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool moves = (top[h] - max[h]) * to_log2 > kSlack;
      alpha[h] = moves ? ptx::exp2_approx((max[h] - top[h]) * to_log2) : 1.0F;
      max[h] = moves ? top[h] : max[h];
      sum[h] *= alpha[h];
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= alpha[i / 2 % 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (max[h] == -INFINITY || fabsf(max[h]) * to_log2 < kHuge) continue;
#pragma unroll
      for (int n = 0; n < kScores / 2; ++n) s[n / 2 * 4 + 2 * h + n % 2] -= max[h];
    }
  }
};

}  // namespace quire::cuda::sm90
