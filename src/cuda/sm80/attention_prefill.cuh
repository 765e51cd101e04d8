// Attention for requests of many rows, on mma.sync tensor cores: FlashAttention-2's loop over a
// paged cache.
//
//   prepare (a segment ahead) -> ring of key tiles' addresses -> cp.async K and V (`stages` deep)
//   -> S = Q K^T -> mask, softmax in registers -> O += P V -> output, straight from registers
//
// Each warp has its own 16 or 32 query rows and all keys of a tile; nothing is exchanged between
// warps. One barrier a tile: tile i is there, and nobody uses tile i-1 any more, so that tile
// i-1+stages can take its place. Copies run on into the next segment while this one ends; after a
// barrier at its end the next queries take the present ones' place.
// Within a tile, operands are loaded from shared memory one step ahead of the products.
// 8-bit caches: a thread widens the very bytes it copied, between two barriers. A token's
// own K scale multiplies its column of S in fp32 (rounded into K it would cost a bit of every
// logit). Its V scale multiplies P in bf16, which holds every product; in fp16 tiny ones would be
// lost, so there it goes into the widened V.
// Bytes per tile of 64 keys at d128: 32 KiB in; flops 4 * 64 * 128 * rows.
#pragma once

#include "cuda/sm80/prefill_loader.cuh"

namespace quire::cuda::sm80 {

// Out of line, four scores at a time: ALiBi and query-query bias are rare, their code is long.
template <int kRows>
__device__ __noinline__ float4 modify_scores(const KernelParams& p, const RowTable<kRows>& rows,
                                             std::int32_t seq, int row, int key, float4 s) {
  return make_float4(modify_score<FloatOps>(p, rows, seq, row, key, s.x),
                     modify_score<FloatOps>(p, rows, seq, row, key + 1, s.y),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key, s.z),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key + 1, s.w));
}

template <class C>
class PrefillAttention : PrefillLoader<C> {
  using Base = PrefillLoader<C>;
  using Base::kScaleWeights;
  using Base::lane;
  using Base::negate_;
  using Base::p_;
  using Base::query_;
  using Base::shared_;
  using Base::warp;

