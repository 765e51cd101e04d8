// Where an item is cut, each CTA leaves its rows' (O, m, l) as a partial in global memory. The CTA
// that comes last (one counter an item, put back to 0) combines all partials in key order and
// writes.
#pragma once

#include <cstdint>

#include "cuda/kernel/epilogue.cuh"
#include "cuda/kernel/work_iterator.cuh"
#include "cuda/ptx/atomic.cuh"

namespace quire::cuda {

// Where CTA `cta` leaves partial `k`.
template <int kRows>
__device__ __forceinline__ PartialRows partial_rows(const ScheduleView& s, std::int32_t cta,
                                                    std::int32_t k) {
  float* memory = s.partials + (std::int64_t{cta} * s.partials_per_cta + k) * s.partial_floats;
  const int pitch = static_cast<int>(s.partial_floats / kRows) - 2;
  return {memory, memory + std::int64_t{kRows} * pitch, memory + std::int64_t{kRows} * (pitch + 1),
          pitch};
}

// `kPartialsAhead`: partials that combine_rows() loads together; as many as there are registers
// for.
template <class Team, int kRows, int kPartialsAhead = 8>
class SplitCombiner {
 public:
  struct Shared {
    std::uint8_t num_partials[kMaxGrid];
    int last;
  };

  __device__ SplitCombiner(const KernelParams& p, const Epilogue<Team, kRows>& epilogue,
                           Shared& shared)
      : p_(p), epilogue_(epilogue), shared_(shared) {}

  __device__ PartialRows partial(std::int32_t cta, std::int32_t k) const {
    return partial_rows<kRows>(p_.schedule, cta, k);
  }

  __device__ __forceinline__ void store_partial(const Split& split, const PartialRows& result,
                                                const PartialRows& to) {
    const int pieces = (epilogue_.columns() + 3) / 4;
#pragma unroll 4
    for (int i = Team::thread(); i < split.tile.rows * pieces; i += Team::kSize) {
      const int r = i / pieces;
      const int c = i % pieces * 4;
      *reinterpret_cast<float4*>(to.o + std::int64_t{r} * to.pitch + c) =
          *reinterpret_cast<const float4*>(result.o + std::int64_t{r} * result.pitch + c);
    }
    for (int r = Team::thread(); r < split.tile.rows; r += Team::kSize) {
      to.max[r] = result.max[r];
      to.sum[r] = result.sum[r];
    }
  }

  // After this CTA's partials of an item are written: if all others' are too, combines and writes.
  __device__ __forceinline__ void combine_if_last(const ItemCtas& item_ctas, const Split& split) {
    const std::int32_t step = p_.schedule.header->cta_step;
    Team::sync();
    if (Team::thread() == 0) {
      std::int32_t* counter = p_.schedule.arrivals + item_ctas.first;
      const bool is_last = ptx::count_arrival(counter) == item_ctas.count - 1;
      if (is_last) *counter = 0;
      shared_.last = is_last ? 1 : 0;
    }
    Team::sync();
    if (shared_.last == 0) return;
    const std::int32_t count = (item_ctas.last - item_ctas.first) / step + 1;
    if (!p_.layer.batch_invariant && count * step > kAhead && count == item_ctas.count) {
      combine_rows(split, item_ctas.first, step, count);
      return;
    }
    for (std::int32_t c = item_ctas.first + Team::thread(); c <= item_ctas.last; c += Team::kSize) {
      shared_.num_partials[c - item_ctas.first] =
          c == item_ctas.first ? 1
                               : static_cast<std::uint8_t>(p_.schedule.work_ranges[c].num_partials);
    }
    Team::sync();
    combine_all(split, item_ctas.first, item_ctas.last);
  }

 private:
  // Four columns of a row of a partial.
  struct Columns {
    float max;
    float sum;
    float4 o;
  };
  static constexpr int kAhead = kPartialsAhead < 6 ? 1 : 6;

  static __device__ __forceinline__ Columns load_partial(const PartialRows& from, int r, int c) {
    const auto* o = reinterpret_cast<const float4*>(from.o + std::int64_t{r} * from.pitch + c);
    return {__ldcg(from.max + r), __ldcg(from.sum + r), __ldcg(o)};
  }

  __device__ __forceinline__ void combine_all(const Split& split, std::int32_t first,
                                              std::int32_t last) {
    const int pieces = (epilogue_.columns() + 7) / 8 * 2;
    const int work = split.tile.rows * pieces;
#pragma unroll 1
    for (int i = Team::thread(); i - Team::lane() < work; i += Team::kSize) {
      const int r = i / pieces;
      const int c = i % pieces * 4;
      Combine combine;
      float4 o = make_float4(0, 0, 0, 0);
      if (i < work) combine_columns(first, last, r, c, &combine, &o);
      normalise_pair(split.tile, r, c, i < work, combine, o);
    }
  }

