// Attention for sequences of many query rows, on mma.sync tensor cores: FlashAttention-2's loop
// over a paged cache.
//
//   prepare (a split ahead) -> ring of kv tiles' addresses -> cp.async K and V (`stages` deep)
//   -> S = Q K^T -> mask, softmax in registers -> O += P V -> output, straight from registers
//
// Each warp has its own 16 or 32 query rows and all keys of a tile; nothing is exchanged between
// warps. One barrier a tile: behind it tile i has arrived and no warp reads tile i-1 any more, so
// tile i-1+stages can take its place. Copies run on into the next split while this one ends; after
// a barrier at its end the next queries take the place of these. Within a tile, operands are loaded
// from shared memory one step ahead of the products.
//
// 8-bit caches: a thread widens the very bytes it copied, between two barriers. A token's own K
// scale multiplies its column of S in fp32 (rounded into K it would cost a bit of every logit). Its
// V scale multiplies P in bf16, which holds every product; in fp16 tiny ones would be lost, so
// there it goes into the widened V.
//
// Why these tiles: 128 rows make 4 * 64 * 128 * 128 flops of the 32 KiB of a tile of 64 keys at
// d128: 128 a byte that comes from L2. Fewer rows read every key more often. config.cuh says how
// rows are spread over warps and why.
#pragma once

#include "cuda/sm80/prefill/rows.cuh"
#include "cuda/sm80/unmapped.cuh"

namespace quire::cuda::sm80 {

template <class C>
class PrefillAttention : PrefillRows<C> {
  using Base = PrefillRows<C>;
  using Base::kColumnTiles;
  using Base::kNTiles;
  using Base::kScaleWeights;
  using Base::lane;
  using Base::max_;
  using Base::o_;
  using Base::p_;
  using Base::query_;
  using Base::score_scale_;
  using Base::shared_;
  using Base::sum_;
  using Base::warp;
  using Base::warp_row;
  using typename Base::Scores;
  using typename Base::Weights;

