// The end of an item in the decode kernel:
//
//   O, maximum and the warps' sums -> shared memory -> output, or a partial for fold.cuh or, in
//   batch-invariant mode, combine_splits.cuh
#pragma once

#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/decode/bytes.cuh"
#include "cuda/sm90/decode/fold.cuh"

namespace quire::cuda::sm90 {

// Of a row that has seen no key: below all scores but -inf, so that a difference is never NaN.
inline constexpr float kNoReference = -3.402823466e38F;

// What a thread has of the state over some keys. Products are of K and Q^T and of V^T and
// P^T, so query rows are columns of the fragments: the thread has rows 8 g + column, as element i =
// 2 g + column % 2 of its values by row.
template <class C>
struct DecodeState {
  static constexpr int kOwnRows = C::kRows / 4;
  float o[C::kColumns][C::kRows / 2];
  float reference[kOwnRows];  // what weights are relative to, in scores; all threads agree
  float sum[kOwnRows];        // of weights, over the thread's own keys, in units of 2^-kWeightLog2
};

// Over the keys of a warp: lanes of equal lane % 4 have the same rows.
__device__ __forceinline__ float over_keys(float x) {
  for (int d = 4; d < 32; d *= 2) x += __shfl_xor_sync(~0U, x, d);
  return x;
}

// Where the result for some keys of an item goes.
struct Emit {
  enum { kWrite, kPartial, kCombine, kAwaited } how;
  PartialRows partial;
  bool simple;  // kWrite: see Epilogue::stores_pairs(), and the rows have no shared prefix
};

template <class C>
class DecodeCombine {
 public:
  using Team = typename C::Team;
  using State = DecodeState<C>;

  __device__ DecodeCombine(const KernelParams& p, DecodeShared<C>& shared)
      : p_(p), shared_(shared) {
    const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
    logit_scale_ = C::kSoftCap ? 1.0F : score_scale_;
  }

  __device__ __forceinline__ void combine(const DecodeEpilogue<C>& epilogue, const Split& split,
                                          const Emit& emit, const State& state) {
    spill(state);
    Team::sync();
    constexpr int kPieces = C::kHeadSize / 8;
    constexpr int kRowsAtOnce = kWarpgroupThreads / kPieces;
    const int c = Team::thread() % kPieces * 8;
#pragma unroll 1
    for (int first = 0; first < split.tile.rows; first += kRowsAtOnce) {
      emit_columns(epilogue, split, emit, first + Team::thread() / kPieces, c);
    }
    Team::sync();
  }

  float score_scale_;  // from products to natural units
  float logit_scale_;  // the same from what scores are after a soft cap