 public:
  __device__ __forceinline__ PrefillAttention(const KernelParams& p, char* memory)
      : Base(p, memory) {
    const float scale = p.layer.softmax_scale * value_of(p.call.q_scale) * value_of(p.call.k.scale);
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0 && !p_.schedule.header->whole)
      shared_.walker = Walker(p_.schedule, static_cast<std::int32_t>(blockIdx.x));
    if (warp() == 0) prepare(p_, shared_, 0, true);
    __syncthreads();
    int slot = 0;
    bool primed = false;
    while (shared_.task[slot].exists) {
      const PrefillTask& task = shared_.task[slot];
      fill_rows<C::kRows, C::kThreads>(p_, task.segment, task.kv_head, shared_.rows);
      if (!primed) prime(slot);
      if (!this->copies_queries()) {
        this->load_queries(p_, task, query_, negate_);
      } else if (!primed) {
        this->copy_queries(task);
      }
      primed = attend(slot);
      if (primed && this->copies_queries()) this->copy_queries(shared_.task[slot ^ 1]);
      finish(task);
      __syncthreads();
      slot ^= 1;
    }
    tile::wait_copies<0>();
  }

 private:
  static constexpr int kNTiles = C::kStepKeys / 8;
  static constexpr int kColumnTiles = C::kHeadV / 8;
  using Scores = float[C::kMTiles][kNTiles][4];
  using Weights = std::uint32_t[C::kMTiles][C::kStepKeys / 16][4];  // P as the A operand

  // ---- the loop -----------------------------------------------------------------------------

  // The first copies of a segment that the one before it has not started.
  __device__ __forceinline__ void prime(int slot) {
    const int count = shared_.task[slot].count;
#pragma unroll 1
    for (int i = 0; i < p_.stages - 1 && i < count; ++i) {
      const int stage = stage_ + i < p_.stages ? stage_ + i : stage_ + i - p_.stages;
      this->start_copy(slot, i, stage);
    }
  }

  // A segment's tiles into (o_, max_, sum_). Returns whether the next segment's copies are under
  // way (then only its queries are missing).
  __device__ __forceinline__ bool attend(int slot) {
    clear();
    const int count = shared_.task[slot].count;
    const int ahead = p_.stages - 1;
    const int prepare_at = max(count - 1 - ahead, 0);
    bool runs_on = false;
    tile::commit_copies();
    tile::wait_copies<0>();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (warp() == 0) {
        if (i == prepare_at) prepare(p_, shared_, slot ^ 1, false);
        if (i % C::kBatch == 2) look_up_next(slot, i);
      }
      wait_for_tile(slot, i);
      if (i == prepare_at) {
        const PrefillTask& next = shared_.task[slot ^ 1];
        runs_on = ahead > 0 && next.exists && count >= ahead && next.count >= ahead;
      }
      if (ahead > 0) copy_ahead(slot, i + ahead, count, runs_on);
      const KeyTile<C>& keys = shared_.ring[slot][i % C::kRing];
#pragma unroll 1
      for (int first = 0; first < C::kKeys; first += C::kStepKeys) step(slot, keys, first);
      if (++stage_ == p_.stages) stage_ = 0;
    }
    if (count == 0 && warp() == 0) prepare(p_, shared_, slot ^ 1, false);
    __syncthreads();  // nobody uses these queries any more
    return runs_on;
  }

  __device__ __forceinline__ void clear() {
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
  }

  // Ends with a barrier after which tile i is there and its predecessor is not needed any more.
  __device__ __forceinline__ void wait_for_tile(int slot, int i) {
    if (p_.stages == 1) {
      __syncthreads();
      this->start_copy(slot, i, 0);
      tile::commit_copies();
    }
    if (p_.stages == 3) {
      tile::wait_copies<1>();
    } else {
      tile::wait_copies<0>();
    }
    __syncthreads();
    if constexpr (C::kBytes) {
      this->template widen<0>(stage_);
      this->template widen<1>(stage_);
      __syncthreads();
    }
  }

  // Keys [first, first + kStepKeys) of the tile at stage_.
  __device__ __forceinline__ void step(int slot, const KeyTile<C>& keys, int first) {
    Scores s;
    multiply_keys(first, s);
    const float* scales = shared_.scale[C::kBytes ? stage_ : 0][0] + first;
    if (C::kBytes && p_.call.k.token_scales != nullptr) scale_columns(scales, s);
    if constexpr (C::kGeneral) modify(shared_.task[slot].segment, keys.first + first, s);
    if (keys.masked) mask(keys.first + first, s);
    softmax(s);
    if (C::kBytes && kScaleWeights && p_.call.v.token_scales != nullptr) {
      scale_columns(scales + C::kKeys, s);
    }
    Weights weights;
    pack(s, weights);
    multiply_values(first, weights);
  }

  // Keys of the batch after the one that tile i is in.
  __device__ __forceinline__ void look_up_next(int slot, int i) {
    const int first = i / C::kBatch * C::kBatch + C::kBatch;
    if (first < shared_.task[slot].count) look_up(p_, shared_, slot, first);
  }

  // Starts copying tile i, which may be the next segment's. One group of copies, empty or not.
  __device__ __forceinline__ void copy_ahead(int slot, int i, int count, bool runs_on) {
    const bool here = i < count;
    if (here || runs_on) {
      this->start_copy(here ? slot : slot ^ 1, here ? i : i - count,
                       stage_ > 0 ? stage_ - 1 : p_.stages - 1);
    }
    tile::commit_copies();
  }

  static __device__ __forceinline__ int warp_row() { return warp() * 16 * C::kMTiles; }

  // Operands of 16 columns of Q K^T.
  struct KeyOperands {
    std::uint32_t a[C::kMTiles][4];
    std::uint32_t b[kNTiles / 2][4];
    __device__ __forceinline__ void load(std::uint32_t query, std::uint32_t key, int column) {
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        tile::load_matrices(a[mt], tile::at_column(query, column) + mt * 16 * C::kPitchK);
      }
#pragma unroll
      for (int n = 0; n < kNTiles / 2; ++n) {
        tile::load_matrices(b[n], tile::at_column(key, column) + n * 16 * C::kPitchK);
      }
    }
    __device__ __forceinline__ void multiply(Scores& s) const {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          C::Type::multiply(s[mt][n], a[mt], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  };

  __device__ __forceinline__ void multiply_keys(int first, Scores& s) {
    const std::uint32_t keys = C::kBytes ? this->wide_k() : this->template stage_at<0>(stage_);
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0F;
      }
    }
    std::uint32_t query = tile::opaque(tile::a_base(query_, warp_row(), C::kPitchK));
    std::uint32_t key = tile::opaque(tile::b_base(keys, 0, C::kPitchK)) +
                        static_cast<std::uint32_t>(first * C::kPitchK);
    // Four steps of 16 columns: 128 bytes, where addresses repeat. Past the last column the load
    // ahead reads something that nobody uses.
    const int rounds = (p_.layer.head_size + 63) / 64;
    KeyOperands operands[2];
    operands[0].load(query, key, 0);
    constexpr int kUnroll = C::kHeadK <= 128 ? C::kHeadK / 64 : 1;
