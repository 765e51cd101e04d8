// How an item that is cut among CTAs comes together, but in batch-invariant mode:
//
//   each CTA: (O, max, sum) of its kv tiles -> its partial in ScheduleView::awaited_partials
//   the CTA that has the last kv tiles, when its own work is done: waits for all partials of the
//   item, combines them in key order, writes the output
//
// Nothing says that a partial is there but its words themselves: they are kMissing, a NaN that no
// arithmetic gives, until they are written, and are put back when they have been read. So the fold
// takes as long as a store and a load through the L2 cache. (With a counter, whose last CTA
// combines, come a fence, an atomic and another load: 4 us of a launch of 20.)
//
// A CTA waits for CTAs of lower index only, which were started before it: also where few of the
// grid's CTAs are on the device at a time, those that are waited for make progress.
#pragma once

#include "cuda/ptx/atomic.cuh"
#include "cuda/sm90/decode/config.cuh"

namespace quire::cuda::sm90 {

// Where CTA `cta` leaves its partial of the item that it begins (k = 0) or found begun (1).
template <class C>
__device__ __forceinline__ PartialRows awaited_rows(const ScheduleView& s, std::int32_t cta,
                                                    std::int32_t k) {
  constexpr int kPitch = C::kHeadSize;
  float* memory = s.awaited_partials + (std::int64_t{cta} * 2 + k) * s.partial_floats;
  return {memory, memory + C::kRows * kPitch, memory + C::kRows * (kPitch + 1), kPitch};
}

__device__ __forceinline__ bool is_missing(float x) { return __float_as_uint(x) == kMissing; }
__device__ __forceinline__ bool is_missing(const float4& x) {
  return is_missing(x.x) || is_missing(x.y) || is_missing(x.z) || is_missing(x.w);
}
// As it may be stored: a NaN from V may have any bits.
__device__ __forceinline__ float not_missing(float x) {
  return __uint_as_float(min(__float_as_uint(x), kMissing - 1));
}
__device__ __forceinline__ float4 not_missing(const float4& x) {
  return make_float4(not_missing(x.x), not_missing(x.y), not_missing(x.z), not_missing(x.w));
}

template <class C>
class PartialFold {
 public:
  using Team = typename C::Team;

  __device__ __forceinline__ PartialFold(const KernelParams& p, const DecodeEpilogue<C>& epilogue,
                                         const PublishedSplit& last, std::int32_t cta_step)
      : p_(p),
        epilogue_(epilogue),
        split_(last.split),
        ctas_(last.item_ctas),
        step_(cta_step),
        count_((ctas_.last - ctas_.first) / step_ + 1),
        lane_(Team::lane()) {}

  // All threads of the team. Their partials are under way.
  __device__ __forceinline__ void run() const {
#pragma unroll 1
    for (int i = Team::warp(); i < split_.tile.rows * kBlocks; i += kWarpgroupWarps) {
      fold_row(i / kBlocks, i % kBlocks * kBlock + lane_ * 4);
    }
    Team::sync();  // all blocks of a row have read its states
    const int rows = split_.tile.rows;
#pragma unroll 1
    for (int i = Team::thread(); i < count_ * rows; i += Team::kSize) {
      if (!exists(i / rows)) continue;
      const PartialRows from = partial(i / rows);
      ptx::store_relaxed(from.max + i % rows, __uint_as_float(kMissing));
      ptx::store_relaxed(from.sum + i % rows, __uint_as_float(kMissing));
    }
  }

 private:
  static constexpr int kBlock = 128;  // columns of a warp
  static constexpr int kBlocks = (C::kHeadSize + kBlock - 1) / kBlock;
  // Partials whose columns are under way together; as many as there are registers for.
  static constexpr int kAhead = C::kCtas > 2 ? 4 : (C::kRows == 8 ? 12 : 6);

  // The i-th CTA of the item, and whether it has kv tiles of it.
  __device__ __forceinline__ std::int32_t cta(int i) const { return ctas_.first + i * step_; }
  __device__ __forceinline__ bool exists(int i) const {
    return i < count_ &&
           (i == 0 || count_ == ctas_.count || p_.schedule.work_ranges[cta(i)].num_partials > 0);
  }
  __device__ __forceinline__ PartialRows partial(int i) const {
    return awaited_rows<C>(p_.schedule, cta(i), i == 0 ? 0 : 1);
  }

  // Columns [c, c + 4) of a row, in each lane.
  __device__ __forceinline__ void fold_row(int r, int c) const {
    Combine combine;
    float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int base = 0; base < count_; base += 32) fold_32(base, r, c, &combine, &o);
    for (int d = 16; d > 0; d /= 2) combine.sum += __shfl_xor_sync(~0U, combine.sum, d);
    write(r, c, combine, o);
  }