 private:
  __device__ __forceinline__ void spill(const State& state) {
    const int lane = Team::lane();
    const int warp = Team::warp();
#pragma unroll
    for (int h = 0; h < C::kColumns; ++h) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        const int row = i / 4 * 8 + ptx::fragment_column(lane, i % 4);
        const int column =
            C::kKv8 ? BytePlaces<C::kHeadSize>::column(warp, ptx::fragment_row(lane), h, i % 4 / 2)
                    : h * 64 + warp * 16 + ptx::fragment_row(lane, i % 4);
        shared_.o[row][column] = state.o[h][i];
      }
    }
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      const int row = i / 2 * 8 + ptx::fragment_column(lane) + i % 2;
      const float sum = over_keys(state.sum[i]);
      if (lane < 4) shared_.sum[warp][row] = sum;
      if (lane < 4 && warp == 0) shared_.max[row] = state.reference[i];
    }
  }

  static __device__ __forceinline__ float over_warps(const float (&x)[kWarpgroupWarps][C::kRows],
                                                     int row) {
    return (x[0][row] + x[1][row]) + (x[2][row] + x[3][row]);
  }

  // Eight columns of a row. Unmapped keys that were counted apart are a state without O: their
  // logits are 0 and so are their values.
  __device__ __forceinline__ void gather(int row, int c, float* max, float* sum,
                                         float (&o)[8]) const {
    constexpr float kWeightUnit = 1.0F / static_cast<float>(1 << C::kWeightLog2);
    *sum = over_warps(shared_.sum, row) * kWeightUnit;
    const float reference = shared_.max[row];
    const bool has_none = reference == kNoReference && *sum == 0.0F;
    *max = has_none ? -INFINITY : reference * logit_scale_;
    const float num_unmapped = C::kUnmappedApart ? over_warps(shared_.num_unmapped, row) : 0.0F;
    float weight = kWeightUnit;
    if (C::kKv8) weight *= ptx::exp2_approx(shared_.value_log2[0][row]);
    if (C::kUnmappedApart && num_unmapped != 0.0F) {
      Combine combine{*max, *sum};
      combine.add(0.0F, num_unmapped);
      *max = combine.max;
      *sum = combine.sum;
      weight *= combine.weight_before;
    }
    const auto* part = reinterpret_cast<const float4*>(&shared_.o[row][c]);
    const float4 low = part[0];
    const float4 high = part[1];
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = x[i] * weight;
  }

  __device__ __forceinline__ void emit_columns(const DecodeEpilogue<C>& epilogue,
                                               const Split& split, const Emit& emit, int row,
                                               int c) const {
    const bool mine = row < split.tile.rows;
    float o[8] = {};
    float max = -INFINITY;
    float sum = 0.0F;
    if (mine) gather(row, c, &max, &sum, o);
    if (emit.how == Emit::kWrite && (C::kInTeams || emit.simple)) {
      if (mine) write_simply(epilogue, row, c, max, sum, o);
      return;
    }
    if (!C::kInTeams && emit.how == Emit::kWrite) {
      if (mine) {
        epilogue.normalise(split.tile, row, c, max, sum, make_float4(o[0], o[1], o[2], o[3]),
                           make_float4(o[4], o[5], o[6], o[7]));
      }
      return;
    }
    float* to = emit.partial.o + std::int64_t{row} * emit.partial.pitch + c;
    if (!C::kInTeams && emit.how == Emit::kCombine) {
      if (mine) {
        Combine combine{emit.partial.max[row], emit.partial.sum[row]};
        combine.add(max, sum);
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] = combine.value(to[i], o[i]);
        max = combine.max;
        sum = combine.sum;
      }
      Team::sync();  // all threads of a row have read its state
    }
    if (!mine) return;
    if (!C::kInTeams && emit.how == Emit::kAwaited) {
      store_awaited(emit.partial, row, c, max, sum, o);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
    }
    if (c == 0) {
      emit.partial.max[row] = max;
      emit.partial.sum[row] = sum;
    }
  }

  __device__ __forceinline__ void store_awaited(const PartialRows& to, int row, int c, float max,
                                                float sum, const float (&o)[8]) const {
    auto* columns = reinterpret_cast<float4*>(to.o + row * to.pitch + c);
    ptx::store_relaxed(columns, not_missing(make_float4(o[0], o[1], o[2], o[3])));
    ptx::store_relaxed(columns + 1, not_missing(make_float4(o[4], o[5], o[6], o[7])));
    if (c == 0) {
      ptx::store_relaxed(to.max + row, not_missing(max));
      ptx::store_relaxed(to.sum + row, not_missing(sum));
    }
  }

  // Without a call, around which everything that is live goes through memory: 1 us an item less.
  __device__ __forceinline__ void write_simply(const DecodeEpilogue<C>& epilogue, int row, int c,
                                               float max, float sum, float (&o)[8]) const {
    const float scale = epilogue.output_scale_of(row, max, sum, c == 0);
    const bool bf16 = p_.output_dtype == DType::kBFloat16;
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = o[2 * i] * scale;
      const float y = o[2 * i + 1] * scale;
      words[i] = bf16 ? ptx::BFloat16::pack(x, y) : ptx::Half::pack(x, y);
    }
    *reinterpret_cast<uint4*>(epilogue.output_row(row) + c / 2) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  const KernelParams& p_;
  DecodeShared<C>& shared_;
};

}  // namespace quire::cuda::sm90
