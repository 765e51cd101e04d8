// Attention on mma.sync tensor cores, FlashAttention-2's loop over a paged cache.
//
//   block table -> row offsets (a ring, a tile ahead) -> cp.async K and V tiles (`stages` deep)
//   -> S = Q K^T -> mask, softmax in registers -> O += P V
//
// Four warps. kMany: each warp has its own 16 or 32 query rows and all keys of a tile. kFew: all
// warps have the same 16 or 32 rows and 16 keys each, with their own (m, l, O), merged at the end:
// a decode tile's K and V are read from shared memory once.
// Each iteration has two barriers: A (K tile i is there; nobody uses V tile i-1 any more, its place
// takes V tile i-1+stages) and B (V tile i is there; K tile i's place takes K tile i+stages).
// 8-bit caches: a thread widens the very bytes it copied, so the barriers stay the same. A token's
// own K scale multiplies its column of S in fp32 (rounded into K it would cost a bit of every
// logit). Its V scale multiplies P in bf16, which holds every product; in fp16 tiny ones would be
// lost, so there it goes into the widened V.
// Bytes per tile of 64 keys at d128: 32 KiB in; flops 4 * 64 * 128 * rows.
#pragma once

#include "cuda/sm80/mma_loader.cuh"

namespace quire::cuda::sm80 {

// Out of line, four scores at a time: inlined, 64 copies of it would take registers from the loop
// of the layers that have no such scores.
template <int kRows>
__device__ __noinline__ float4 modify_scores(const KernelParams& p, const RowTable<kRows>& rows,
                                             std::int32_t seq, int row, int key, float4 s) {
  return make_float4(modify_score<FloatOps>(p, rows, seq, row, key, s.x),
                     modify_score<FloatOps>(p, rows, seq, row, key + 1, s.y),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key, s.z),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key + 1, s.w));
}

template <class C>
class MmaAttention : MmaLoader<C> {
  using Base = MmaLoader<C>;
  using Base::kScaleWeights;
  using Base::lane_;
  using Base::m_tiles_;
  using Base::negate_;
  using Base::p_;
  using Base::shared_;
  using Base::tiles_;
  using Base::warp_;

 public:
  __device__ __forceinline__ MmaAttention(const KernelParams& p, char* memory) : Base(p, memory) {
    const float scale = p.layer.softmax_scale * value_of(p.call.q_scale) * value_of(p.call.k.scale);
    negate_ = scale < 0;
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
  }

  __device__ __forceinline__ void run() {
    Finisher<C::kRows, kMmaThreads> finisher(p_, shared_.rows, shared_.finish);
    const Segment& segment = shared_.segment;
    const auto cta = static_cast<std::int32_t>(blockIdx.x);
    if (threadIdx.x == 0) shared_.walker = Walker(p_.schedule, cta);
    while (advance()) {
      begin(segment);
      finisher.set_pass(shared_.first_column, shared_.columns);
      // One run in the free mode; one for each chunk where chunks must not depend on who does them.
      const int chunk = p_.layer.batch_invariant ? segment.tile.chunk_units
                                                 : segment.unit_end - segment.unit_begin;
      const bool one_run = segment.unit_end - segment.unit_begin <= chunk;
      int part = 0;
      int unit = segment.unit_begin;
      do {
        const int end = min(unit + chunk, segment.unit_end);
        attend(segment, unit, end);
        const Result result = settle(segment);
        if (one_run && segment.whole()) {
          finisher.write(segment, result);
        } else if (segment.unit_begin > 0) {
          finisher.keep(segment, result, finisher.slot(cta, ++part));
        } else if (unit == 0) {
          finisher.keep(segment, result, finisher.slot(cta, 0));
        } else {
          finisher.fold_into(segment, result, finisher.slot(cta, 0));
        }
        __syncthreads();
        unit = end;
      } while (unit < segment.unit_end);
      if (!segment.whole()) {
        finisher.arrive(shared_.walker.sharers(segment), segment);
      } else if (!one_run) {
        finisher.write(segment, finisher.slot(cta, 0));
      }
    }
  }

 private:
  static constexpr int kNTiles = C::kKeysPerWarp / 8;
  static constexpr int kColumnTiles = C::kHeadV / 8;

  // ---- a segment's beginning ----------------------------------------------------------------

