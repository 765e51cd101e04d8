// What becomes of a segment's result, unnormalised rows (O, m, l) in shared memory:
//
//   a whole item             -> divided, scaled, written to output and lse
//   part of an item          -> a slot in global memory; the CTA that comes last (one counter an
//                               item, put back to 0) folds all slots in key order and writes
//
// What is written goes to the seeds, as it is, if the item is a shared prefix; and if its rows have
// seen a shared prefix before, their seeds are folded in.
//
// m is the maximum logit in natural units, l the sum of exp(S - m).
#pragma once

#include <cstdint>

#include "cuda/kernel/row_table.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/mma.cuh"
#include "semantics/quant.h"
#include "semantics/softmax_state.h"

namespace quire::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

// The result of a segment or chunk: rows of `pitch` floats.
struct Result {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  int pitch = 0;
};

// Running fold of parts in key order. Written out operation by operation: a fold gives the same
// bits wherever it is done.
struct Fold {
  float max = -INFINITY;
  float sum = 0.0F;
  float weight_before = 0.0F;
  float weight_part = 0.0F;
  __device__ void add(float part_max, float part_sum) {
    const float new_max = fmaxf(max, part_max);
    const float shift = semantics::softmax_shift(new_max);
    weight_before = expf(max - shift);
    weight_part = expf(part_max - shift);
    max = new_max;
    sum = __fmaf_rn(part_sum, weight_part, __fmul_rn(sum, weight_before));
  }
  __device__ float value(float before, float part) const {
    return __fmaf_rn(part, weight_part, __fmul_rn(before, weight_before));
  }
};

// In line but for finish(): around a call registers are set aside, in loops over keys too.
// `kPartsAhead`: parts that a fold of many loads together; as many as there are registers for.
template <int kRows, int kThreads, int kPartsAhead = 8>
class Finisher {
 public:
  struct Shared {
    std::uint8_t parts[kMaxGrid];
    int last;
  };

  // `columns`: of this pass, from column `first_column` of the head on.
  __device__ Finisher(const KernelParams& p, RowTable<kRows>& table, Shared& shared)
      : p_(p), table_(table), shared_(shared) {}

  __device__ void set_pass(int first_column, int columns) {
    first_column_ = first_column;
    columns_ = columns;
  }

  __device__ Result slot(std::int32_t cta, std::int32_t k) const {
    const ScheduleView& s = p_.schedule;
    float* memory = s.slots + (std::int64_t{cta} * s.slots_per_cta + k) * s.slot_floats;
    const int pitch = static_cast<int>(s.slot_floats / kRows) - 2;
    return {memory, memory + std::int64_t{kRows} * pitch,
            memory + std::int64_t{kRows} * (pitch + 1), pitch};
  }

