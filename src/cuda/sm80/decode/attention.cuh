// Attention for sequences of up to 16 or 32 query rows (decode, speculative decoding), limited by
// the reading of K and V.
//
//   each warp: its 16 keys of every kv tile of 64, by cp.async into a ring of its own (stream.cuh)
//   -> S = Q K^T -> mask, softmax in registers -> O += P V, with its own (m, l, O)
//   at an item's end: the four warps' (m, l, O) -> shared memory -> combined -> output or a partial
//
// Warps wait for each other only at the end of an item. Copies for the next items go on meanwhile:
// their queries and row tables are prepared an item ahead, in the other of two buffers. So an
// item's end must have a barrier behind the last use of its row table: combine() has one, and
// work() has one behind the combination of splits.
//
// 8-bit caches: the lane that copied bytes widens them. A token's own K scale multiplies its column
// of S in fp32 (rounded into K it would cost a bit of every logit). Its V scale multiplies P in
// bf16, which holds every product; in fp16 tiny ones would be lost, so there it goes into V.
//
// Why this tile: a kv tile at d128 is 32 KiB and, for 16 rows, 4 * 64 * 128 * 16 flops: 16 a byte,
// where an H100 has some 250 for each byte that it reads. So bytes in flight count, not products:
// see kMaxStages.
#pragma once

#include "cuda/kernel/score_mod.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm80/decode/combine_warps.cuh"
#include "cuda/sm80/unmapped.cuh"

namespace quire::cuda::sm80 {

template <class C>
class DecodeAttention : DecodeCombine<C> {
  using Base = DecodeCombine<C>;
  using Base::consumed_;
  using Base::kColumnTiles;
  using Base::lane_;
  using Base::p_;
  using Base::score_scale_;
  using Base::shared;
  using Base::split_;
  using Base::stage_;
  using Base::warp_;
  using typename Base::DecodeEpilogue;
  using typename Base::Emit;
  using typename Base::Rows;

 public:
  __device__ __forceinline__ explicit DecodeAttention(const KernelParams& p) : Base(p) {
    changes_queries_ = query_change(p).any();
  }

