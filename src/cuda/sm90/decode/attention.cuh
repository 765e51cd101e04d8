// Attention for sequences of up to 8 to 40 query rows (decode, speculative decoding), limited by
// the reading of K and V.
//
//   loading warps (load.cuh): splits of the plan -> row tables, queries; K and V boxes -> a ring
//   one warpgroup, a kv tile of 64 keys after the other:
//     S^T = K Q^T -> mask, softmax -> P^T to shared memory -> O^T += V^T P^T
//   at an item's end (combine.cuh): O -> shared memory -> output or a partial
//   when all is done (fold.cuh): the partials of the item that it had the last kv tiles of -> output
//
// Products are transposed, since wgmma takes 64 rows at least of its first operand but any multiple
// of eight of the second: keys and value columns are rows, the few query rows columns.
//
// Weights are relative to a reference, the maximum of some kv tile, which a score must pass by 2^8
// for the warpgroup to find a new one (in fp32 and in 16 bits there is room for that). So a kv tile
// costs one barrier, which asks whether some score does, and no exchange.
//
// Barriers: full and empty of each tile in the ring, K and V in turn (full: the copies' bytes;
// empty: the four warps that multiply), of the published splits (empty: each thread of two loading
// warps and of those four) and of the row tables with their queries (full and empty: each thread).
// Named: 1, the warpgroup. What threads read or write themselves they give on themselves: one
// arrival of a lane behind __syncwarp() is as good, but compute-sanitizer's racecheck does not see
// it.
//
// Shared memory of a CTA at d128, 8 rows: the ring 96 KiB (six tiles of 16 KiB), O at an item's
// end 4 KiB, two queries 4 KiB, P^T twice 2 KiB, tables.
//
// Why this: a kv tile takes the warpgroup some 1,700 clocks; HBM delivers one to each of an H100's
// multiprocessors every 2,500, so that two CTAs are never what limits. One CTA of two warpgroups
// that took tiles in turn was slower, most with short sequences (256 of some 280 keys: 131 us, two
// CTAs 110): at an item's end both waited for each other.
#pragma once

#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/decode/combine.cuh"
#include "cuda/sm90/decode/load.cuh"
#include "cuda/sm90/mixed/combine_ranges.cuh"
#include "cuda/sm90/soft_cap.cuh"

namespace quire::cuda::sm90 {

template <class C>
class DecodeAttention {
 public:
  using Shared = DecodeShared<C>;
  using State = DecodeState<C>;
  using Team = typename C::Team;
  using SplitPlace = RingPlace<C::kSplitsAhead>;

  __device__ __forceinline__ DecodeAttention(const KernelParams& p, Shared& shared, int box_shift)
      : p_(p),
        shared_(shared),
        combine_(p, shared),
        box_shift_(box_shift),
        lane_(Team::lane()),
        warp_(__shfl_sync(~0U, Team::warp(), 0)),
        cap_(p.layer.soft_cap, SoftCap::factor(p.layer.soft_cap, combine_.score_scale_)),
        to_log2_(combine_.logit_scale_ * kLog2E) {}

  __device__ __forceinline__ void run() {
    // Before anything is stored: an output may lie where the write reads.
    ptx::await_launch();
    SplitPlace split_at;
    RingPlace<C::kRowsAhead> rows_at;
    for (;; split_at.next(), rows_at.next()) {
      split_at.wait_full(shared_.split_barriers);
      const PublishedSplit& published = shared_.splits[split_at.index];
      if (published.split.head < 0) break;
      rows_at.wait_full(shared_.row_barriers);
      table_ = &shared_.rows[rows_at.index];
      query_ = ptx::wgmma::descriptor_low(ptx::shared_address(shared_.query[rows_at.index]), 16);
      if constexpr (C::kInTeams) {
        work_in_team(published);
      } else {
        work(published);
      }
      // Each thread for itself: with one arrival for all, behind a barrier, the split was replaced
      // while warps that were behind still read it.
      split_at.arrive_empty(shared_.split_barriers);
      rows_at.arrive_empty(shared_.row_barriers);
    }
    if constexpr (!C::kInTeams) {
      if (holds_) fold();
    }
  }

 private:
  // ---- a split ----------------------------------------------------------------------------------