#pragma unroll kUnroll
    for (int round = 0; round < (C::kHeadK <= 128 ? kUnroll : rounds); ++round) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (C::kHeadK > 128 || round * 4 + k < C::kHeadK / 16 - 1) {
          operands[(k + 1) % 2].load(query, key, 2 * k + 2);
        }
        operands[k % 2].multiply(s);
      }
      query += 128;
      key += 128;
    }
  }

  // Multiplies each key's column of S or P.
  __device__ __forceinline__ void scale_columns(const float* scales, Scores& s) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + lane() % 4 * 2 + n * 8);
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] *= e % 2 == 0 ? scale.x : scale.y;
      }
    }
  }

  // S -> P in place; updates (max_, sum_) and perhaps o_. All rows of a thread together, so that
  // their chains of dependent operations overlap.
  __device__ __forceinline__ void softmax(Scores& s) {
    const float to_log2 = C::kGeneral ? kLog2E : score_scale_ * kLog2E;
    float top[C::kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even = s[mt][0][2 * h];
        float odd = s[mt][0][2 * h + 1];
#pragma unroll
        for (int n = 1; n < kNTiles; ++n) {
          even = fmaxf(even, s[mt][n][2 * h]);
          odd = fmaxf(odd, s[mt][n][2 * h + 1]);
        }
        top[mt][h] = fmaxf(even, odd);
      }
    }
    bool rare = false;
