// Where an item is cut, each CTA leaves its rows' (O, m, l) as a partial in global memory. The CTA that
// comes last (one counter an item, put back to 0) combines all partials in key order and writes.
#pragma once

#include <cstdint>

#include "cuda/kernel/epilogue.cuh"
#include "cuda/kernel/work_iterator.cuh"
#include "cuda/ptx/atomic.cuh"

namespace quire::cuda {

// `kPartsAhead`: parts that a fold of many loads together; as many as there are registers for.
template <class Team, int kRows, int kPartsAhead = 8>
class SplitCombiner {
 public:
  struct Shared {
    std::uint8_t parts[kMaxGrid];
    int last;
  };

  __device__ SplitCombiner(const KernelParams& p, const Epilogue<Team, kRows>& epilogue,
                           Shared& shared)
      : p_(p), epilogue_(epilogue), shared_(shared) {}

  __device__ Result slot(std::int32_t cta, std::int32_t k) const {
    const ScheduleView& s = p_.schedule;
    float* memory = s.slots + (std::int64_t{cta} * s.slots_per_cta + k) * s.slot_floats;
    const int pitch = static_cast<int>(s.slot_floats / kRows) - 2;
    return {memory, memory + std::int64_t{kRows} * pitch,
            memory + std::int64_t{kRows} * (pitch + 1), pitch};
  }

  __device__ __forceinline__ void keep(const Segment& segment, const Result& result,
                                       const Result& to) {
    const int groups = (epilogue_.columns() + 3) / 4;
#pragma unroll 4
    for (int i = Team::thread(); i < segment.tile.rows * groups; i += Team::kSize) {
      const int r = i / groups;
      const int c = i % groups * 4;
      *reinterpret_cast<float4*>(to.o + std::int64_t{r} * to.pitch + c) =
          *reinterpret_cast<const float4*>(result.o + std::int64_t{r} * result.pitch + c);
    }
    for (int r = Team::thread(); r < segment.tile.rows; r += Team::kSize) {
      to.max[r] = result.max[r];
      to.sum[r] = result.sum[r];
    }
  }

  // After this CTA's slots of an item are written: if all others' are too, folds and writes.
  __device__ __forceinline__ void arrive(const Sharers& sharers, const Segment& segment) {
    Team::sync();
    if (Team::thread() == 0) {
      std::int32_t* counter = p_.schedule.arrivals + sharers.first;
      const bool is_last = ptx::count_arrival(counter) == sharers.count - 1;
      if (is_last) *counter = 0;
      shared_.last = is_last ? 1 : 0;
    }
    Team::sync();
    if (shared_.last == 0) return;
    const std::int32_t count = sharers.last + 1 - sharers.first;
    if (!p_.layer.batch_invariant && count > kAhead && count == sharers.count) {
      fold_rows(segment, sharers.first, count);
      return;
    }
    for (std::int32_t c = sharers.first + Team::thread(); c <= sharers.last; c += Team::kSize) {
      shared_.parts[c - sharers.first] =
          c == sharers.first ? 1 : static_cast<std::uint8_t>(p_.schedule.starts[c].parts);
    }
    Team::sync();
    fold_slots(segment, sharers.first, sharers.last);
  }

 private:
  // Four columns of a row of a slot.
  struct Part {
    float max;
    float sum;
    float4 o;
  };
  static constexpr int kAhead = 6;

  static __device__ __forceinline__ Part load_part(const Result& from, int r, int c) {
    const auto* o = reinterpret_cast<const float4*>(from.o + std::int64_t{r} * from.pitch + c);
    return {__ldcg(from.max + r), __ldcg(from.sum + r), __ldcg(o)};
  }

  __device__ __forceinline__ void fold_slots(const Segment& segment, std::int32_t first,
                                             std::int32_t last) {
    const int groups = (epilogue_.columns() + 7) / 8 * 2;
    const int work = segment.tile.rows * groups;
#pragma unroll 1
    for (int i = Team::thread(); i - Team::thread() % 32 < work; i += Team::kSize) {
      const int r = i / groups;
      const int c = i % groups * 4;
      Fold fold;
      float4 o = make_float4(0, 0, 0, 0);
      if (i < work) fold_columns(first, last, r, c, &fold, &o);
      finish_pair(segment.tile, r, c, i < work, fold, o);
    }
  }