  __device__ __forceinline__ void work(const PublishedSplit& published) {
    const Split& split = published.split;
    DecodeEpilogue<C> epilogue(p_, *table_);
    epilogue.set_pass(0, C::kHeadSize);
    DecodeCombiner<C> combiner(p_, epilogue, shared_.combine);
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
      State state;
      attend(split, kv_tile, end, state);
      Emit emit{Emit::kPartial, {}, split.tile.prefix_row < 0 && epilogue.stores_pairs()};
      if (one_state && split.whole()) {
        emit.how = Emit::kWrite;
      } else if (!p_.layer.batch_invariant) {
        emit.how = Emit::kAwaited;
        emit.partial = awaited_rows<C>(p_.schedule, cta, split.kv_tile_begin > 0 ? 1 : 0);
      } else if (split.kv_tile_begin > 0) {
        emit.partial = combiner.partial(cta, ++num_partials);
      } else {
        emit.partial = combiner.partial(cta, 0);
        if (kv_tile > 0) emit.how = Emit::kCombine;
      }
      combine_.combine(epilogue, split, emit, state);
      kv_tile = end;
    } while (kv_tile < split.kv_tile_end);
    if (split.whole() && one_state) return;
    if (!p_.layer.batch_invariant) {
      if (split.kv_tile_end == split.tile.num_kv_tiles()) hold(published);
      return;
    }
    if (split.whole()) {
      epilogue.write(split, combiner.partial(cta, 0));
    } else {
      combiner.combine_if_last(published.item_ctas, split);
    }
    Team::sync();  // the combiner's memory is no longer read
  }

  // One of the teams of the mixed kernel: in the free mode, and results are plain rows of 16 bits.
  __device__ __forceinline__ void work_in_team(const PublishedSplit& published) {
    const Split& split = published.split;
    DecodeEpilogue<C> epilogue(p_, *table_);
    epilogue.set_pass(0, C::kHeadSize);
    State state;
    attend(split, split.kv_tile_begin, split.kv_tile_end, state);
    Emit emit{Emit::kWrite, {}, true};
    if (!split.whole()) {
      const int part = split.kv_tile_begin > 0 ? 1 : 0;
      emit = {Emit::kPartial, partial_rows<C::kRows>(p_.schedule, published.cta, part), true};
    }
    combine_.combine(epilogue, split, emit, state);
    if (!split.whole()) combine_ranges<C>(p_, published, shared_.combine.last);
  }

  // Keeps what fold() needs of an item that other CTAs have begun.
  __device__ __forceinline__ void hold(const PublishedSplit& published) {
    const RowTable<C::kRows>& rows = *table_;
    copy_words(&shared_.held, published);
    copy_words(&shared_.held_rows, rows);
    holds_ = true;
  }
  template <class T>
  static __device__ __forceinline__ void copy_words(T* to, const T& from) {
    static_assert(sizeof(T) % 4 == 0);
#pragma unroll 1
    for (int i = Team::thread(); i < static_cast<int>(sizeof(T) / 4); i += Team::kSize) {
      reinterpret_cast<std::uint32_t*>(to)[i] = reinterpret_cast<const std::uint32_t*>(&from)[i];
    }
  }
  __device__ __forceinline__ void fold() {
    Team::sync();
    DecodeEpilogue<C> epilogue(p_, shared_.held_rows);
    epilogue.set_pass(0, C::kHeadSize);
    PartialFold<C>(p_, epilogue, shared_.held, shared_.cta_step).run();
  }

