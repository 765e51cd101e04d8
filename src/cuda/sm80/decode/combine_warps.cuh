// What the four warps of the decode kernel found for an item, each over its own keys, made one:
//
//   each warp's (m, l) and, a few rows at a time, O -> shared memory -> combined in warp order
//   -> output, or a partial for combine_splits.cuh
#pragma once

#include "cuda/sm80/decode/stream.cuh"

namespace quire::cuda::sm80 {

template <class C>
class DecodeCombine : protected DecodeStream<C> {
 protected:
  using Base = DecodeStream<C>;
  using Base::lane_;
  using Base::p_;
  using Base::shared;
  using Base::warp_;
  using DecodeEpilogue = Epilogue<DecodeTeam, C::kRows>;

  static constexpr int kColumnTiles = C::kHeadSize / 8;

  // Of a split or kv chunk, over this warp's keys, in registers.
  struct Rows {
    float o[C::kMTiles][kColumnTiles][4];
    float max[C::kMTiles][2];
    float sum[C::kMTiles][2];
  };

  __device__ __forceinline__ explicit DecodeCombine(const KernelParams& p) : Base(p) {
    const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
  }

  struct Emit {
    enum { kWrite, kPartial, kCombine } how;
    PartialRows partial;
  };

  // The warps' states into one, in warp order, kCombineRows rows at a time, and on to where they
  // belong. Its barriers also hand over what prepare() got ready.
  __device__ __forceinline__ void combine(const DecodeEpilogue& epilogue, const Split& split,
                                          const Emit& emit, const Rows& rows) {
    const float to_natural = C::kScoreMod ? 1.0F : score_scale_;
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = rows.sum[mt][h];
        total += __shfl_xor_sync(~0U, total, 1);
        total += __shfl_xor_sync(~0U, total, 2);
        if (ptx::is_first_of_row(lane_)) {
          shared().max[warp_][mt * 16 + h * 8 + ptx::fragment_row(lane_)] =
              rows.max[mt][h] * to_natural;
          shared().sum[warp_][mt * 16 + h * 8 + ptx::fragment_row(lane_)] = total;
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A loop over row numbers alone would index registers.
        const int end = min(mt * 16 + h * 8 + 8, split.tile.rows);
#pragma unroll 1
        for (int row = mt * 16 + h * 8; row < end; row += C::kCombineRows) {
          spill_rows(rows, mt, h, row);
          __syncthreads();
          combine_row_block(epilogue, split, row, emit);
          __syncthreads();
        }
      }
    }
    if (split.tile.rows == 0) __syncthreads();
  }

  float score_scale_;

 private:
  static __device__ __forceinline__ float* combine_memory() {
    return reinterpret_cast<float*>(Base::memory() + decode_fixed_bytes<C>() + 2 * C::kQueryBytes);
  }

  __device__ __forceinline__ void spill_rows(const Rows& rows, int mt, int h, int first_row) {
    const int r = mt * 16 + h * 8 + ptx::fragment_row(lane_) - first_row;
    if (r < 0 || r >= C::kCombineRows) return;
    float* row = combine_memory() + (warp_ * C::kCombineRows + r) * C::kCombinePitch +
                 ptx::fragment_column(lane_);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      *reinterpret_cast<float2*>(row + n * 8) =
          make_float2(rows.o[mt][n][2 * h], rows.o[mt][n][2 * h + 1]);
    }
  }

  __device__ __forceinline__ void combine_row_block(const DecodeEpilogue& epilogue,
                                                    const Split& split, int first_row,
                                                    const Emit& emit) {
    constexpr int kColumns8 = C::kHeadSize / 8;
    const int r = static_cast<int>(threadIdx.x) / kColumns8;
    const int c = static_cast<int>(threadIdx.x) % kColumns8 * 8;
    const int row = first_row + r;
    const bool mine = r < C::kCombineRows && row < split.tile.rows && c < p_.layer.head_size_v;
    float o[8] = {};
    float max = -INFINITY;
    float sum = 0.0F;
    if (mine) combine_warps(r, row, c, &max, &sum, o);
    if (emit.how == Emit::kWrite) {
      if (mine) {
        epilogue.normalise(split.tile, row, c, max, sum, make_float4(o[0], o[1], o[2], o[3]),
                           make_float4(o[4], o[5], o[6], o[7]));
      }
      return;
    }
    float* to = emit.partial.o + std::int64_t{row} * emit.partial.pitch + c;
    if (emit.how == Emit::kCombine) {
      if (mine) {
        Combine combine{emit.partial.max[row], emit.partial.sum[row]};
        combine.add(max, sum);
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] = combine.value(to[i], o[i]);
        max = combine.max;
        sum = combine.sum;
      }
      __syncthreads();  // all threads of a row have read its state
    }
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
    }
    if (c == 0) {
      emit.partial.max[row] = max;
      emit.partial.sum[row] = sum;
    }
  }

  // Eight columns of one row over the four warps.
  __device__ __forceinline__ void combine_warps(int r, int row, int c, float* max, float* sum,
                                                float (&o)[8]) const {
#pragma unroll
    for (int w = 0; w < C::kStates; ++w) *max = fmaxf(*max, shared().max[w][row]);
    const float shift = semantics::softmax_shift(*max);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = ptx::exp2_approx((shared().max[w][row] - shift) * kLog2E);
      const float* part = combine_memory() + (w * C::kCombineRows + r) * C::kCombinePitch + c;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(part + i);
        o[i] = fmaf(x.x, weight, o[i]);
        o[i + 1] = fmaf(x.y, weight, o[i + 1]);
        o[i + 2] = fmaf(x.z, weight, o[i + 2]);
        o[i + 3] = fmaf(x.w, weight, o[i + 3]);
      }
      *sum = fmaf(shared().sum[w][row], weight, *sum);
    }
#pragma unroll
    for (int w = kDecodeWarps; w < C::kStates; ++w) {
      *sum = fmaf(shared().sum[w][row], ptx::exp2_approx((shared().max[w][row] - shift) * kLog2E),
                  *sum);
    }
  }
};

}  // namespace quire::cuda::sm80