  __device__ __forceinline__ bool advance() {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.has_work = shared_.walker.next(p_.schedule, &shared_.segment);
    }
    __syncthreads();
    return shared_.has_work;
  }

  __device__ __forceinline__ void begin(const Segment& segment) {
    const int kv_head = segment.head / p_.passes;
    fill_rows<C::kRows, kMmaThreads>(p_, segment, kv_head, shared_.rows);
    if (threadIdx.x == 0) {
      shared_.kv_head = kv_head;
      shared_.first_column = (segment.head - kv_head * p_.passes) * p_.columns;
      shared_.columns = min(p_.columns, p_.layer.head_size_v - shared_.first_column);
      const KvParams& k = p_.call.k;
      const KvParams& v = p_.call.v;
      shared_.side_base[0] =
          static_cast<const char*>(k.data) + kv_head * k.strides.head * size_of(k.dtype);
      shared_.side_base[1] = static_cast<const char*>(v.data) +
                             (kv_head * v.strides.head + shared_.first_column) * size_of(v.dtype);
    }
    __syncthreads();
    m_tiles_ = C::kFew ? (segment.tile.rows + 15) / 16 : C::kMTiles;
  }

  // ---- the loop -----------------------------------------------------------------------------

  // Units [unit_begin, unit_end) into (o_, max_, sum_).
  __device__ __forceinline__ void attend(const Segment& segment, int unit_begin, int unit_end) {
    const int count = (unit_end - unit_begin) * (kUnitKeys / C::kKeys);
    const int stages = p_.stages;
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
    if (count == 0) return;
#pragma unroll 1
    for (int i = 0; i <= stages && i < count; ++i) {
      this->remember(i, this->look_up(segment, this->first_key(segment, unit_begin, i)));
    }
    this->load_queries(segment);  // arrives with the first tile
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      if (i < count) this->template start_copy<0>(i, i);
      tile::commit_copies();
      if (i == stages - 1) break;
      if (i < count) this->template start_copy<1>(i, i);
      tile::commit_copies();
    }
    int stage = 0;  // i % stages
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int ahead = i + stages + 1;
      typename Base::RowPlace place{-1, 0};
      if (ahead < count)
        place = this->look_up(segment, this->first_key(segment, unit_begin, ahead));
      this->wait_oldest();
      if constexpr (C::kBytes) this->template widen<0>(i, stage);
      __syncthreads();  // A
      if (i + stages - 1 < count) {
        this->template start_copy<1>(i + stages - 1, stage > 0 ? stage - 1 : stages - 1);
      }
      tile::commit_copies();

      float s[C::kMTiles][kNTiles][4];
      multiply_keys(stage, s);
      const float* scales = C::kBytes ? shared_.scale[C::kBytes ? i % C::kRing : 0][0] : nullptr;
      if (C::kBytes && p_.call.k.token_scales != nullptr) scale_columns(scales, s);
      softmax(segment, this->first_key(segment, unit_begin, i), s);
      if (C::kBytes && kScaleWeights && p_.call.v.token_scales != nullptr) {
        scale_columns(scales + C::kKeys, s);
      }

      this->wait_oldest();
      if constexpr (C::kBytes) this->template widen<1>(i, stage);
      __syncthreads();  // B
      if (i + stages < count) this->template start_copy<0>(i + stages, stage);
      tile::commit_copies();
      multiply_values(stage, s);
      if (ahead < count) this->remember(ahead, place);
      if (++stage == stages) stage = 0;
    }
    tile::wait_copies<0>();
  }

  __device__ __forceinline__ int warp_row() const { return C::kFew ? 0 : warp_ * 16 * C::kMTiles; }
  __device__ __forceinline__ int warp_key() const { return C::kFew ? warp_ * C::kKeysPerWarp : 0; }
  // kFew: decode tiles often fill only the first 16 rows.
  __device__ __forceinline__ bool used(int mt) const { return !C::kFew || mt < m_tiles_; }

  __device__ __forceinline__ void multiply_keys(int stage, float (&s)[C::kMTiles][kNTiles][4]) {
    const std::uint32_t keys = C::kBytes ? this->wide_k() : this->template stage_at<0>(stage);
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0F;
      }
    }
    const std::uint32_t query = tile::opaque(tile::a_base(this->query_, warp_row(), C::kPitchK));
    const std::uint32_t key = tile::b_base(keys, warp_key(), C::kPitchK);
    constexpr int kUnroll = C::kHeadK <= 128 ? C::kHeadK / 16 : 4;
    const int steps = C::kHeadK <= 128 ? C::kHeadK / 16 : (p_.layer.head_size + 15) / 16;
