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

// n / d for n < 2^21: a product's error is less than half a d-th. (A division is some 20 instructions, one after the other.)
__device__ __forceinline__ int small_quotient(int n, int d) {
  return static_cast<int>((static_cast<float>(n) + 0.5F) *
                          ptx::reciprocal_approx(static_cast<float>(d)));
}

__device__ __forceinline__ std::int32_t position_of_row(const KernelParams& p, const WorkTile& tile,
                                                        int r) {
  return tile.first_pos + small_quotient(tile.first_sub + r, p.layer.group);
}

// Where what a row sees ends, where is_plain_causal().
__device__ __forceinline__ int causal_end(const KernelParams& p, const PrefillTask& task, int r) {
  const WorkTile& tile = task.split.tile;
  return r < tile.rows ? min(position_of_row(p, tile, r) + 1, task.keys.kv_len) : 0;
}

// What a row sees of the keys, as two spans (RowTable::visible has no room in shared memory here).
__device__ __forceinline__ int4 visible_of_row(const KernelParams& p, const PrefillTask& task,
                                               int r) {
  const WorkTile& tile = task.split.tile;
  if (r >= tile.rows) return make_int4(0, 0, 0, 0);
  if (p.schedule.shared_rows != nullptr) return make_int4(0, 0, tile.common[2], tile.common[3]);
  const std::int32_t position = position_of_row(p, tile, r);
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

// What a thread sees of one row's keys in a kv tile of up to 128: a bit for each of its columns, so
// that there is one way to mask for all masks.
class VisibleColumns {
 public:
  VisibleColumns() = default;
  // `column`: the thread's first.
  __device__ __forceinline__ VisibleColumns(const int4& visible, int first, int column)
      : bits_((before(visible.y - first, column) & ~before(visible.x - first, column)) |
              (before(visible.w - first, column) & ~before(visible.z - first, column))) {}
  __device__ __forceinline__ VisibleColumns(int begin, int end, int column)
      : bits_(before(end, column) & ~before(begin, column)) {}
  __device__ __forceinline__ bool has(int n) const { return (bits_ >> n & 1U) != 0; }

 private:
  // The columns of keys before `end`: of each eight keys, two at `column`.
  static __device__ __forceinline__ std::uint32_t before(int end, int column) {
    const int keys = min(::max(end, 0), 128);
    const int count = 2 * (keys / 8) + min(::max(keys % 8 - column, 0), 2);
    return count < 32 ? (1U << count) - 1U : ~0U;
  }
  std::uint32_t bits_;
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
  __device__ __forceinline__ void mask(const VisibleColumns (&visible)[2]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (!visible[i / 2 % 2].has(i / 4 * 2 + i % 2)) s[i] = -INFINITY;
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
    const bool moves[2] = {true, true};
    softmax(to_log2, moves, false, weights);
  }

  // The same by max as it is, without a look at the scores' maximum, which takes a quarter of
  // softmax()'s time and is seldom needed but in a row's first tiles. True: this thread has seen
  // that it is (see over_); then, if any thread has, the scores are to be found again for
  // softmax_again(). Else keep_sums() follows.
  __device__ __forceinline__ bool softmax_as_before(float to_log2,
                                                    std::uint32_t (&weights)[C::kKeys / 4]) {
    find_weights(to_log2, weights);
    over_[0] = added_[0] > kMostSum;
    over_[1] = added_[1] > kMostSum;
    return over_[0] || over_[1] || is_far(0, to_log2) || is_far(1, to_log2);
  }
  __device__ __forceinline__ void keep_sums() {
    sum[0] += added_[0];
    sum[1] += added_[1];
  }
  __device__ __forceinline__ void softmax_again(float to_log2,
                                                std::uint32_t (&weights)[C::kKeys / 4]) {
    // Of rows, not of threads.
    bool moves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t threads = __ballot_sync(~0U, over_[h]);
      moves[h] = (threads >> (ptx::opaque(threadIdx.x) % 32 / 4 * 4) & 0xFU) != 0;
    }
    softmax(to_log2, moves, true, weights);
  }

  // The sums of a row's four threads.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0U, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0U, sum[h], 2);
    }
  }

  // This thread's columns of O of row `h`, unnormalised, to a whole row, and from one.
  __device__ __forceinline__ void store(int h, float* to) const {
    to += ptx::fragment_column(static_cast<int>(ptx::opaque(threadIdx.x) % 32));
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(o[n * 4 + 2 * h], o[n * 4 + 2 * h + 1]);
    }
  }
  __device__ __forceinline__ void load(int h, const float* from) {
    from += ptx::fragment_column(static_cast<int>(ptx::opaque(threadIdx.x) % 32));
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; ++n) {
      const float2 loaded = *reinterpret_cast<const float2*>(from + n * 8);
      o[n * 4 + 2 * h] = loaded.x;
      o[n * 4 + 2 * h + 1] = loaded.y;
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
  // Where the maximum is not looked at, a row moves max when one of its threads has a larger sum of P
  // of a tile: then some P is larger than 2^kSlack, and if not, all are in the range of fp16.
  static constexpr float kMostSum = 8192.0F;
  static_assert(kMostSum / (C::kKeys / 4) >= 256.0F);
  // From here on rounding the shift would move exponents by more than a sixteenth.
  static constexpr float kHuge = 1e6F;

  __device__ __forceinline__ bool is_far(int h, float to_log2) const {
    return !(fabsf(max[h]) * to_log2 < kHuge);
  }

  // 0 for a row that has seen nothing yet, and where rebase() has subtracted already.
  __device__ __forceinline__ float shift(int h, float to_log2) const {
    return is_far(h, to_log2) ? 0.0F : max[h] * to_log2;
  }

  // `again`: rows move max as `over` says, but for those that are far.
  __device__ __forceinline__ void softmax(float to_log2, const bool (&over)[2], bool again,
                                          std::uint32_t (&weights)[C::kKeys / 4]) {
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
    bool moves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      moves[h] = again && !is_far(h, to_log2) ? over[h] : (top[h] - max[h]) * to_log2 > kSlack;
    }
    if (__any_sync(~0U, moves[0] || moves[1] || is_far(0, to_log2) || is_far(1, to_log2))) {
      rebase(top, moves, to_log2);
    }
    find_weights(to_log2, weights);
    keep_sums();
  }

  __device__ __forceinline__ void find_weights(float to_log2,
                                               std::uint32_t (&weights)[C::kKeys / 4]) {
    const float shifts[2] = {shift(0, to_log2), shift(1, to_log2)};
    added_[0] = added_[1] = 0.0F;
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const float x = ptx::exp2_approx(fmaf(s[i], to_log2, -shifts[i / 2 % 2]));
      const float y = ptx::exp2_approx(fmaf(s[i + 1], to_log2, -shifts[i / 2 % 2]));
      added_[i / 2 % 2] += x + y;
      weights[i / 2] = C::Type::pack(x, y);
    }
  }

  // Moves max of rows to `top`; subtracts it from the scores of rows near the end of fp32's range,
  // before anything can overflow.
  __device__ __forceinline__ void rebase(const float (&top)[2], const bool (&moves)[2],
                                         float to_log2) {
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      alpha[h] = moves[h] ? ptx::exp2_approx((max[h] - top[h]) * to_log2) : 1.0F;
      max[h] = moves[h] ? top[h] : max[h];
      sum[h] *= alpha[h];
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= alpha[i / 2 % 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (max[h] == -INFINITY || !is_far(h, to_log2)) continue;
#pragma unroll
      for (int n = 0; n < kScores / 2; ++n) s[n / 2 * 4 + 2 * h + n % 2] -= max[h];
    }
  }

  float added_[2];  // to sum by the tile at hand
  bool over_[2];    // softmax_as_before: the row has passed kMostSum
};

}  // namespace quire::cuda::sm90
