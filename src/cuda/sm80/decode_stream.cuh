// The loading side of the decode kernel. Each warp loads what it will multiply itself: of every unit
// of 64 keys its own 16, in the order of the CTA's segments and running ahead into the next ones, so
// that memory never waits for an item's end.
//
//   walk (segments) -> look_up (block table entry, a unit ahead) -> fetch<K>, fetch<V> (cp.async
//   into a ring of `stages` units, one group each)
#pragma once

#include "cuda/kv_rows.cuh"
#include "cuda/sm80/decode_config.cuh"
#include "cuda/tile/fragments.cuh"

namespace quire::cuda::sm80 {

// Free functions rather than members: a call that gets `this` would force the whole object, with the
// accumulators, into memory.
static __device__ __noinline__ bool walk_on(const KernelParams& p, Walker& walker,
                                            AheadSegment& next) {
  if (!walker.next(p.schedule, &next.segment)) return false;
  const Segment& segment = next.segment;
  const KvParams& k = p.call.k;
  const KvParams& v = p.call.v;
  next.k_base = static_cast<const char*>(k.data) + segment.head * k.strides.head * size_of(k.dtype);
  next.v_base = static_cast<const char*>(v.data) + segment.head * v.strides.head * size_of(v.dtype);
  next.table = p.batch.block_table + segment.tile.seq * p.batch.table_stride;
  next.keys = loadable_keys(p, segment.tile);
  return true;
}

// Up to 8 elements of a query row from element `first` on.
template <class Type>
__device__ __noinline__ void store_query(DType dtype, std::uint32_t to, const char* row, int first,
                                         int elements, bool negate) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e >= elements) continue;
    // An fp8 query is widened to fp16, exactly.
    const std::uint32_t bits =
        size_of(dtype) == 2 ? reinterpret_cast<const std::uint16_t*>(row)[first + e]
                            : Type::pack(semantics::load_element(row, dtype, first + e), 0.0F);
    words[e / 2] |= bits << (e % 2 * 16);
  }
  const std::uint32_t sign = negate ? 0x80008000U : 0U;
  tile::store_piece(to, words[0] ^ sign, words[1] ^ sign, words[2] ^ sign, words[3] ^ sign);
}

template <class C>
class DecodeStream {
 protected:
  __device__ __forceinline__ explicit DecodeStream(const KernelParams& p)
      : p_(p),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        tiles_(tile::shared_address(memory()) + decode_fixed_bytes<C>()),
        regular_(!p.layer.paged || p.layer.block_size % C::kKeys == 0) {}

  // Named anew at each use, so that the compiler knows it for shared memory.
  static __device__ __forceinline__ char* memory() {
    extern __shared__ __align__(128) char decode_memory[];
    return decode_memory;
  }
  static __device__ __forceinline__ DecodeShared<C>& shared() {
    return *reinterpret_cast<DecodeShared<C>*>(memory());
  }

  // Shared addresses.
  __device__ __forceinline__ std::uint32_t query_at(int segment) const {
    return tiles_ + static_cast<std::uint32_t>(segment & 1) * C::kQueryBytes;
  }
  __device__ __forceinline__ std::uint32_t merge_at() const { return tiles_ + 2 * C::kQueryBytes; }
  __device__ __forceinline__ std::uint32_t slot_at(int stage, int side) const {
    const int warp_bytes = p_.stages * 2 * C::kSlotBytes + (C::kBytes ? C::kTileBytes : 0);
    return merge_at() + C::kMergeBytes +
           static_cast<std::uint32_t>(warp_ * warp_bytes + (stage * 2 + side) * C::kSlotBytes);
  }
  // 8-bit caches: K, then V of a unit in 16 bits.
  __device__ __forceinline__ std::uint32_t wide() const { return slot_at(p_.stages, 0); }

  __device__ __forceinline__ const AheadSegment& ahead(int n) const {
    return shared().ahead[warp_][n % kSegmentsAhead];
  }

  // ---- segments -------------------------------------------------------------------------------

  __device__ __forceinline__ void start_walk() {
    if (lane_ == 0) shared().walker[warp_] = Walker(p_.schedule, static_cast<int>(blockIdx.x));
    __syncwarp();
  }

  // Makes segment `n` known, if there is one.
  __device__ __forceinline__ bool walk_to(int n) {
    while (walked_ <= n && !walk_ended_) {
      bool more = false;
      if (lane_ == 0) {
        more = walk_on(p_, shared().walker[warp_], shared().ahead[warp_][walked_ % kSegmentsAhead]);
      }
      walk_ended_ = !__shfl_sync(~0U, static_cast<int>(more), 0);
      __syncwarp();
      if (!walk_ended_) ++walked_;
    }
    return n < walked_;
  }