 public:
  __device__ __forceinline__ PrefillAttention(const KernelParams& p, char* memory)
      : Base(p, memory) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      shared_.queue = WorkQueue(p_.schedule, static_cast<std::int32_t>(blockIdx.x),
                                static_cast<std::int32_t>(gridDim.x));
    }
    if (warp() == 0) prepare(p_, shared_, 0);
    __syncthreads();
    int turn = 0;
    bool primed = false;
    while (shared_.task[turn].exists) {
      const PrefillTask& task = shared_.task[turn];
      fill_rows<PrefillTeam<C>>(p_, task.split, task.kv_head, shared_.rows);
      if (!primed) prime(turn);
      if (!this->copies_queries()) {
        this->load_queries(p_, task, query_);
      } else if (!primed) {
        this->copy_queries(task);
      }
      primed = attend(turn);
      if (primed && this->copies_queries()) this->copy_queries(shared_.task[turn ^ 1]);
      store_results(task);
      __syncthreads();
      turn ^= 1;
    }
    ptx::wait_copies<0>();
  }

 private:
  // ---- the loop -----------------------------------------------------------------------------

  // The first copies of a split that the one before it has not started.
  __device__ __forceinline__ void prime(int turn) {
    const int count = shared_.task[turn].count;
#pragma unroll 1
    for (int i = 0; i < p_.pipeline_stages - 1 && i < count; ++i) {
      const int stage =
          stage_ + i < p_.pipeline_stages ? stage_ + i : stage_ + i - p_.pipeline_stages;
      this->start_copy(turn, i, stage);
    }
  }

  // A split's tiles into (o_, max_, sum_). Returns whether the next split's copies are under
  // way (then only its queries are missing).
  __device__ __forceinline__ bool attend(int turn) {
    this->clear();
    const int count = shared_.task[turn].count;
    const int ahead = p_.pipeline_stages - 1;
    const int prepare_at = max(count - 1 - ahead, 0);
    bool runs_on = false;
    ptx::commit_copies();
    ptx::wait_copies<0>();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (warp() == 0) {
        if (i == prepare_at) prepare(p_, shared_, turn ^ 1);
        if (i % C::kBatch == 2) look_up_next(turn, i);
      }
      wait_for_tile(turn, i);
      if (i == prepare_at) {
        const PrefillTask& next = shared_.task[turn ^ 1];
        runs_on = ahead > 0 && next.exists && count >= ahead && next.count >= ahead;
      }
      if (ahead > 0) copy_ahead(turn, i + ahead, count, runs_on);
      const KvTile<C>& keys = shared_.ring[turn][i % C::kRing];
#pragma unroll 1
      for (int first = 0; first < C::kKeys; first += C::kStepKeys) {
        if (step(turn, keys, first)) break;
      }
      if (++stage_ == p_.pipeline_stages) stage_ = 0;
    }
    if (count == 0 && warp() == 0) prepare(p_, shared_, turn ^ 1);
    __syncthreads();  // no warp reads these queries any more
    return runs_on;
  }

  // Ends with a barrier behind which tile i has arrived and no warp reads tile i-1 any more.
  __device__ __forceinline__ void wait_for_tile(int turn, int i) {
    if (p_.pipeline_stages == 1) {
      __syncthreads();
      this->start_copy(turn, i, 0);
      ptx::commit_copies();
    }
    if (p_.pipeline_stages == 3) {
      ptx::wait_copies<1>();
    } else {
      ptx::wait_copies<0>();
    }
    __syncthreads();
    if constexpr (C::kKv8) {
      this->template widen<0>(stage_);
      this->template widen<1>(stage_);
      __syncthreads();
    }
  }

  // Keys [first, first + kStepKeys) of the tile at stage_. Returns whether no row sees more of it.
  __device__ __forceinline__ bool step(int turn, const KvTile<C>& keys, int first) {
    Scores s;
    const bool last = keys.count <= C::kStepKeys;
    multiply_keys(first, s);
    const float* scales = shared_.scale[C::kKv8 ? stage_ : 0][0] + first;
    if (C::kKv8 && p_.k.token_scales != nullptr) this->scale_columns(scales, s);
    if constexpr (C::kScoreMod) this->modify(shared_.task[turn].split, keys.first + first, s);
    if (keys.masked) this->mask(keys.first + first, s);
    if constexpr (C::kUnmappedApart) {
      const auto unmapped = static_cast<std::uint32_t>(keys.unmapped >> first);
      if (unmapped != 0) {
        set_unmapped_apart(unmapped, C::kScoreMod ? 1.0F : score_scale_, s,
                           shared_.unmapped_max + warp_row(), shared_.unmapped_sum + warp_row());
      }
    }
    this->softmax(s);
    if (C::kKv8 && kScaleWeights && p_.v.token_scales != nullptr) {
      this->scale_columns(scales + C::kKeys, s);
    }
    Weights weights;
    this->pack(s, weights);
    multiply_values(first, weights);
    return last;
  }

  // The addresses of the batch of tiles after the one that tile i is in.
  __device__ __forceinline__ void look_up_next(int turn, int i) {
    const int first = i / C::kBatch * C::kBatch + C::kBatch;
    if (first < shared_.task[turn].count) look_up(p_, shared_, turn, first);
  }

  // Starts copying tile i, which may be the next split's. One group of copies, empty or not.
  __device__ __forceinline__ void copy_ahead(int turn, int i, int count, bool runs_on) {
    const bool here = i < count;
    if (here || runs_on) {
      this->start_copy(here ? turn : turn ^ 1, here ? i : i - count,
                       stage_ > 0 ? stage_ - 1 : p_.pipeline_stages - 1);
    }
    ptx::commit_copies();
  }

  // Operands of 16 columns of Q K^T.
  struct KeyOperands {
    std::uint32_t a[C::kMTiles][4];
    std::uint32_t b[kNTiles / 2][4];
    __device__ __forceinline__ void load(std::uint32_t query, std::uint32_t key, int column) {
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        ptx::load_matrices(a[mt], ptx::at_column(query, column) + mt * 16 * C::kPitchK);
      }
#pragma unroll
      for (int n = 0; n < kNTiles / 2; ++n) {
        ptx::load_matrices(b[n], ptx::at_column(key, column) + n * 16 * C::kPitchK);
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
    const std::uint32_t keys = C::kKv8 ? this->wide_k() : this->template stage_at<0>(stage_);
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0F;
      }
    }
    std::uint32_t query = ptx::opaque(ptx::a_base(query_, warp_row(), C::kPitchK));
    std::uint32_t key = ptx::opaque(ptx::b_base(keys, 0, C::kPitchK)) +
                        static_cast<std::uint32_t>(first * C::kPitchK);
    // Four steps of 16 columns: 128 bytes, where addresses repeat.
    const int rounds = (p_.layer.head_size + 63) / 64;
    KeyOperands operands[2];
    operands[0].load(query, key, 0);
    constexpr int kUnroll = C::kHeadSizeK <= 128 ? C::kHeadSizeK / 64 : 1;