  // The kv tiles [begin, end).
  __device__ __forceinline__ void attend(const Split& split, int begin, int end, State& state) {
#pragma unroll
    for (int h = 0; h < C::kColumns; ++h) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) state.o[h][i] = 0.0F;
    }
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      state.reference[i] = kNoReference;
      state.sum[i] = 0.0F;
    }
    if (C::kUnmappedApart) {
      for (int row = lane_; row < C::kRows; row += 32) {
        num_unmapped(row) = 0.0F;
        if (C::kKv8) value_log2(row) = 0.0F;
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int kv_tile = begin; kv_tile < end; ++kv_tile) {
      const int first = split.tile.kv_tile(kv_tile) * kKvTile;
      if constexpr (C::kKv8) {
        attend_byte_tile(first, state);
      } else {
        attend_tile(first, state);
      }
    }
  }

  // ---- a kv tile --------------------------------------------------------------------------------

  __device__ __forceinline__ void attend_tile(int first, State& state) {
    Scores s;
    tile_.wait_full(shared_.tile_barriers);
    multiply_keys(s);
    if constexpr (C::kSoftCap) {
#pragma unroll
      for (float& score : s) score = cap_(score);
    }
    const std::uint32_t unmapped = C::kUnmappedApart ? shared_.unmapped[tile_.index] : 0U;
    give_tile_back();
    if (!all_visible(first)) {
      mask(first, s);
      clear_values(first);
    }
    if (C::kUnmappedApart && unmapped != 0) set_unmapped_apart(unmapped, s);
    soften(s, state);
    tile_.wait_full(shared_.tile_barriers);
    multiply_values(state);
    give_tile_back();
    weights_ ^= 1;
  }

  // To the loader; the next one is next.
  __device__ __forceinline__ void give_tile_back() {
    if (!C::kUnmappedApart) __syncwarp();
    if (C::kUnmappedApart || lane_ == 0) tile_.arrive_empty(shared_.tile_barriers);
    tile_.next();
  }

  // Whether every row sees all keys of the tile.
  __device__ __forceinline__ bool all_visible(int first) const {
    const int4 common = *reinterpret_cast<const int4*>(table_->common);
    return (first >= common.z && first + kKvTile <= common.w) ||
           (first >= common.x && first + kKvTile <= common.y);
  }

  using Scores = float[C::kRows / 2];

  // For 8-bit caches: byte_tile.cuh.
  __device__ __forceinline__ void attend_byte_tile(int first, State& state);
  __device__ __forceinline__ void multiply_byte_keys(const ByteKeys<C::kHeadSize>& keys,
                                                     Scores& s) const;
  __device__ __forceinline__ void multiply_byte_values(const ByteValues<C::kHeadSize>& values,
                                                       State& state) const;
  __device__ __forceinline__ void scale_scores(float2 key_scales, Scores& s) const;
  __device__ __forceinline__ bool weigh_scaled(const Scores& s, const State& state,
                                               float (&sum)[State::kOwnRows]) const;
  __device__ __forceinline__ void find_value_log2(const Scores& s, const State& state,
                                                  float (&log2_change)[State::kOwnRows]);
  __device__ __forceinline__ float& value_log2(int row) const {
    return shared_.value_log2[warp_][row];
  }
  __device__ __forceinline__ bool scales_values() const {
    return C::kKv8 && p_.v.token_scales != nullptr;
  }

  __device__ __forceinline__ std::uint32_t tile_address() const {
    return ptx::shared_address(shared_.tiles[tile_.index]);
  }
  __device__ __forceinline__ std::uint32_t weights_address() const {
    return ptx::shared_address(shared_.weights[weights_]);
  }

  __device__ __forceinline__ void multiply_keys(Scores& s) const {
    const std::uint32_t k = ptx::wgmma::descriptor_low(tile_address(), 16);
    ptx::wgmma::fence();
#pragma unroll
    for (int i = 0; i < C::kHeadSize / 16; ++i) {
      ptx::wgmma::multiply<typename C::Type, C::kRows, 0, 0>(
          s, ptx::wgmma::swizzled(k, i / 4 * 1024 + i % 4 * 32, C::kGroupBytes),
          ptx::wgmma::swizzled(query_, i / 4 * C::kRows * 128 + i % 4 * 32, 1024), i > 0);
    }
    ptx::wgmma::commit();
    ptx::wgmma::wait<0>();
    ptx::wgmma::keep(s);
  }

  // P^T lies without swizzle, key by key in groups of eight rows: there, unlike what wgmma.cuh says
  // of the swizzled ones, `lead` goes from eight keys to the next and `stride` from eight rows.
  __device__ __forceinline__ void multiply_values(State& state) const {
    const std::uint32_t v = ptx::wgmma::descriptor_low(tile_address(), 1024);
    const std::uint32_t weights = ptx::wgmma::descriptor_low(weights_address(), 128);
    ptx::wgmma::fence();
#pragma unroll
    for (int i = 0; i < kKvTile / 16; ++i) {
#pragma unroll
      for (int h = 0; h < C::kColumns; ++h) {
        ptx::wgmma::multiply<typename C::Type, C::kRows, 1, 1>(
            state.o[h], ptx::wgmma::swizzled(v, h * 1024 + i * 2 * C::kGroupBytes, C::kGroupBytes),
            ptx::wgmma::unswizzled(weights, i * 256, 1024), true);
      }
    }
    ptx::wgmma::commit();
    ptx::wgmma::wait<0>();
#pragma unroll
    for (int h = 0; h < C::kColumns; ++h) ptx::wgmma::keep(state.o[h]);
  }

  // Element i of the scores is of this row and key of the tile.
  __device__ __forceinline__ int row_of(int i) const {
    return i / 4 * 8 + ptx::fragment_column(lane_, i % 4);
  }
  __device__ __forceinline__ int key_of(int i) const {
    return warp_ * 16 + ptx::fragment_row(lane_, i % 4);
  }
  // The same row's index among the thread's own.
  static __device__ __forceinline__ constexpr int own_row(int i) { return i / 4 * 2 + i % 2; }

  __device__ __forceinline__ void mask(int first, Scores& s) const {
#pragma unroll
    for (int i = 0; i < C::kRows / 2; ++i) {
      if (!sees(table_->visible[row_of(i)], first + key_of(i))) s[i] = -INFINITY;
    }
  }

  // Rows of V that may not be read may hold NaN, which a weight of 0 does not hide.
  __device__ __forceinline__ void clear_values(int first) {
    const LoadableKeys& keys = table_->keys;
    const bool may_read_all =
        first + kKvTile <= keys.kv_len &&
        (first + kKvTile <= keys.out_of_window_begin || first >= keys.out_of_window_end ||
         keys.out_of_window_begin >= keys.out_of_window_end);
    if (may_read_all) return;
    tile_.wait_full(shared_.tile_barriers);
    const int key = Team::thread() / 2;
    if (!table_->may_read(first + key)) {
      // A row of eight keys of a column, and columns.
      constexpr int kRowBytes = C::kKv8 ? C::kHeadSize : 128;
      constexpr int kColumns = C::kKv8 ? 1 : C::kColumns;
      const std::uint32_t row =
          tile_address() +
          static_cast<std::uint32_t>(key / 8 * C::kGroupBytes + key % 8 * kRowBytes +
                                     Team::thread() % 2 * (kRowBytes / 2));
#pragma unroll
      for (int h = 0; h < kColumns; ++h) {
#pragma unroll
        for (int i = 0; i < kRowBytes / 2; i += 16) {
          ptx::store_piece(row + static_cast<std::uint32_t>(h * 1024 + i), 0, 0, 0, 0);
        }
      }
    }
    if (C::kKv8) {
      Team::sync();
    } else {
      ptx::fence_async_proxy();  // soften() has a barrier
    }
  }

  // Unmapped keys, those whose block does not exist, read as zeros: they have weight but no value.
  // In fp16 they must not set the reference, or the weights of all other keys could underflow and
  // the whole output with them. Their scores are 0 (NaN for a NaN query), so counting them is
  // enough. (In bf16 weights have the range of fp32.)
  __device__ __forceinline__ void set_unmapped_apart(std::uint32_t unmapped, Scores& s) const {
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      float count = 0.0F;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int element = i / 2 * 4 + i % 2 + 2 * j;
        const bool is_unmapped = ((unmapped >> (key_of(element) >> box_shift_)) & 1U) != 0;
        if (is_unmapped && s[element] != -INFINITY) {
          count += 1.0F + s[element];
          s[element] = -INFINITY;
        }
      }
      count = over_keys(count);
      if (lane_ < 4) num_unmapped(row_of(i / 2 * 4 + i % 2)) += count;
    }
  }
  __device__ __forceinline__ float& num_unmapped(int row) const {
    return shared_.num_unmapped[warp_][row];
  }

  // Scores -> weights in shared memory, and what follows for the state.
  __device__ __forceinline__ void soften(const Scores& s, State& state) {
    float sum[State::kOwnRows];
    // A second time rarely, after a row's first few kv tiles. 8-bit caches: by a loop, which takes
    // fewer registers there and more elsewhere.
#pragma unroll 1
    for (;;) {
      const bool passes = weigh(s, state, sum);
      ptx::fence_async_proxy();
      if (!Team::any(passes)) break;
      find_reference(s, state);
      if (C::kKv8) continue;
      weigh(s, state, sum);
      ptx::fence_async_proxy();
      Team::sync();
      break;
    }
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) state.sum[i] += sum[i];
  }

  // Weights and their sums. Whether one is so large that there must be a new reference. The
  // difference comes first: logits near the end of fp32's range do not overflow then.
  __device__ __forceinline__ bool weigh(const Scores& s, const State& state,
                                        float (&sum)[State::kOwnRows]) const {
    if (scales_values()) return weigh_scaled(s, state, sum);
    const std::uint32_t to = own_weights();
    float most = 0.0F;
#pragma unroll
    for (int g = 0; g < C::kRows / 8; ++g) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = weight_log2(s[4 * g + e], state.reference[2 * g + e % 2]);
        most = fmaxf(most, x);
        w[e] = ptx::exp2_approx(x);
      }
      sum[2 * g] = w[0] + w[2];
      sum[2 * g + 1] = w[1] + w[3];
      store_weights(to, g, w);
    }
    return most > kMostWeightLog2;
  }

  static constexpr float kMostWeightLog2 = 8.0F + C::kWeightLog2;
  __device__ __forceinline__ float weight_log2(float score, float reference) const {
    const float x = score - reference;
    return C::kWeightLog2 == 0 ? x * to_log2_ : fmaf(x, to_log2_, C::kWeightLog2);
  }
  // Where the thread's weights of the first eight rows are, and those of rows from 8 g on.
  __device__ __forceinline__ std::uint32_t own_weights() const {
    return weights_address() +
           static_cast<std::uint32_t>((warp_ * 16 + ptx::fragment_row(lane_)) * 16 +
                                      ptx::fragment_column(lane_) * 2);
  }
  static __device__ __forceinline__ void store_weights(std::uint32_t to, int g,
                                                       const float (&w)[4]) {
    ptx::store_word(to + g * 1024, C::Type::pack(w[0], w[1]));
    ptx::store_word(to + g * 1024 + 128, C::Type::pack(w[2], w[3]));
  }

  // The tile's maxima, where they are above the references, become the new ones.
  __device__ __forceinline__ void find_reference(const Scores& s, State& state) {
    float(&maxima)[kWarpgroupWarps][C::kRows] = shared_.sum;
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      const int element = i / 2 * 4 + i % 2;
      float max = fmaxf(s[element], s[element + 2]);
      for (int d = 4; d < 32; d *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, d));
      if (lane_ < 4) maxima[warp_][row_of(element)] = max;
    }
    Team::sync();
    float log2_change[State::kOwnRows];  // of what weights are relative to
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      const int row = row_of(i / 2 * 4 + i % 2);
      const float before = state.reference[i];
      float max =
          fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row]));
      max = fmaxf(max, before);
      log2_change[i] = (before - max) * to_log2_;
      state.reference[i] = max;
      state.sum[i] *= ptx::exp2_approx(log2_change[i]);
    }
    if (scales_values()) find_value_log2(s, state, log2_change);