  // Combines the partials from `base` on, at most 32, of which lane i finds the weight of the i-th.
  // Leaves the sum spread over the lanes.
  __device__ __forceinline__ void fold_32(int base, int r, int c, Combine* combine,
                                          float4* o) const {
    const std::uint32_t all = __ballot_sync(~0U, exists(base + lane_));
    const bool mine = ((all >> lane_) & 1U) != 0;
    float max = -INFINITY;
    float sum = 0.0F;
    float weight = 0.0F;
#pragma unroll 1
    for (int j = 0; j < 32 && (all >> j) != 0; j += kAhead) {
      float4 columns[kAhead];
#pragma unroll
      for (float4& column : columns) column = make_float4(0, 0, 0, 0);
      std::uint32_t missing = c < C::kHeadSize ? (all >> j) & ((1U << kAhead) - 1U) : 0U;
      bool state_missing = j == 0 && mine;
      while (__any_sync(~0U, missing != 0 || state_missing)) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (((missing >> u) & 1U) != 0) {
            columns[u] = ptx::load_relaxed(columns_of(base + j + u, r, c));
          }
        }
        if (state_missing) {
          const PartialRows from = partial(base + lane_);
          max = ptx::load_relaxed(from.max + r);
          sum = ptx::load_relaxed(from.sum + r);
          state_missing = is_missing(max) || is_missing(sum);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (!is_missing(columns[u])) missing &= ~(1U << u);
        }
      }
      if (j == 0) weight = rebase(max, sum, combine, o);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const float w = __shfl_sync(~0U, weight, j + u);
        *o = make_float4(fmaf(columns[u].x, w, o->x), fmaf(columns[u].y, w, o->y),
                         fmaf(columns[u].z, w, o->z), fmaf(columns[u].w, w, o->w));
        if (c < C::kHeadSize && ((all >> j >> u) & 1U) != 0) {
          const float missing_word = __uint_as_float(kMissing);
          ptx::store_relaxed(columns_of(base + j + u, r, c),
                             make_float4(missing_word, missing_word, missing_word, missing_word));
        }
      }
    }
  }

  __device__ __forceinline__ float4* columns_of(int i, int r, int c) const {
    const PartialRows rows = partial(i);
    return reinterpret_cast<float4*>(rows.o + r * rows.pitch + c);
  }

  // Takes the lanes' states in. The weight of the lane's partial.
  static __device__ __forceinline__ float rebase(float max, float sum, Combine* combine,
                                                 float4* o) {
    float most = max;
    for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0U, most, d));
    most = fmaxf(most, combine->max);
    const float shift = semantics::softmax_shift(most);
    const float before = expf(combine->max - shift);
    const float weight = expf(max - shift);
    combine->max = most;
    combine->sum = fmaf(sum, weight, combine->sum * before);
    *o = make_float4(o->x * before, o->y * before, o->z * before, o->w * before);
    return weight;
  }

  __device__ __forceinline__ void write(int r, int c, const Combine& combine,
                                        const float4& o) const {
    if (split_.tile.prefix_row < 0 && epilogue_.stores_pairs()) {
      const float scale = epilogue_.output_scale_of(r, combine.max, combine.sum, c == 0);
      if (c >= C::kHeadSize) return;
      const bool bf16 = p_.output_dtype == DType::kBFloat16;
      const float x[4] = {o.x * scale, o.y * scale, o.z * scale, o.w * scale};
      *reinterpret_cast<uint2*>(epilogue_.output_row(r) + c / 2) =
          bf16 ? make_uint2(ptx::BFloat16::pack(x[0], x[1]), ptx::BFloat16::pack(x[2], x[3]))
               : make_uint2(ptx::Half::pack(x[0], x[1]), ptx::Half::pack(x[2], x[3]));
      return;
    }
    // Two threads' columns are stored together.
    const float4 other = make_float4(__shfl_down_sync(~0U, o.x, 1), __shfl_down_sync(~0U, o.y, 1),
                                     __shfl_down_sync(~0U, o.z, 1), __shfl_down_sync(~0U, o.w, 1));
    if (c < C::kHeadSize && c % 8 == 0) {
      epilogue_.normalise(split_.tile, r, c, combine.max, combine.sum, o, other);
    }
  }

  const KernelParams& p_;
  const DecodeEpilogue<C>& epilogue_;
  const Split& split_;
  const ItemCtas ctas_;
  const std::int32_t step_;
  const std::int32_t count_;
  const int lane_;
};

}  // namespace quire::cuda::sm90