  __device__ __forceinline__ void run() {
    this->start();
    // From -1 on: the step before the first split only prepares. One loop for both, since code that
    // runs for the first time has to be loaded. Queries come before the first copies of K and V:
    // these take microseconds together, and what is read behind them waits for them, instructions
    // too.
    for (split_ = -1; split_ < 0 || this->knows(split_); ++split_) {
      this->find_next_if_idle();
      if (this->knows(split_ + 1)) prepare(split_ + 1);
      this->refill();
      if (split_ >= 0) {
        work(this->split_at(split_));
      } else {
        this->wait_oldest();
        __syncthreads();
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  static constexpr bool kScaleWeights = std::is_same_v<typename C::Type, ptx::BFloat16>;

  // ---- a split ------------------------------------------------------------------------------

  // Row table and queries of split `n`, for when its turn comes: at least one barrier later.
  __device__ __forceinline__ void prepare(int n) {
    const Split& split = this->split_at(n);
    if (warp_ == 0) fill_rows<WarpTeam>(p_, split, split.head, shared().rows[n & 1]);
    this->load_queries(split, this->query_at(n), changes_queries_);
  }

  __device__ __forceinline__ void work(const Split& split) {
    DecodeEpilogue epilogue(p_, shared().rows[split_ & 1]);
    epilogue.set_pass(0, p_.layer.head_size_v);
    DecodeCombiner<C> combiner(p_, epilogue, shared().combine);
    const auto cta = static_cast<std::int32_t>(blockIdx.x);
    // In the free mode all kv tiles together. In batch-invariant mode one kv chunk after the other,
    // each with a state of its own, so that bits do not depend on how chunks are spread over CTAs.
    const int chunk =
        p_.layer.batch_invariant ? split.tile.kv_chunk : split.kv_tile_end - split.kv_tile_begin;
    const bool one_state = split.kv_tile_end - split.kv_tile_begin <= chunk;
    int num_partials = 0;
    int kv_tile = split.kv_tile_begin;
    do {
      const int end = min(kv_tile + chunk, split.kv_tile_end);
      const int existing = min(end, split.stop);
      Rows rows;
      attend<C::kMTiles>(split, kv_tile, existing, rows);
      // What was prepared for the next split has arrived with the ring's copies, unless this split
      // was too short for that.
      if (existing - kv_tile <= p_.pipeline_stages) {
        ptx::commit_copies();
        ptx::wait_copies<0>();
      }
      Emit emit{Emit::kPartial, {}};
      if (one_state && split.whole()) {
        emit.how = Emit::kWrite;
      } else if (split.kv_tile_begin > 0) {
        emit.partial = combiner.partial(cta, ++num_partials);
      } else {
        emit.partial = combiner.partial(cta, 0);
        if (kv_tile > 0) emit.how = Emit::kCombine;
      }
      this->combine(epilogue, split, emit, rows);
      kv_tile = end;
    } while (kv_tile < split.kv_tile_end);
    if (split.whole() && one_state) return;  // written between combine()'s barriers
    if (split.whole()) {
      epilogue.write(split, combiner.partial(cta, 0));
    } else {
      combiner.combine_if_last(this->stream().iterator.item_ctas(split), split);
    }
    // Without it, warps that are done would prepare the split after the next one, whose row table
    // takes the place of this one's, while others still store rows by it: rows went to other rows'
    // places.
    __syncthreads();
  }

  // ---- the loop -------------------------------------------------------------------------------

  template <int kTiles>
  using Scores = float[kTiles][2][4];

  // Units [kv_tile_begin, kv_tile_end) into `rows`; kTiles * 16 rows.
  template <int kTiles>
  __device__ __forceinline__ void attend(const Split& split, int kv_tile_begin, int kv_tile_end,
                                         Rows& rows) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rows.o[mt][n][e] = 0.0F;
      }
      rows.max[mt][0] = rows.max[mt][1] = -INFINITY;
      rows.sum[mt][0] = rows.sum[mt][1] = 0.0F;
    }
    if constexpr (C::kUnmappedApart) {
      if (lane_ < C::kRows) {
        shared().max[C::kStates - kDecodeWarps + warp_][lane_] = -INFINITY;
        shared().sum[C::kStates - kDecodeWarps + warp_][lane_] = 0.0F;
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int kv_tile = kv_tile_begin; kv_tile < kv_tile_end; ++kv_tile) {
      const int first = split.tile.kv_tile(kv_tile) * kKvTile + warp_ * C::kKeys;
      Scores<kTiles> s;
      this->wait_oldest();
      // Read before fetch() sets it for the stage's next kv tile.
      const std::uint32_t unmapped = C::kUnmappedApart ? shared().unmapped[warp_][stage_] : 0U;
      multiply_keys<kTiles>(ready<0>(), s);
      __syncwarp();
      const float* scales = C::kKv8 ? shared().scale[C::kKv8 ? warp_ : 0][stage_][0] : nullptr;
      if (C::kKv8 && p_.k.token_scales != nullptr) scale_columns<kTiles>(scales, s);
      __syncwarp();
      this->template fetch<0>();
      softmax<kTiles>(split, first, unmapped, s, rows);
      this->wait_oldest();
      if (C::kKv8 && kScaleWeights && p_.v.token_scales != nullptr) {
        scale_columns<kTiles>(scales + C::kKeys, s);
      }
      multiply_values<kTiles>(ready<1>(), s, rows);
      __syncwarp();
      this->template fetch<1>();
      ++consumed_;
      if (++stage_ == p_.pipeline_stages) stage_ = 0;
    }
  }

  // Where the kv tile's K or V is to be multiplied from.
  template <int kSide>
  __device__ __forceinline__ std::uint32_t ready() {
    const std::uint32_t stored = this->stage_at(stage_, kSide);
    if constexpr (!C::kKv8) return stored;
    __syncwarp();  // no lane reads the previous one any more
    const KvParams& kv = kSide == 0 ? p_.k : p_.v;
    if (kv.dtype == DType::kFloat8E4M3) {
      widen<kSide, ptx::E4M3>(kv, stored);
    } else if (kv.dtype == DType::kInt8) {
      widen<kSide, ptx::Int8>(kv, stored);
    } else {
      widen<kSide, ptx::E5M2>(kv, stored);
    }
    __syncwarp();
    return this->wide();
  }

  template <int kSide, class Stored>
  __device__ __forceinline__ void widen(const KvParams& kv, std::uint32_t stored) {
    constexpr int kRowStep = 32 / C::kPieces;
    const bool scaled = kSide == 1 && !kScaleWeights && kv.token_scales != nullptr;
    const int c = lane_ % C::kPieces;
#pragma unroll
    for (int step = 0; step < C::kKeys / kRowStep; ++step) {
      const int r = lane_ / C::kPieces + step * kRowStep;
      const float scale = scaled ? shared().scale[C::kKv8 ? warp_ : 0][stage_][kSide][r] : 1.0F;
      std::uint32_t wide[8];
      ptx::widen_piece<typename C::Type, Stored>(
          ptx::load_piece(stored + static_cast<std::uint32_t>(step * 512 + lane_ * 16)), scaled,
          scale, wide);
      const std::uint32_t to = this->wide();
      ptx::store_piece(to + ptx::piece_offset(r, 2 * c, C::kPitch), wide[0], wide[1], wide[2],
                       wide[3]);
      ptx::store_piece(to + ptx::piece_offset(r, 2 * c + 1, C::kPitch), wide[4], wide[5], wide[6],
                       wide[7]);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void multiply_keys(std::uint32_t keys, Scores<kTiles>& s) {
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0F;
      }
    }
    const std::uint32_t query = ptx::opaque(ptx::a_base(this->query_at(split_), 0, C::kPitch));
    const std::uint32_t key = ptx::opaque(ptx::b_base(keys, 0, C::kPitch));
#pragma unroll
    for (int k = 0; k < C::kHeadSize / 16; ++k) {
      std::uint32_t b[4];
      ptx::load_matrices(b, ptx::at_column(key, 2 * k));
#pragma unroll
      for (int mt = 0; mt < kTiles; ++mt) {
        std::uint32_t a[4];
        ptx::load_matrices(a, ptx::at_column(query, 2 * k) + mt * 16 * C::kPitch);
        C::Type::multiply(s[mt][0], a, b[0], b[1]);
        C::Type::multiply(s[mt][1], a, b[2], b[3]);
      }
    }
  }

  // Multiplies each key's column of S or P.
  template <int kTiles>
  __device__ __forceinline__ void scale_columns(const float* scales, Scores<kTiles>& s) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 scale =
          *reinterpret_cast<const float2*>(scales + ptx::fragment_column(lane_) + n * 8);
#pragma unroll
      for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] *= e % 2 == 0 ? scale.x : scale.y;
      }
    }
  }

  // S -> P in place; updates and rescales `rows`. Maxima are in units of S: raw dot
  // products, or natural logits where scores are modified.
  template <int kTiles>
  __device__ __forceinline__ void softmax(const Split& split, int first, std::uint32_t unmapped,
                                          Scores<kTiles>& s, Rows& rows) {
    const RowTable<C::kRows>& table = shared().rows[split_ & 1];
    const int4 common = *reinterpret_cast<const int4*>(table.common);
    const bool all_visible = (first >= common.z && first + C::kKeys <= common.w) ||
                             (first >= common.x && first + C::kKeys <= common.y);
    if constexpr (C::kScoreMod) modify<kTiles>(split, table, first, s);
    if (!all_visible) mask<kTiles>(table, first, s);
    if constexpr (C::kUnmappedApart) {
      constexpr int kState = C::kStates - kDecodeWarps;
      if (unmapped != 0) {
        set_unmapped_apart(unmapped, C::kScoreMod ? 1.0F : score_scale_, s,
                           shared().max[kState + warp_], shared().sum[kState + warp_]);
      }
    }
    const float to_log2 = C::kScoreMod ? kLog2E : score_scale_ * kLog2E;
    float shift[kTiles][2];
    float alpha[kTiles][2];
    bool rescale = false;
    bool huge = false;
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float max = fmaxf(fmaxf(s[mt][0][2 * h], s[mt][0][2 * h + 1]),
                          fmaxf(s[mt][1][2 * h], s[mt][1][2 * h + 1]));
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
        max = fmaxf(max, rows.max[mt][h]);
        const float natural = semantics::softmax_shift(max);
        alpha[mt][h] = ptx::exp2_approx((rows.max[mt][h] - natural) * to_log2);
        rows.max[mt][h] = max;
        shift[mt][h] = natural * to_log2;
        rescale |= alpha[mt][h] != 1.0F;
        huge |= fabsf(shift[mt][h]) > 1e30F;
      }
    }
    if (__any_sync(~0U, huge)) {
      // Logits near the end of fp32's range: subtract before anything can overflow.
#pragma unroll
      for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (fabsf(shift[mt][i % 4 / 2]) > 1e30F) {
            s[mt][i / 4][i % 4] -= semantics::softmax_shift(rows.max[mt][i % 4 / 2]);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (fabsf(shift[mt][h]) > 1e30F) shift[mt][h] = 0.0F;
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[i] = ptx::exp2_approx(fmaf(s[mt][i / 2][2 * h + i % 2], to_log2, -shift[mt][h]));
          s[mt][i / 2][2 * h + i % 2] = p[i];
        }
        rows.sum[mt][h] = fmaf(rows.sum[mt][h], alpha[mt][h], (p[0] + p[1]) + (p[2] + p[3]));
      }
    }
    if (__any_sync(~0U, rescale)) {  // rarely, after a row's first few kv tiles
#pragma unroll
      for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) rows.o[mt][n][e] *= alpha[mt][e / 2];
        }
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void modify(const Split& split, const RowTable<C::kRows>& table,
                                         int first, Scores<kTiles>& s) {
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = mt * 16 + ptx::fragment_row(lane_, i % 4);
        const int key = first + ptx::fragment_column(lane_, i % 4) + i / 4 * 8;
        s[mt][i / 4][i % 4] = modify_score<FloatOps>(p_, table, split.tile, row, key,
                                                     s[mt][i / 4][i % 4] * score_scale_);
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void mask(const RowTable<C::kRows>& table, int first,
                                       Scores<kTiles>& s) {
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
      const int4 low = table.visible[mt * 16 + ptx::fragment_row(lane_)];
      const int4 high = table.visible[mt * 16 + ptx::fragment_row(lane_) + 8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = first + ptx::fragment_column(lane_, i % 4) + i / 4 * 8;
        if (!sees(i % 4 < 2 ? low : high, key)) s[mt][i / 4][i % 4] = -INFINITY;
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void multiply_values(std::uint32_t values, const Scores<kTiles>& s,
                                                  Rows& rows) {
    const std::uint32_t value = ptx::opaque(ptx::a_base(values, 0, C::kPitch));
    std::uint32_t a[kTiles][4];
#pragma unroll
    for (int mt = 0; mt < kTiles; ++mt) {
      a[mt][0] = C::Type::pack(s[mt][0][0], s[mt][0][1]);
      a[mt][1] = C::Type::pack(s[mt][0][2], s[mt][0][3]);
      a[mt][2] = C::Type::pack(s[mt][1][0], s[mt][1][1]);
      a[mt][3] = C::Type::pack(s[mt][1][2], s[mt][1][3]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      std::uint32_t b[4];
      ptx::load_matrices_transposed(b, ptx::at_column(value, n));
#pragma unroll
      for (int mt = 0; mt < kTiles; ++mt) {
        C::Type::multiply(rows.o[mt][n], a[mt], b[0], b[1]);
        C::Type::multiply(rows.o[mt][n + 1], a[mt], b[2], b[3]);
      }
    }
  }

  bool changes_queries_ = false;  // see QueryChange
};

template <class C>
__global__ void __launch_bounds__(kDecodeThreads, C::kMinCtas)
    attention_decode(const __grid_constant__ KernelParams p) {
  DecodeAttention<C>(p).run();
}

}  // namespace quire::cuda::sm80