  // The same of many CTAs that left one part each. A warp a row: while the first parts' columns are
  // on their way its lanes find the weights together. Then each lane sums up its own columns.
  __device__ __forceinline__ void fold_rows(const Segment& segment, std::int32_t first,
                                            std::int32_t count) const {
    const int lane = Team::thread() % 32;
    const int blocks = (epilogue_.columns() + 127) / 128;
#pragma unroll 1
    for (int i = Team::thread() / 32; i < segment.tile.rows * blocks; i += Team::kSize / 32) {
      const int r = i / blocks;
      const int c = (i - r * blocks) * 128 + lane * 4;
      Fold fold;
      float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (std::int32_t base = 0; base < count; base += 32) {
        float max = -INFINITY;
        float sum = 0.0F;
        if (base + lane < count) {
          const Result part = part_of(first, base + lane);
          max = __ldcg(part.max + r);
          sum = __ldcg(part.sum + r);
        }
        fold_32(first, base, min(count - base, 32), r, c, max, sum, &fold, &o);
      }
      for (int d = 16; d > 0; d /= 2) fold.sum += __shfl_xor_sync(~0U, fold.sum, d);
      finish_pair(segment.tile, r, c, c < epilogue_.columns(), fold, o);
    }
  }

  // Folds in `count` parts from `base` on, of which lane i knows maximum and sum of the i-th. Leaves
  // the sum spread over the lanes.
  __device__ __forceinline__ void fold_32(std::int32_t first, std::int32_t base, int count, int r,
                                          int c, float max, float sum, Fold* fold,
                                          float4* o) const {
    float weight = 0.0F;
#pragma unroll 1
    for (int j = 0; j < count; j += kPartsAhead) {
      float4 part[kPartsAhead];
#pragma unroll
      for (int u = 0; u < kPartsAhead; ++u) {
        part[u] = make_float4(0, 0, 0, 0);
        if (j + u < count && c < epilogue_.columns()) {
          const Result from = part_of(first, base + j + u);
          part[u] =
              __ldcg(reinterpret_cast<const float4*>(from.o + std::int64_t{r} * from.pitch + c));
        }
      }
      if (j == 0) {
        float most = max;
        for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0U, most, d));
        most = fmaxf(most, fold->max);
        const float shift = semantics::softmax_shift(most);
        const float before = expf(fold->max - shift);
        weight = expf(max - shift);
        fold->max = most;
        fold->sum = fmaf(sum, weight, fold->sum * before);
        *o = make_float4(o->x * before, o->y * before, o->z * before, o->w * before);
      }
#pragma unroll
      for (int u = 0; u < kPartsAhead; ++u) {
        const float w = __shfl_sync(~0U, weight, j + u);
        *o = make_float4(fmaf(part[u].x, w, o->x), fmaf(part[u].y, w, o->y),
                         fmaf(part[u].z, w, o->z), fmaf(part[u].w, w, o->w));
      }
    }
  }

  // The i-th part from CTA `first` on, which began the item.
  __device__ __forceinline__ Result part_of(std::int32_t first, std::int32_t i) const {
    return slot(first + i, i == 0 ? 0 : 1);
  }

  // Two threads' columns are stored together. All threads of a warp.
  __device__ __forceinline__ void finish_pair(const Tile& tile, int r, int c, bool exists,
                                              const Fold& fold, const float4& o) const {
    const float4 other = make_float4(__shfl_down_sync(~0U, o.x, 1), __shfl_down_sync(~0U, o.y, 1),
                                     __shfl_down_sync(~0U, o.z, 1), __shfl_down_sync(~0U, o.w, 1));
    if (exists && c % 8 == 0) epilogue_.finish(tile, r, c, fold.max, fold.sum, o, other);
  }

  __device__ __forceinline__ void fold_columns(std::int32_t first, std::int32_t last, int r, int c,
                                               Fold* fold, float4* o) const {
    // Several CTAs' first parts are loaded together: one after the other, latency would add up.
#pragma unroll 1
    for (std::int32_t base = first; base <= last; base += kAhead) {
      Part part[kAhead];
      int parts[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const std::int32_t cta = base + u;
        parts[u] = cta <= last ? shared_.parts[cta - first] : 0;
        if (parts[u] > 0) part[u] = load_part(slot(cta, cta == first ? 0 : 1), r, c);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (parts[u] == 0) continue;
        if (base + u == first) {
          *fold = {part[u].max, part[u].sum};
          *o = part[u].o;
          continue;
        }
        for (int k = 1;; ++k) {
          fold->add(part[u].max, part[u].sum);
          *o = fold->value(*o, part[u].o);
          if (k == parts[u]) break;
          part[u] = load_part(slot(base + u, k + 1), r, c);
        }
      }
    }
  }

  const KernelParams& p_;
  const Epilogue<Team, kRows>& epilogue_;
  Shared& shared_;
};

}  // namespace quire::cuda