  // The result of an item that is done, to its output rows.
  __device__ __forceinline__ void write(const Segment& segment, const Result& result) {
    const int groups = (columns_ + 7) / 8;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < segment.tile.rows * groups; i += kThreads) {
      const int r = i / groups;
      const int c = i % groups * 8;
      const auto* from =
          reinterpret_cast<const float4*>(result.o + std::int64_t{r} * result.pitch + c);
      finish(segment.tile, r, c, result.max[r], result.sum[r], from[0], from[1]);
    }
  }

  // Eight columns of row `r` of an item that is done, unnormalised, to where they belong.
  __device__ __noinline__ void finish(const Tile& tile, int r, int c, float max, float sum,
                                      float4 low, float4 high) const {
    if (tile.seed >= 0) {
      const Seeds& seeds = p_.schedule.seeds;
      const std::int64_t token = tile.seed + (tile.first_sub + r) / p_.layer.group;
      const std::int64_t row = token * p_.layer.num_heads + table_.head[r];
      const int column = first_column_ + c;
      auto* seed = reinterpret_cast<float4*>(seeds.o + row * seeds.pitch + column);
      // Each pass over a row's columns is relative to a maximum of its own: they may have been cut
      // at other keys, and the prefill kernel's maximum depends on the cuts.
      const std::int64_t state = row * seeds.passes + column / seeds.columns;
      if (p_.schedule.shared_rows != nullptr) {
        seed[0] = low;
        seed[1] = high;
        if (c == 0) {
          seeds.max[state] = max;
          seeds.sum[state] = sum;
        }
        return;
      }
      Fold fold{seeds.max[state], seeds.sum[state]};
      fold.add(max, sum);
      max = fold.max;
      sum = fold.sum;
      low = fold_values(fold, seed[0], low);
      high = fold_values(fold, seed[1], high);
    }
    // Every thread of a row closes it alike: no exchange needed.
    const float scale = closing_scale(r, max, sum, c == 0);
    const float values[8] = {low.x * scale,  low.y * scale,  low.z * scale,  low.w * scale,
                             high.x * scale, high.y * scale, high.z * scale, high.w * scale};
    store(r, c, values);
  }

  __device__ __forceinline__ void keep(const Segment& segment, const Result& result,
                                       const Result& to) {
    const int groups = (columns_ + 3) / 4;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < segment.tile.rows * groups; i += kThreads) {
      const int r = i / groups;
      const int c = i % groups * 4;
      *reinterpret_cast<float4*>(to.o + std::int64_t{r} * to.pitch + c) =
          *reinterpret_cast<const float4*>(result.o + std::int64_t{r} * result.pitch + c);
    }
    for (int r = static_cast<int>(threadIdx.x); r < segment.tile.rows; r += kThreads) {
      to.max[r] = result.max[r];
      to.sum[r] = result.sum[r];
    }
  }

  // After this CTA's slots of an item are written: if all others' are too, folds and writes.
  __device__ __forceinline__ void arrive(const Sharers& sharers, const Segment& segment) {
    __syncthreads();
    if (threadIdx.x == 0) {
      std::int32_t* counter = p_.schedule.arrivals + sharers.first;
      const bool is_last = ptx::count_arrival(counter) == sharers.count - 1;
      if (is_last) *counter = 0;
      shared_.last = is_last ? 1 : 0;
    }
    __syncthreads();
    if (shared_.last == 0) return;
    const std::int32_t count = sharers.last + 1 - sharers.first;
    if (!p_.layer.batch_invariant && count > kAhead && count == sharers.count) {
      fold_rows(segment, sharers.first, count);
      return;
    }
    for (std::int32_t c = sharers.first + static_cast<std::int32_t>(threadIdx.x); c <= sharers.last;
         c += kThreads) {
      shared_.parts[c - sharers.first] =
          c == sharers.first ? 1 : static_cast<std::uint8_t>(p_.schedule.starts[c].parts);
    }
    __syncthreads();
    fold_slots(segment, sharers.first, sharers.last);
  }

  // For kernels that store a finished row from registers, no shared prefix being about: what it is
  // multiplied with,
  __device__ __forceinline__ float closing_scale(int r, float max, float sum,
                                                 bool writes_lse) const {
    const bool has_sink = p_.layer.sinks != nullptr;
    const int head = table_.head[r];
    const auto finished = semantics::finish(semantics::SoftmaxState<float>{max, sum}, has_sink,
                                            has_sink ? table_.sink[r] : 0.0F);
    if (writes_lse && p_.lse != nullptr && first_column_ == 0) {
      p_.lse[head * p_.lse_head_stride + table_.token[r] * p_.lse_token_stride] = finished.lse;
    }
    return finished.output_scale * value_of(p_.v.scale);
  }

  // and where it goes, two 16-bit elements a word, if output is that simple.
  __device__ bool stores_pairs() const {
    return p_.output_aligned && p_.block_output == nullptr && size_of(p_.output_dtype) == 2;
  }
  __device__ std::uint32_t* output_row(int r) const {
    const std::int64_t offset = table_.token[r] * p_.output_token_stride +
                                table_.head[r] * p_.output_head_stride + first_column_;
    return reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(p_.output) + offset);
  }

 private:
  static __device__ float4 fold_values(const Fold& fold, const float4& a, const float4& b) {
    return make_float4(fold.value(a.x, b.x), fold.value(a.y, b.y), fold.value(a.z, b.z),
                       fold.value(a.w, b.w));
  }

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
    const int groups = (columns_ + 7) / 8 * 2;
    const int work = segment.tile.rows * groups;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i - static_cast<int>(threadIdx.x % 32) < work;
         i += kThreads) {
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
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int blocks = (columns_ + 127) / 128;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x / 32); i < segment.tile.rows * blocks;
         i += kThreads / 32) {
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
      finish_pair(segment.tile, r, c, c < columns_, fold, o);
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
        if (j + u < count && c < columns_) {
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
    if (exists && c % 8 == 0) finish(tile, r, c, fold.max, fold.sum, o, other);
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
          *o = fold_values(*fold, *o, part[u].o);
          if (k == parts[u]) break;
          part[u] = load_part(slot(base + u, k + 1), r, c);
        }
      }
    }
  }

  __device__ void store(int r, int c, const float (&values)[8]) const {
    const std::int64_t token = table_.token[r];
    const std::int64_t head = table_.head[r];
    const int column = first_column_ + c;
    const int count = min(8, columns_ - c);
    DType dtype = p_.output_dtype;
    char* to;
    bool whole = p_.output_aligned && count == 8;
    if (p_.block_output != nullptr) {
      dtype = DType::kFloat32;
      to = reinterpret_cast<char*>(
          p_.block_output + (token * p_.layer.num_heads + head) * p_.layer.head_size_v + column);
      whole = p_.layer.head_size_v % 8 == 0 && count == 8;
    } else {
      to =
          static_cast<char*>(p_.output) +
          (token * p_.output_token_stride + head * p_.output_head_stride + column) * size_of(dtype);
    }
    if (whole && dtype == DType::kBFloat16) {
      *reinterpret_cast<uint4*>(to) = pack<ptx::BFloat16>(values);
    } else if (whole && dtype == DType::kFloat16) {
      *reinterpret_cast<uint4*>(to) = pack<ptx::Half>(values);
    } else if (whole && dtype == DType::kFloat32) {
      auto* out = reinterpret_cast<float4*>(to);
      out[0] = make_float4(values[0], values[1], values[2], values[3]);
      out[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      // Element by element, and small: this code is in every kernel. Fp8 outputs come here: divided,
      // for the inverse of a denormal scale is infinite.
      const float divisor = p_.has_output_scale ? value_of(p_.output_scale) : 1.0F;
#pragma unroll 1
      for (int i = 0; i < count; ++i) semantics::store_element(to, dtype, i, values[i] / divisor);
    }
  }

  template <class Type>
  static __device__ uint4 pack(const float (&values)[8]) {
    return make_uint4(Type::pack(values[0], values[1]), Type::pack(values[2], values[3]),
                      Type::pack(values[4], values[5]), Type::pack(values[6], values[7]));
  }

  const KernelParams& p_;
  RowTable<kRows>& table_;
  Shared& shared_;
  int first_column_ = 0;
  int columns_ = 0;
};

}  // namespace quire::cuda