#pragma unroll kUnroll
    for (int round = 0; round < (C::kHeadSizeK <= 128 ? kUnroll : rounds); ++round) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (C::kHeadSizeK > 128 ? k < 3 || round + 1 < rounds
                                : round * 4 + k < C::kHeadSizeK / 16 - 1) {
          operands[(k + 1) % 2].load(query, key, 2 * k + 2);
        }
        operands[k % 2].multiply(s);
      }
      query += 128;
      key += 128;
    }
  }

  // Operands of 32 columns of P V for 16 keys.
  struct ValueOperands {
    std::uint32_t b[2][4];
    __device__ __forceinline__ void load(std::uint32_t value, int i) {
      constexpr int kColumns32 = kColumnTiles / 4;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        ptx::load_matrices_transposed(b[n], ptx::at_column(value, i % kColumns32 * 4 + n * 2) +
                                                i / kColumns32 * 16 * C::kPitchV);
      }
    }
  };

  __device__ __forceinline__ void multiply_values(int first, const Weights& weights) {
    const std::uint32_t values = C::kKv8 ? this->wide_v() : this->template stage_at<1>(stage_);
    const std::uint32_t value = ptx::opaque(ptx::a_base(values, 0, C::kPitchV)) +
                                static_cast<std::uint32_t>(first * C::kPitchV);
    constexpr int kColumns32 = kColumnTiles / 4;
    ValueOperands operands[2];
    operands[0].load(value, 0);
#pragma unroll
    for (int i = 0; i < C::kStepKeys / 16 * kColumns32; ++i) {
      if (i + 1 < C::kStepKeys / 16 * kColumns32) operands[(i + 1) % 2].load(value, i + 1);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          C::Type::multiply(o_[mt][i % kColumns32 * 4 + n], weights[mt][i / kColumns32],
                            operands[i % 2].b[n / 2][n % 2 * 2],
                            operands[i % 2].b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }

  // ---- the end ------------------------------------------------------------------------------

  __device__ __forceinline__ void store_results(const PrefillTask& task) {
    const float to_natural = C::kScoreMod ? 1.0F : score_scale_;
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      float& sum = sum_[i / 2][i % 2];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      max_[i / 2][i % 2] *= to_natural;
    }
    if constexpr (C::kUnmappedApart) combine_unmapped();
    PrefillEpilogue<C> epilogue(p_, shared_.rows);
    epilogue.set_pass(task.first_column, task.columns);
    const Split& split = task.split;
    if (split.whole() && split.tile.prefix_row < 0 && epilogue.stores_pairs() &&
        task.columns == C::kHeadSizeV) {
      write(epilogue, split);
      return;
    }
    PrefillCombiner<C> combiner(p_, epilogue, shared_.combine);
    const PartialRows result =
        combiner.partial(static_cast<std::int32_t>(blockIdx.x), split.kv_tile_begin > 0 ? 1 : 0);
    store_partial(split, task.columns, result);
    __syncthreads();
    if (split.whole()) {
      epilogue.write(split, result);
    } else {
      combiner.combine_if_last(shared_.queue.item_ctas(split), split);
    }
  }

  // What unmapped keys weigh, to the rows' states.
  __device__ __forceinline__ void combine_unmapped() {
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const int r = warp_row() + i * 8 + ptx::fragment_row(lane());
      float& max = max_[i / 2][i % 2];
      float& sum = sum_[i / 2][i % 2];
      const float unmapped_max = shared_.unmapped_max[r];
      if (unmapped_max == -INFINITY) continue;
      Combine combine{max, sum};
      combine.add(unmapped_max, shared_.unmapped_sum[r]);
      max = combine.max;
      sum = combine.sum;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        o_[i / 2][n][i % 2 * 2] *= combine.weight_before;
        o_[i / 2][n][i % 2 * 2 + 1] *= combine.weight_before;
      }
    }
  }

  // Registers -> output rows, of a whole item.
  __device__ __forceinline__ void write(const PrefillEpilogue<C>& epilogue,
                                        const Split& split) const {
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const int mt = i / 2;
      const int h = i % 2;
      const int r = warp_row() + mt * 16 + h * 8 + ptx::fragment_row(lane());
      if (r >= split.tile.rows) continue;
      const float scale =
          epilogue.output_scale_of(r, max_[mt][h], sum_[mt][h], ptx::is_first_of_row(lane()));
      std::uint32_t* row = epilogue.output_row(r) + ptx::fragment_column(lane()) / 2;
      const bool bf16 = p_.output_dtype == DType::kBFloat16;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const float x = o_[mt][n][2 * h] * scale;
        const float y = o_[mt][n][2 * h + 1] * scale;
        row[n * 4] = bf16 ? ptx::BFloat16::pack(x, y) : ptx::Half::pack(x, y);
      }
    }
  }

  // Registers -> rows of a partial.
  __device__ __forceinline__ void store_partial(const Split& split, int columns,
                                                const PartialRows& to) const {
#pragma unroll
    for (int i = 0; i < C::kMTiles * 2; ++i) {
      const int mt = i / 2;
      const int h = i % 2;
      const int r = warp_row() + mt * 16 + h * 8 + ptx::fragment_row(lane());
      if (r >= split.tile.rows) continue;
      if (ptx::is_first_of_row(lane())) {
        to.max[r] = max_[mt][h];
        to.sum[r] = sum_[mt][h];
      }
      float* row = to.o + std::int64_t{r} * to.pitch + ptx::fragment_column(lane());
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n * 8 >= columns) break;
        *reinterpret_cast<float2*>(row + n * 8) =
            make_float2(o_[mt][n][2 * h], o_[mt][n][2 * h + 1]);
      }
    }
  }

  int stage_ = 0;  // of the next tile
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    attention_prefill(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char memory[];
  PrefillAttention<C>(p, memory).run();
}

}  // namespace quire::cuda::sm80