  // The same of many CTAs that left one partial each. A warp a row: while the first partials'
  // columns are on their way its lanes find the weights together. Then each lane sums up its own
  // columns.
  __device__ __forceinline__ void combine_rows(const Split& split, std::int32_t first,
                                               std::int32_t step, std::int32_t count) const {
    const int lane = Team::lane();
    const int blocks = (epilogue_.columns() + 127) / 128;
#pragma unroll 1
    for (int i = Team::warp(); i < split.tile.rows * blocks; i += Team::kSize / 32) {
      const int r = i / blocks;
      const int c = (i - r * blocks) * 128 + lane * 4;
      Combine combine;
      float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (std::int32_t base = 0; base < count; base += 32) {
        float max = -INFINITY;
        float sum = 0.0F;
        if (base + lane < count) {
          const PartialRows from = partial_of(first, step, base + lane);
          max = __ldcg(from.max + r);
          sum = __ldcg(from.sum + r);
        }
        combine_32(first, step, base, min(count - base, 32), r, c, max, sum, &combine, &o);
      }
      for (int d = 16; d > 0; d /= 2) combine.sum += __shfl_xor_sync(~0U, combine.sum, d);
      normalise_pair(split.tile, r, c, c < epilogue_.columns(), combine, o);
    }
  }

  // Combines `count` partials from `base` on, of which lane i knows maximum and sum of the i-th.
  // Leaves the sum spread over the lanes.
  __device__ __forceinline__ void combine_32(std::int32_t first, std::int32_t step,
                                             std::int32_t base, int count, int r, int c, float max,
                                             float sum, Combine* combine, float4* o) const {
    float weight = 0.0F;
#pragma unroll 1
    for (int j = 0; j < count; j += kPartialsAhead) {
      float4 columns[kPartialsAhead];
#pragma unroll
      for (int u = 0; u < kPartialsAhead; ++u) {
        columns[u] = make_float4(0, 0, 0, 0);
        if (j + u < count && c < epilogue_.columns()) {
          const PartialRows from = partial_of(first, step, base + j + u);
          columns[u] =
              __ldcg(reinterpret_cast<const float4*>(from.o + std::int64_t{r} * from.pitch + c));
        }
      }
      if (j == 0) {
        float most = max;
        for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0U, most, d));
        most = fmaxf(most, combine->max);
        const float shift = semantics::softmax_shift(most);
        const float before = expf(combine->max - shift);
        weight = expf(max - shift);
        combine->max = most;
        combine->sum = fmaf(sum, weight, combine->sum * before);
        *o = make_float4(o->x * before, o->y * before, o->z * before, o->w * before);
      }
#pragma unroll
      for (int u = 0; u < kPartialsAhead; ++u) {
        const float w = __shfl_sync(~0U, weight, j + u);
        *o = make_float4(fmaf(columns[u].x, w, o->x), fmaf(columns[u].y, w, o->y),
                         fmaf(columns[u].z, w, o->z), fmaf(columns[u].w, w, o->w));
      }
    }
  }

  // The i-th partial from CTA `first` on, which began the item; every `step`-th CTA left one.
  __device__ __forceinline__ PartialRows partial_of(std::int32_t first, std::int32_t step,
                                                    std::int32_t i) const {
    return partial(first + i * step, i == 0 ? 0 : 1);
  }

  // Two threads' columns are stored together. All threads of a warp.
  __device__ __forceinline__ void normalise_pair(const WorkTile& tile, int r, int c, bool exists,
                                                 const Combine& combine, const float4& o) const {
    const float4 other = make_float4(__shfl_down_sync(~0U, o.x, 1), __shfl_down_sync(~0U, o.y, 1),
                                     __shfl_down_sync(~0U, o.z, 1), __shfl_down_sync(~0U, o.w, 1));
    if (exists && c % 8 == 0) epilogue_.normalise(tile, r, c, combine.max, combine.sum, o, other);
  }

  __device__ __forceinline__ void combine_columns(std::int32_t first, std::int32_t last, int r,
                                                  int c, Combine* combine, float4* o) const {
    // Several CTAs' first partials are loaded together: one after the other, latency would add up.
#pragma unroll 1
    for (std::int32_t base = first; base <= last; base += kAhead) {
      Columns columns[kAhead];
      int num_partials[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const std::int32_t cta = base + u;
        num_partials[u] = cta <= last ? shared_.num_partials[cta - first] : 0;
        if (num_partials[u] > 0)
          columns[u] = load_partial(partial(cta, cta == first ? 0 : 1), r, c);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (num_partials[u] == 0) continue;
        if (base + u == first) {
          *combine = {columns[u].max, columns[u].sum};
          *o = columns[u].o;
          continue;
        }
        for (int k = 1;; ++k) {
          combine->add(columns[u].max, columns[u].sum);
          *o = combine->value(*o, columns[u].o);
          if (k == num_partials[u]) break;
          columns[u] = load_partial(partial(base + u, k + 1), r, c);
        }
      }
    }
  }

  const KernelParams& p_;
  const Epilogue<Team, kRows>& epilogue_;
  Shared& shared_;
};

}  // namespace quire::cuda