#pragma unroll
    for (int d = 1; d <= 2; d *= 2) {
#pragma unroll
      for (int i = 0; i < C::kMTiles * 2; ++i) {
        top[i / 2][i % 2] = fmaxf(top[i / 2][i % 2], __shfl_xor_sync(~0U, top[i / 2][i % 2], d));
      }
    }
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const float max = max_[i / 2][i % 2];
      rare |= (top[i / 2][i % 2] - max) * to_log2 > kSlack || !(fabsf(max) * to_log2 < kHuge);
    }
    if (__any_sync(~0U, rare)) rebase(top, to_log2, s);
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shift = scaled_shift(max_[mt][h], to_log2);
        float even = 0.0F;
        float odd = 0.0F;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          s[mt][n][2 * h] = tile::exp2_approx(fmaf(s[mt][n][2 * h], to_log2, -shift));
          s[mt][n][2 * h + 1] = tile::exp2_approx(fmaf(s[mt][n][2 * h + 1], to_log2, -shift));
          even += s[mt][n][2 * h];
          odd += s[mt][n][2 * h + 1];
        }
        sum_[mt][h] += even + odd;
      }
    }
  }

  // What P's exponents are relative to, max_, need not be the maximum: a row moves it when P would
  // pass 2^kSlack, so O is seldom rescaled. Each row decides for itself.
  static constexpr float kSlack = 8.0F;
  // From here on rounding the shift would move exponents by more than a sixteenth.
  static constexpr float kHuge = 1e6F;

  // 0 for a row that has seen nothing yet, and where rebase() has subtracted already.
  static __device__ __forceinline__ float scaled_shift(float max, float to_log2) {
    const float shift = max * to_log2;
    return fabsf(shift) < kHuge ? shift : 0.0F;
  }

  // Moves max_ where `top` has passed it by far; subtracts it from logits near the end of fp32's
  // range before anything can overflow.
  __device__ __forceinline__ void rebase(const float (&top)[C::kMTiles][2], float to_log2,
                                         Scores& s) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Without branches: they would cost registers.
        const float before = max_[mt][h];
        const bool moves = (top[mt][h] - before) * to_log2 > kSlack;
        const float max = moves ? top[mt][h] : before;
        const float alpha = moves ? tile::exp2_approx((before - max) * to_log2) : 1.0F;
        const bool huge = max != -INFINITY && !(fabsf(max) * to_log2 < kHuge);
        const float drop = huge ? max : 0.0F;
        max_[mt][h] = max;
        sum_[mt][h] *= alpha;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          o_[mt][n][2 * h] *= alpha;
          o_[mt][n][2 * h + 1] *= alpha;
        }
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          s[mt][n][2 * h] -= drop;
          s[mt][n][2 * h + 1] -= drop;
        }
      }
    }
  }

  // To natural logits, with soft cap, ALiBi and query-query bias.
  __device__ __forceinline__ void modify(const Segment& segment, int first, Scores& s) {
    if (p_.layer.alibi_slopes == nullptr && p_.batch.qq_bias == nullptr) {
      // cap * tanh(x): absolute error about 1e-7 of the cap, unlike tanh.approx's 5e-4.
      const float cap = p_.layer.soft_cap;
      const float in = score_scale_ / cap * (2.0F * kLog2E);
#pragma unroll
      for (int i = 0; i < C::kMTiles * kNTiles * 4; ++i) {
        float& x = s[i / (kNTiles * 4)][i / 4 % kNTiles][i % 4];
        x = fmaf(-2.0F * cap, tile::reciprocal_approx(tile::exp2_approx(x * in) + 1.0F), cap);
      }
      return;
    }
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      const int row = warp_row() + mt * 16 + lane() / 4;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        float(&x)[4] = s[mt][n];
        const float4 y =
            modify_scores(p_, shared_.rows, segment.tile.seq, row, first + n * 8 + lane() % 4 * 2,
                          make_float4(x[0] * score_scale_, x[1] * score_scale_, x[2] * score_scale_,
                                      x[3] * score_scale_));
        x[0] = y.x;
        x[1] = y.y;
        x[2] = y.z;
        x[3] = y.w;
      }
    }
  }

  // Keys [first + begin, first + end) as bits.
  static __device__ __forceinline__ std::uint64_t key_bits(int begin, int end) {
    begin = min(max(begin, 0), C::kStepKeys);
    end = min(max(end, begin), C::kStepKeys);
    // Shifted in two steps: by 64 at once is undefined.
    return ~(~std::uint64_t{0} << (end / 2) << (end - end / 2)) &
           (~std::uint64_t{0} << (begin / 2) << (begin - begin / 2));
  }

  __device__ __forceinline__ void mask(int first, Scores& s) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int4 visible = shared_.rows.visible[warp_row() + mt * 16 + h * 8 + lane() / 4];
        const std::uint64_t seen = (key_bits(visible.x - first, visible.y - first) |
                                    key_bits(visible.z - first, visible.w - first)) >>
                                   (lane() % 4 * 2);
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((seen >> (n * 8 + e) & 1) == 0) s[mt][n][2 * h + e] = -INFINITY;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void pack(const Scores& s, Weights& weights) {
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int k = 0; k < C::kStepKeys / 16; ++k) {
        weights[mt][k][0] = C::Type::pack(s[mt][2 * k][0], s[mt][2 * k][1]);
        weights[mt][k][1] = C::Type::pack(s[mt][2 * k][2], s[mt][2 * k][3]);
        weights[mt][k][2] = C::Type::pack(s[mt][2 * k + 1][0], s[mt][2 * k + 1][1]);
        weights[mt][k][3] = C::Type::pack(s[mt][2 * k + 1][2], s[mt][2 * k + 1][3]);
      }
    }
  }

  // Operands of 32 columns of P V for 16 keys.
  struct ValueOperands {
    std::uint32_t b[2][4];
    __device__ __forceinline__ void load(std::uint32_t value, int i) {
      constexpr int kGroups = kColumnTiles / 4;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        tile::load_matrices_transposed(
            b[n], tile::at_column(value, i % kGroups * 4 + n * 2) + i / kGroups * 16 * C::kPitchV);
      }
    }
  };

  __device__ __forceinline__ void multiply_values(int first, const Weights& weights) {
    const std::uint32_t values = C::kBytes ? this->wide_v() : this->template stage_at<1>(stage_);
    const std::uint32_t value = tile::opaque(tile::a_base(values, 0, C::kPitchV)) +
                                static_cast<std::uint32_t>(first * C::kPitchV);
    constexpr int kGroups = kColumnTiles / 4;
    ValueOperands operands[2];
    operands[0].load(value, 0);
#pragma unroll
    for (int i = 0; i < C::kStepKeys / 16 * kGroups; ++i) {
      if (i + 1 < C::kStepKeys / 16 * kGroups) operands[(i + 1) % 2].load(value, i + 1);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          C::Type::multiply(o_[mt][i % kGroups * 4 + n], weights[mt][i / kGroups],
                            operands[i % 2].b[n / 2][n % 2 * 2],
                            operands[i % 2].b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }

  // ---- the end ------------------------------------------------------------------------------

  __device__ __forceinline__ void finish(const PrefillTask& task) {
    const float to_natural = C::kGeneral ? 1.0F : score_scale_;
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      float& sum = sum_[i / 2][i % 2];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      max_[i / 2][i % 2] *= to_natural;
    }
    Finisher<C::kRows, C::kThreads> finisher(p_, shared_.rows, shared_.finish);
    finisher.set_pass(task.first_column, task.columns);
    const Segment& segment = task.segment;
    if (segment.whole() && segment.tile.seed < 0 && finisher.stores_pairs() &&
        task.columns == C::kHeadV) {
      write(finisher, segment);
      return;
    }
    const Result result =
        finisher.slot(static_cast<std::int32_t>(blockIdx.x), segment.unit_begin > 0 ? 1 : 0);
    keep(segment, task.columns, result);
    __syncthreads();
    if (segment.whole()) {
      finisher.write(segment, result);
    } else {
      finisher.arrive(shared_.walker.sharers(segment), segment);
    }
  }

  // The result of a whole item, to its output rows.
  __device__ __forceinline__ void write(const Finisher<C::kRows, C::kThreads>& finisher,
                                        const Segment& segment) const {
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const int mt = i / 2;
      const int h = i % 2;
      const int r = warp_row() + mt * 16 + h * 8 + lane() / 4;
      if (r >= segment.tile.rows) continue;
      const float scale = finisher.closing_scale(r, max_[mt][h], sum_[mt][h], lane() % 4 == 0);
      std::uint32_t* row = finisher.output_row(r) + lane() % 4;
      const bool bf16 = p_.call.output_dtype == DType::kBFloat16;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const float x = o_[mt][n][2 * h] * scale;
        const float y = o_[mt][n][2 * h + 1] * scale;
        row[n * 4] = bf16 ? tile::BFloat16::pack(x, y) : tile::Half::pack(x, y);
      }
    }
  }

  // Registers -> rows of a slot.
  __device__ __forceinline__ void keep(const Segment& segment, int columns,
                                       const Result& to) const {
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const int mt = i / 2;
      const int h = i % 2;
      const int r = warp_row() + mt * 16 + h * 8 + lane() / 4;
      if (r >= segment.tile.rows) continue;
      if (lane() % 4 == 0) {
        to.max[r] = max_[mt][h];
        to.sum[r] = sum_[mt][h];
      }
      float* row = to.o + std::int64_t{r} * to.pitch + lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n * 8 >= columns) break;
        *reinterpret_cast<float2*>(row + n * 8) =
            make_float2(o_[mt][n][2 * h], o_[mt][n][2 * h + 1]);
      }
    }
  }

  float score_scale_;
  int stage_ = 0;  // of the next tile
  float o_[C::kMTiles][kColumnTiles][4];
  float max_[C::kMTiles][2];
  float sum_[C::kMTiles][2];
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    attention_prefill(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char memory[];
  PrefillAttention<C>(p, memory).run();
}

}  // namespace quire::cuda::sm80