  // Queries into shared memory; from 16-byte aligned rows asynchronously.
  __device__ __forceinline__ void load_queries(const Segment& segment, std::uint32_t to,
                                               bool negate) const {
    constexpr int kPieces = C::kPitch / 16;
    const int rows = (segment.tile.rows + 15) / 16 * 16;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kDecodeThreads) {
      const int r = i / kPieces;
      const int c = i % kPieces;
      const RowPlace place = row_place(p_, segment.tile, segment.head, r);
      const char* row =
          static_cast<const char*>(p_.call.query) +
          (place.token * p_.call.query_token_stride + place.head * p_.call.query_head_stride) *
              size_of(p_.layer.dtype);
      const int elements = r < segment.tile.rows ? min(p_.layer.head_size - c * 8, 8) : 0;
      const std::uint32_t at = to + tile::piece_offset(r, c, C::kPitch);
      if (p_.query_aligned && !negate) {
        tile::copy_async<16>(at, elements > 0 ? row + c * 16 : row, max(elements, 0) * 2);
      } else {
        store_query<typename C::Type>(p_.layer.dtype, at, row, c * 8, elements, negate);
      }
    }
  }

  // ---- units ----------------------------------------------------------------------------------

  // To the next unit to be loaded: unit `unit` of the segment that is being loaded (-1: its first) or,
  // if it has no such unit, a later segment's first.
  __device__ __forceinline__ void seek(int unit) {
    fetch_live_ = false;
    while (fetch_segment_ < segment_ + kSegmentsAhead && walk_to(fetch_segment_)) {
      const Segment& segment = ahead(fetch_segment_).segment;
      if (unit < 0) unit = segment.unit_begin;
      if (unit < segment.unit_end) {
        fetch_unit_ = unit;
        fetch_live_ = true;
        look_up();
        return;
      }
      ++fetch_segment_;
      unit = -1;
    }
  }

  __device__ __forceinline__ int fetch_key() const {
    return ahead(fetch_segment_).segment.tile.unit(fetch_unit_) * kUnitKeys + warp_ * C::kKeys;
  }

  // Which of the 16 keys from `first` on may be read.
  static __device__ __forceinline__ std::uint32_t readable(const LoadableKeys& keys, int first) {
    const auto below = [first](int end) { return (1U << min(max(end - first, 0), C::kKeys)) - 1U; };
    return below(keys.kv_len) & ~(below(keys.hidden_end) & ~below(keys.hidden_begin));
  }

  // Asks for the block table entry of the lane's key (of all keys, where blocks hold 16).
  __device__ __forceinline__ void look_up() {
    const AheadSegment& a = ahead(fetch_segment_);
    const int first = fetch_key();
    bits_ = readable(a.keys, first);
    entry_ = -1;
    if (!p_.layer.paged) {
      entry_ = 0;
      slot_ = static_cast<std::int32_t>(a.segment.tile.first_kv_row) + first;
      return;
    }
    const auto key = static_cast<std::uint32_t>(regular_ ? first : first + lane_ % C::kKeys);
    const auto block_size = static_cast<std::uint32_t>(p_.layer.block_size);
    const std::uint32_t logical = p_.block_shift >= 0 ? key >> p_.block_shift : key / block_size;
    slot_ = static_cast<std::int32_t>(key - logical * block_size);
    const bool wanted = regular_ ? bits_ != 0 : ((bits_ >> (lane_ % C::kKeys)) & 1U) != 0;
    if (wanted && logical < p_.batch.table_width) entry_ = a.table[logical];
  }

  // Offset of a key's row in elements; its block exists.
  __device__ __forceinline__ std::int64_t row_at(const KvParams& kv, int row) const {
    if (regular_) return entry_ * kv.strides.block + std::int64_t{slot_ + row} * kv.strides.slot;
    const int entry = __shfl_sync(~0U, entry_, row);
    const int slot = __shfl_sync(~0U, slot_, row);
    return entry * kv.strides.block + slot * kv.strides.slot;
  }

  // Starts the copy of K (side 0), then V (side 1) of the next unit into the stage that was just
  // used. Always ends a group, so that groups can be counted.
  template <int kSide>
  __device__ __forceinline__ void fetch() {
    if (fetch_live_ && fetched_ == consumed_ + p_.stages) fetch_into<kSide>(stage_);
    tile::commit_copies();
  }

  // Fills what is free of the ring: at the start, and where segments are so short that the ring
  // could not be kept full across them.
  __device__ __forceinline__ void refill() {
    for (int n = fetched_ - consumed_; n < p_.stages; ++n) {
      if (!fetch_live_) seek(-1);
      const bool live = fetch_live_;
      const int stage = stage_ + n < p_.stages ? stage_ + n : stage_ + n - p_.stages;
      if (live) fetch_into<0>(stage);
      tile::commit_copies();
      if (live) fetch_into<1>(stage);
      tile::commit_copies();
    }
  }

  template <int kSide>
  __device__ __forceinline__ void fetch_into(int stage) {
    if constexpr (kSide == 0) check_entries();
    copy<kSide>(stage);
    if constexpr (kSide == 1) {
      ++fetched_;
      seek(fetch_unit_ + 1);
    }
  }

  // The entries are there: keys of blocks that do not exist count as absent.
  __device__ __forceinline__ void check_entries() {
    const bool exists = entry_ >= 0 && (!p_.layer.paged || entry_ < p_.call.num_blocks);
    if (!exists) entry_ = 0;
    bits_ &= __ballot_sync(~0U, exists);
  }

  template <int kSide>
  __device__ __forceinline__ void copy(int stage) {
    constexpr int kRowStep = 32 / C::kPieces;
    static_assert(kRowStep >= 1 && C::kKeys % kRowStep == 0);
    const KvParams& kv = kSide == 0 ? p_.call.k : p_.call.v;
    const int size = kSide == 0 ? p_.layer.head_size : p_.layer.head_size_v;
    const char* base = kSide == 0 ? ahead(fetch_segment_).k_base : ahead(fetch_segment_).v_base;
    constexpr int kElement = C::kBytes ? 1 : 2;
    const int row = lane_ / C::kPieces;
    const int c = lane_ % C::kPieces;
    const int valid = min(max(size * kElement - c * 16, 0), 16);
    const std::uint32_t slot = slot_at(stage, kSide);
    const std::uint32_t to = slot + (C::kBytes ? static_cast<std::uint32_t>(lane_) * 16
                                               : tile::piece_offset(row, c, C::kPitch));
    if (valid > 0) base += c * 16;
    const int alignment = kSide == 0 ? p_.k_copy_bytes : p_.v_copy_bytes;
    const auto place = [&](int step) {
      // Rows of a step keep the low bits of the first step's.
      return C::kBytes ? to + step * 512
                       : (to ^ static_cast<std::uint32_t>((step * kRowStep & 7) << 4)) +
                             step * kRowStep * C::kPitch;
    };
    const auto bytes_of = [&](int r) { return ((bits_ >> r) & 1U) != 0 ? valid : 0; };
    if (regular_ && alignment >= 16) {
      const char* from = base + row_at(kv, row) * kElement;
      const std::int64_t step_bytes = kRowStep * kv.strides.slot * kElement;
#pragma unroll
      for (int step = 0; step < C::kKeys / kRowStep; ++step) {
        tile::copy_async<16>(place(step), from, bytes_of(row + step * kRowStep));
        from += step_bytes;
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < C::kKeys / kRowStep; ++step) {
        const int r = row + step * kRowStep;
        tile::copy_piece(place(step), base + row_at(kv, r) * kElement, bytes_of(r), alignment);
      }
    }
    if (C::kBytes && kv.token_scales != nullptr) copy_scale<kSide>(kv, stage);
  }

  template <int kSide>
  __device__ __forceinline__ void copy_scale(const KvParams& kv, int stage) {
    const int r = lane_ % C::kKeys;
    const int entry = regular_ ? entry_ : __shfl_sync(~0U, entry_, r);
    const int slot = regular_ ? slot_ + r : __shfl_sync(~0U, slot_, r);
    if (lane_ >= C::kKeys) return;
    const float* from =
        kv.token_scales + semantics::cache_offset(kv.token_scale_strides, entry, slot,
                                                  ahead(fetch_segment_).segment.head);
    const std::uint32_t to = tile::shared_address(&shared().scale[warp_][stage][kSide][r]);
    tile::copy_async<4>(to, from, ((bits_ >> r) & 1U) != 0 ? 4 : 0);
  }

  // Until the oldest of the ring's groups is there.
  __device__ __forceinline__ void wait_oldest() const {
    switch (p_.stages) {
      case 2: tile::wait_copies<3>(); break;
      case 4: tile::wait_copies<7>(); break;
      case 8: tile::wait_copies<15>(); break;
      default: tile::wait_copies<1>(); break;
    }
    __syncwarp();
  }

  const KernelParams& p_;
  const int lane_;
  const int warp_;
  const std::uint32_t tiles_;  // two query buffers, the merge area, each warp's ring
  const bool regular_;         // a warp's keys of a unit lie in one block
  int segment_ = -1;           // at work
  int consumed_ = 0;           // units
  int stage_ = 0;              // consumed_ % stages

 private:
  int walked_ = 0;
  int fetched_ = 0;  // units
  bool walk_ended_ = false;
  // The unit to be loaded next, and what is known of its keys.
  int fetch_segment_ = 0;
  int fetch_unit_ = 0;
  bool fetch_live_ = false;
  std::int32_t entry_ = -1;
  std::int32_t slot_ = 0;
  std::uint32_t bits_ = 0;
};

}  // namespace quire::cuda::sm80