#pragma unroll kUnroll
    for (int k = 0; k < steps; ++k) {
      std::uint32_t a[C::kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        if (!used(mt)) continue;
        tile::load_matrices(a[mt], tile::at_column(query, 2 * k) + mt * 16 * C::kPitchK);
      }
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        std::uint32_t b[4];
        tile::load_matrices(b, tile::at_column(key, 2 * k) + n * 8 * C::kPitchK);
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          if (!used(mt)) continue;
          C::Type::multiply(s[mt][n], a[mt], b[0], b[1]);
          C::Type::multiply(s[mt][n + 1], a[mt], b[2], b[3]);
        }
      }
    }
  }

  // Multiplies each key's column of S or P.
  __device__ __forceinline__ void scale_columns(const float* scales,
                                                float (&s)[C::kMTiles][kNTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 scale =
          *reinterpret_cast<const float2*>(scales + warp_key() + lane_ % 4 * 2 + n * 8);
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] *= e % 2 == 0 ? scale.x : scale.y;
      }
    }
  }

  // S -> P in place; updates (max_, sum_) and rescales o_. Maxima are in units of S: raw dot
  // products, or natural logits where scores are modified.
  __device__ __forceinline__ void softmax(const Segment& segment, int first,
                                          float (&s)[C::kMTiles][kNTiles][4]) {
    const std::int32_t* common = shared_.rows.common;
    const bool all_visible = (first >= common[2] && first + C::kKeys <= common[3]) ||
                             (first >= common[0] && first + C::kKeys <= common[1]);
    const float to_log2 = C::kGeneral ? kLog2E : score_scale_ * kLog2E;
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      if (!used(mt)) continue;
      const int row = warp_row() + mt * 16 + lane_ / 4;
      const int key = first + warp_key() + lane_ % 4 * 2;
      if constexpr (C::kGeneral) modify(segment, row, key, s[mt]);
      if (!all_visible) mask(row, key, s[mt]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float max = max_[mt][h];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          max = fmaxf(max, fmaxf(s[mt][n][2 * h], s[mt][n][2 * h + 1]));
        }
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
        const float shift = semantics::softmax_shift(max);
        const float alpha = tile::exp2_approx((max_[mt][h] - shift) * to_log2);
        max_[mt][h] = max;
        float scaled_shift = shift * to_log2;
        if (fabsf(scaled_shift) > 1e30F) {
          // Logits near the end of fp32's range: subtract before anything can overflow.
          scaled_shift = 0.0F;
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
            s[mt][n][2 * h] -= shift;
            s[mt][n][2 * h + 1] -= shift;
          }
        }
        float sum = 0.0F;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[mt][n][e] = tile::exp2_approx(fmaf(s[mt][n][e], to_log2, -scaled_shift));
            sum += s[mt][n][e];
          }
        }
        sum_[mt][h] = fmaf(sum_[mt][h], alpha, sum);
        if (__any_sync(~0U, alpha != 1.0F)) {  // rarely, after a row's first few tiles
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            o_[mt][n][2 * h] *= alpha;
            o_[mt][n][2 * h + 1] *= alpha;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void modify(const Segment& segment, int row, int key,
                                         float (&s)[kNTiles][4]) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float4 x = modify_scores(p_, shared_.rows, segment.tile.seq, row, key + n * 8,
                                     make_float4(s[n][0] * score_scale_, s[n][1] * score_scale_,
                                                 s[n][2] * score_scale_, s[n][3] * score_scale_));
      s[n][0] = x.x;
      s[n][1] = x.y;
      s[n][2] = x.z;
      s[n][3] = x.w;
    }
  }

  __device__ __forceinline__ void mask(int row, int key, float (&s)[kNTiles][4]) {
    const int4 low = shared_.rows.visible[row];
    const int4 high = shared_.rows.visible[row + 8];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!sees(e < 2 ? low : high, key + n * 8 + e % 2)) s[n][e] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int stage,
                                                  const float (&s)[C::kMTiles][kNTiles][4]) {
    const std::uint32_t values = C::kBytes ? this->wide_v() : this->template stage_at<1>(stage);
    const std::uint32_t value = tile::a_base(values, warp_key(), C::kPitchV);
#pragma unroll
    for (int k = 0; k < C::kKeysPerWarp / 16; ++k) {
      std::uint32_t a[C::kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        a[mt][0] = C::Type::pack(s[mt][2 * k][0], s[mt][2 * k][1]);
        a[mt][1] = C::Type::pack(s[mt][2 * k][2], s[mt][2 * k][3]);
        a[mt][2] = C::Type::pack(s[mt][2 * k + 1][0], s[mt][2 * k + 1][1]);
        a[mt][3] = C::Type::pack(s[mt][2 * k + 1][2], s[mt][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        std::uint32_t b[4];
        tile::load_matrices_transposed(b, tile::at_column(value, n) + k * 16 * C::kPitchV);
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          if (!used(mt)) continue;
          C::Type::multiply(o_[mt][n], a[mt], b[0], b[1]);
          C::Type::multiply(o_[mt][n + 1], a[mt], b[2], b[3]);
        }
      }
    }
  }

  // ---- the end ------------------------------------------------------------------------------

  // Registers -> rows in shared memory, over Q, K and V. Ends with a barrier.
  __device__ __forceinline__ Result settle(const Segment& segment) {
    auto* area = reinterpret_cast<float*>(tiles_);
    Result result{area + (C::kFew ? 16 * C::kWarpKeys * C::kResultPitch : 0), shared_.max,
                  shared_.sum, C::kResultPitch};
    const float to_natural = C::kGeneral ? 1.0F : score_scale_;
    __syncthreads();
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      if (!used(mt)) continue;
      float* rows = C::kFew ? area + warp_ * 16 * C::kResultPitch
                            : result.o + (warp_row() + mt * 16) * C::kResultPitch;
      float* max = C::kFew ? shared_.warp_max[warp_] : shared_.max + warp_row() + mt * 16;
      float* sum = C::kFew ? shared_.warp_sum[warp_] : shared_.sum + warp_row() + mt * 16;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane_ / 4 + h * 8;
        float total = sum_[mt][h];
        total += __shfl_xor_sync(~0U, total, 1);
        total += __shfl_xor_sync(~0U, total, 2);
        if (lane_ % 4 == 0) {
          max[r] = max_[mt][h] * to_natural;
          sum[r] = total;
        }
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          *reinterpret_cast<float2*>(rows + r * C::kResultPitch + n * 8 + lane_ % 4 * 2) =
              make_float2(o_[mt][n][2 * h], o_[mt][n][2 * h + 1]);
        }
      }
      if constexpr (C::kFew) {
        __syncthreads();
        merge_warps(area, mt, result);
      }
    }
    __syncthreads();
    return result;
  }

  // kFew: the warps' states of 16 rows into one, in warp order. Barriers around the loop over m
  // tiles: callers have one before, and this ends with one.
  __device__ __forceinline__ void merge_warps(const float* area, int mt, const Result& result) {
    for (int i = static_cast<int>(threadIdx.x); i < 16 * C::kHeadV / 4; i += kMmaThreads) {
      const int r = i / (C::kHeadV / 4);
      const int c = i % (C::kHeadV / 4) * 4;
      float max = -INFINITY;
#pragma unroll
      for (int w = 0; w < C::kWarpKeys; ++w) max = fmaxf(max, shared_.warp_max[w][r]);
      const float shift = semantics::softmax_shift(max);
      float4 o = make_float4(0, 0, 0, 0);
      float sum = 0.0F;
#pragma unroll
      for (int w = 0; w < C::kWarpKeys; ++w) {
        const float weight = tile::exp2_approx((shared_.warp_max[w][r] - shift) * kLog2E);
        const float4 part =
            *reinterpret_cast<const float4*>(area + (w * 16 + r) * C::kResultPitch + c);
        o.x = fmaf(part.x, weight, o.x);
        o.y = fmaf(part.y, weight, o.y);
        o.z = fmaf(part.z, weight, o.z);
        o.w = fmaf(part.w, weight, o.w);
        sum = fmaf(shared_.warp_sum[w][r], weight, sum);
      }
      *reinterpret_cast<float4*>(result.o + (mt * 16 + r) * C::kResultPitch + c) = o;
      if (c == 0) {
        result.max[mt * 16 + r] = max;
        result.sum[mt * 16 + r] = sum;
      }
    }
    __syncthreads();
  }

  float score_scale_;
  float o_[C::kMTiles][kColumnTiles][4];
  float max_[C::kMTiles][2];
  float sum_[C::kMTiles][2];
};

template <class C>
__global__ void __launch_bounds__(kMmaThreads, C::kMinCtas)
    attention_mma(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char memory[];
  MmaAttention<C>(p, memory).run();
}

}  // namespace quire::cuda::sm80