#pragma unroll
    for (int i = 0; i < State::kOwnRows; ++i) {
      const float alpha = ptx::exp2_approx(log2_change[i]);
#pragma unroll
      for (int h = 0; h < C::kColumns; ++h) {
        state.o[h][i / 2 * 4 + i % 2] *= alpha;
        state.o[h][i / 2 * 4 + i % 2 + 2] *= alpha;
      }
    }
  }

  const KernelParams& p_;
  Shared& shared_;
  DecodeCombine<C> combine_;
  const int box_shift_;  // log2 of the keys of a box
  int lane_;
  const int warp_;     // of the warpgroup
  const SoftCap cap_;  // unless C::kSoftCap not used
  const float to_log2_;
  RingPlace<Shared::kTiles> tile_;         // K or V, whichever is next
  DecodeRows<C::kRows>* table_ = nullptr;  // of the split at work
  float2 value_scales_;                    // of the thread's keys of the tile, if tokens have such
  bool holds_ = false;                     // DecodeShared::held
  int weights_ = 0;          // which buffer: in the other a warp that is behind may still multiply
  std::uint32_t query_ = 0;  // likewise, as a descriptor's low word
};

}  // namespace quire::cuda::sm90

#include "cuda/sm90/decode/byte_tile.cuh"

namespace quire::cuda::sm90 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    attention_decode(const __grid_constant__ KernelParams p, const __grid_constant__ KvMaps maps) {
  extern __shared__ __align__(1024) char decode_memory[];
  auto& shared = *reinterpret_cast<DecodeShared<C>*>(decode_memory);
  if (threadIdx.x == 0) init_barriers(p, shared);
  __syncthreads();
  if (ptx::warpgroup_index() == 0) {
    if constexpr (C::kMovesRegisters) ptx::take_registers<C::kMultiplierRegisters>();
    DecodeAttention<C>(p, shared, 31 - __clz(maps.box_keys)).run();
  } else {
    if constexpr (C::kMovesRegisters) ptx::give_registers<C::kLoaderRegisters>();
    DecodeLoader<C>(p, maps, shared).run(static_cast<int>(threadIdx.x / 32) % kWarpgroupWarps);
  }
}

}  // namespace quire::cuda::sm90
