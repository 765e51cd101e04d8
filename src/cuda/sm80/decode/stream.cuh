// The loading side of the decode kernel. Each warp loads what it will multiply itself: of every kv
// tile of 64 keys its own 16, in the order of the CTA's splits and running ahead into the next
// ones, so that copies go on while an item ends.
//
//   seek (which kv tile) -> look_up (its block table entry, a kv tile ahead) -> fetch<K>, fetch<V>
//   (cp.async into a ring of `stages` kv tiles, a commit group each)
//
// Few instructions matter here, and few registers: a few warps a scheduler must keep up with
// memory. No call to a function that is not inlined: around one, registers are set aside in the
// whole loop.
#pragma once

#include "cuda/kernel/kv_address.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/widen.cuh"
#include "cuda/sm80/decode/config.cuh"

namespace quire::cuda::sm80 {

// ---- what happens once an item, by a whole warp ------------------------------------------------

// Makes split `n` known, if there is one.
static __device__ __forceinline__ bool know_split(const KernelParams& p, WarpStream& s, int n,
                                                  int lane) {
  while (s.num_known <= n && !s.all_known) {
    const int number = s.num_known;
    WorkIterator iterator = s.iterator;
    std::int32_t head = 0;
    std::int32_t begin = 0;
    std::int32_t end = 0;
    const WorkTile* tile = iterator.next(p.schedule, &head, &begin, &end);
    __syncwarp();
    Split& split = s.splits[number % kSplitsAhead];
    constexpr int kPieces = sizeof(WorkTile) / 16;
    static_assert(sizeof(WorkTile) % 16 == 0 && kPieces <= 32);
    if (tile != nullptr && lane < kPieces) {
      reinterpret_cast<uint4*>(&split.tile)[lane] = reinterpret_cast<const uint4*>(tile)[lane];
    }
    __syncwarp();
    if (lane == 0) {
      s.iterator = iterator;
      if (tile == nullptr) {
        s.all_known = true;
      } else {
        s.num_known = number + 1;
        split.head = head;
        split.kv_tile_begin = begin;
        split.kv_tile_end = end < 0 ? split.tile.num_kv_tiles() : end;
        split.stop = split.existing_end(keys_of(p, split.tile), kKvTile);
      }
    }
    __syncwarp();
  }
  return n < s.num_known;
}

// What belongs to the split that is loaded from now on. For one lane.
static __device__ __forceinline__ void enter(const KernelParams& p, WarpStream& s,
                                             const Split& split) {
  s.kv_tile = split.kv_tile_begin;
  s.keys = loadable_keys(p, split.tile);
  s.full_begin =
      s.keys.out_of_window_begin >= s.keys.out_of_window_end ? 0 : s.keys.out_of_window_end;
  s.full_end = s.keys.kv_len;
  s.base[0] = static_cast<const char*>(p.k.data) + split.head * p.k_head_bytes;
  s.base[1] = static_cast<const char*>(p.v.data) + split.head * p.v_head_bytes;
  s.table = p.batch.block_table + split.tile.seq * p.batch.table_stride;
  s.first_kv_row = static_cast<std::int32_t>(split.tile.first_kv_row);
}

// To the next kv tile from `s.kv_tile` of `s.split` on, before split `end`.
static __device__ __forceinline__ void seek(const KernelParams& p, WarpStream& s, int end, int warp,
                                            int lane) {
  for (;;) {
    const int number = s.split;
    const bool known = number < end && know_split(p, s, number, lane);
    const Split& split = s.splits[number % kSplitsAhead];
    const WorkTile& tile = split.tile;
    __syncwarp();
    if (lane == 0) {
      s.left = 0;
      if (known) {
        if (s.kv_tile < 0) enter(p, s, split);
        if (s.kv_tile < split.stop) {
          s.left =
              (s.kv_tile < tile.prefix_count ? min(tile.prefix_count, split.stop) : split.stop) -
              s.kv_tile;
          s.key = tile.kv_tile(s.kv_tile) * kKvTile + warp * (kKvTile / kDecodeWarps);
          s.kv_tile += s.left;
        } else {
          ++s.split;
          s.kv_tile = -1;
        }
      }
    }
    __syncwarp();
    if (!known || s.left > 0) return;
  }
}

// Up to 8 elements of a query row from element `first` on.
template <class Type>
__device__ __forceinline__ void store_query(DType dtype, std::uint32_t to, const char* row,
                                            int first, int elements, const QueryChange& change) {
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
  ptx::store_piece(to, change(words[0]), change(words[1]), change(words[2]), change(words[3]));
}

// One piece of each of the lane's rows of a K or V tile, with unmapped rows (`bits` says which are
// there) and any alignment. Lane r % 16 knows entry and slot of row r.
template <class C>
__device__ __forceinline__ void copy_rows(const KvParams& kv, const char* base,
                                          std::uint32_t stored, std::uint32_t bits, int entry,
                                          int slot, int row_bytes, int alignment) {
  const int lane = static_cast<int>(threadIdx.x & 31U);
  const int c = lane % C::kPieces;
  const int valid = min(max(row_bytes - c * 16, 0), 16);
#pragma unroll 1
  for (int r = lane / C::kPieces; r < C::kKeys; r += 32 / C::kPieces) {
    const std::int64_t offset =
        __shfl_sync(~0U, entry, r) * kv.strides.block + __shfl_sync(~0U, slot, r) * kv.strides.slot;
    const bool wanted = valid > 0 && ((bits >> r) & 1U) != 0;
    const char* from = wanted ? base + offset * (C::kKv8 ? 1 : 2) + c * 16 : base;
    const std::uint32_t to =
        stored + (C::kKv8 ? (r * C::kPieces + c) * 16 : ptx::piece_offset(r, c, C::kPitch));
    ptx::copy_piece(to, from, wanted ? valid : 0, alignment);
  }
}

template <class C>
class DecodeStream {
 protected:
  __device__ __forceinline__ explicit DecodeStream(const KernelParams& p)
      : p_(p),
        lane_(static_cast<int>(threadIdx.x & 31U)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        tiles_(ptx::shared_address(memory()) + decode_fixed_bytes<C>()),
        ring_(combine_area() + C::kCombineBytes +
              static_cast<std::uint32_t>(warp_ * warp_bytes())) {}

  // Named anew at each use, so that the compiler knows it for shared memory.
  static __device__ __forceinline__ char* memory() {
    extern __shared__ __align__(128) char decode_memory[];
    return decode_memory;
  }
  static __device__ __forceinline__ DecodeShared<C>& shared() {
    return *reinterpret_cast<DecodeShared<C>*>(memory());
  }
  __device__ __forceinline__ WarpStream& stream() const { return shared().stream[warp_]; }
  __device__ __forceinline__ const Split& split_at(int n) const {
    return stream().splits[n % kSplitsAhead];
  }

  // Shared addresses.
  __device__ __forceinline__ std::uint32_t query_at(int split) const {
    return tiles_ + static_cast<std::uint32_t>(split & 1) * C::kQueryBytes;
  }
  __device__ __forceinline__ std::uint32_t combine_area() const {
    return tiles_ + 2 * C::kQueryBytes;
  }
  __device__ __forceinline__ int warp_bytes() const {
    return p_.pipeline_stages * 2 * C::kStageBytes + (C::kKv8 ? C::kTileBytes : 0);
  }
  __device__ __forceinline__ std::uint32_t stage_at(int stage, int side) const {
    return ring_ + static_cast<std::uint32_t>((stage * 2 + side) * C::kStageBytes);
  }
  // 8-bit caches: K, then V of a kv tile in 16 bits.
  __device__ __forceinline__ std::uint32_t wide() const { return stage_at(p_.pipeline_stages, 0); }

  // ---- splits -------------------------------------------------------------------------------

  __device__ __forceinline__ void start() {
    if (lane_ == 0) {
      WarpStream& s = stream();
      s.iterator = WorkIterator(p_.schedule, static_cast<int>(blockIdx.x));
      s.num_known = 0;
      s.all_known = false;
      s.split = 0;
      s.kv_tile = -1;
    }
    const int shorter = min(p_.layer.head_size, p_.layer.head_size_v) * (C::kKv8 ? 1 : 2);
    for (int i = lane_ * 16;
         shorter < C::kStoredPitch && i < p_.pipeline_stages * 2 * C::kStageBytes; i += 512) {
      ptx::store_piece(ring_ + static_cast<std::uint32_t>(i), 0, 0, 0, 0);
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool knows(int n) { return know_split(p_, stream(), n, lane_); }

  // Queries into shared memory; from 16-byte aligned rows asynchronously.
  __device__ __forceinline__ void load_queries(const Split& split, std::uint32_t to,
                                               bool change) const {
    constexpr int kPieces = C::kPitch / 16;
    const int rows = (split.tile.rows + 15) / 16 * 16;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kDecodeThreads) {
      const int r = i / kPieces;
      const int c = i % kPieces;
      const RowPlace place = row_place(p_, split.tile, split.head, r);
      const char* row = static_cast<const char*>(p_.query) +
                        (place.token * p_.query_token_stride + place.head * p_.query_head_stride) *
                            size_of(p_.layer.dtype);
      const int elements = r < split.tile.rows ? min(p_.layer.head_size - c * 8, 8) : 0;
      const std::uint32_t at = to + ptx::piece_offset(r, c, C::kPitch);
      if (p_.query_aligned && !change) {
        ptx::copy_async<16>(at, elements > 0 ? row + c * 16 : row, max(elements, 0) * 2);
      } else {
        store_query<typename C::Type>(p_.layer.dtype, at, row, c * 8, elements, query_change(p_));
      }
    }
  }

  // ---- kv tiles ----------------------------------------------------------------------------------

  // Starts the copy of K (side 0), then V (side 1) of the next kv tile into the stage that was just
  // used. Always ends a group, so that groups can be counted.
  template <int kSide>
  __device__ __forceinline__ void fetch() {
    if (left_ > 0 && fetched_ == consumed_ + p_.pipeline_stages) fetch_into<kSide>(stage_);
    ptx::commit_copies();
  }

  // If the ring has room and nothing is left to load of what is known: finds the next kv tile and
  // asks where its keys are.
  __device__ __forceinline__ void find_next_if_idle() {
    if (left_ > 0 || fetched_ - consumed_ == p_.pipeline_stages) return;
    go_on();
    look_up();
  }

  // Fills what is free of the ring: at the start, and where splits are so short that the ring
  // could not be kept full across them.
  __device__ __forceinline__ void refill() {
#pragma unroll 1
    for (int n = fetched_ - consumed_; n < p_.pipeline_stages; ++n) {
      const bool live = left_ > 0;
      const int stage =
          stage_ + n < p_.pipeline_stages ? stage_ + n : stage_ + n - p_.pipeline_stages;
      if (live) fetch_into<0>(stage);
      ptx::commit_copies();
      if (live) fetch_into<1>(stage);
      ptx::commit_copies();
    }
  }

  template <int kSide>
  __device__ __forceinline__ void fetch_into(int stage) {
    if constexpr (kSide == 0) check_entries(stage);
    copy<kSide>(stage);
    if constexpr (kSide == 1) {
      ++fetched_;
      key_ += kKvTile;
      if (--left_ == 0) go_on();
      look_up();
    }
  }

  __device__ __forceinline__ void go_on() {
    WarpStream& s = stream();
    seek(p_, s, split_ + kSplitsAhead, warp_, lane_);
    left_ = s.left;
    key_ = s.key;
  }

  // Which of the 16 keys from `first` on may be read.
  static __device__ __forceinline__ std::uint32_t readable(const LoadableKeys& keys, int first) {
    const auto below = [first](int end) { return (1U << min(max(end - first, 0), C::kKeys)) - 1U; };
    return below(keys.kv_len) & ~(below(keys.out_of_window_end) & ~below(keys.out_of_window_begin));
  }

  // Asks for the block table entry of the lane's key.
  __device__ __forceinline__ void look_up() {
    if (left_ == 0) return;
    const WarpStream& s = stream();
    const std::uint32_t row = ptx::opaque(static_cast<std::uint32_t>(lane_)) % C::kKeys;
    bits_ = 0xFFFFU;
    if (key_ < s.full_begin || key_ + C::kKeys > s.full_end) bits_ = readable(s.keys, key_);
    const auto key = static_cast<std::uint32_t>(key_) + row;
    entry_ = 0;
    if (!p_.layer.paged) {
      slot_ = static_cast<std::int32_t>(key) + s.first_kv_row;
      return;
    }
    const auto block_size = static_cast<std::uint32_t>(p_.layer.block_size);
    const std::uint32_t logical = p_.block_shift >= 0 ? key >> p_.block_shift : key / block_size;
    slot_ = static_cast<std::int32_t>(key - logical * block_size);
    entry_ = -1;
    // A key that may be read is one that the table reaches.
    if (((bits_ >> row) & 1U) != 0) entry_ = __ldg(s.table + logical);
  }

  // The entries are there: keys of blocks that do not exist count as unmapped.
  __device__ __forceinline__ void check_entries(int stage) {
    const bool exists = !p_.layer.paged || static_cast<std::uint32_t>(entry_) < p_.block_limit;
    const std::uint32_t existing = __ballot_sync(~0U, exists);
    if (C::kUnmappedApart && lane_ == 0) shared().unmapped[warp_][stage] = bits_ & ~existing;
    bits_ &= existing;
    if (!exists) entry_ = 0;
  }

  template <int kSide>
  __device__ __forceinline__ void copy(int stage) {
    constexpr std::uint32_t kRowStep = 32 / C::kPieces;
    static_assert(kRowStep >= 1 && C::kKeys % kRowStep == 0);
    const KvParams& kv = kSide == 0 ? p_.k : p_.v;
    const std::uint32_t stored = stage_at(stage, kSide);
    const int row_bytes =
        (kSide == 0 ? p_.layer.head_size : p_.layer.head_size_v) * (C::kKv8 ? 1 : 2);
    if (bits_ != 0xFFFFU || !(kSide == 0 ? p_.k_simple : p_.v_simple)) {
      copy_rows<C>(kv, stream().base[kSide], stored, bits_, entry_, slot_, row_bytes,
                   kSide == 0 ? p_.k_copy_bytes : p_.v_copy_bytes);
    } else {
      // Opaque: computed here, not ahead of the loop and then kept in registers.
      const std::uint32_t lane = ptx::opaque(static_cast<std::uint32_t>(lane_));
      const std::uint32_t row = lane / C::kPieces;
      const std::uint32_t c = lane % C::kPieces;
      const std::int64_t slot_bytes = kSide == 0 ? p_.k_slot_bytes : p_.v_slot_bytes;
      const int first_slot = slot_ - static_cast<int>(lane % C::kKeys) + static_cast<int>(row);
      const char* from = stream().base[kSide] +
                         entry_ * (kSide == 0 ? p_.k_block_bytes : p_.v_block_bytes) +
                         first_slot * slot_bytes + c * 16;
      const std::uint32_t to =
          stored + (C::kKv8 ? lane * 16 : row * C::kPitch + ((c ^ row % 8) << 4));
      // What lies behind a short row is zero from the start.
      if (static_cast<int>(c) * 16 < row_bytes) {
#pragma unroll
        for (std::uint32_t step = 0; step < C::kKeys / kRowStep; ++step) {
          // Rows of a step keep the low bits of the first step's.
          const std::uint32_t place =
              C::kKv8 ? to + step * 512
                      : (to ^ ((step * kRowStep & 7U) << 4)) + step * kRowStep * C::kPitch;
          ptx::copy_async<16>(place, from);
          from += kRowStep * slot_bytes;
        }
      }
    }
    if (C::kKv8 && kv.token_scales != nullptr) copy_scale<kSide>(kv, stage);
  }

  template <int kSide>
  __device__ __forceinline__ void copy_scale(const KvParams& kv, int stage) {
    const int r = lane_;
    if (r >= C::kKeys) return;
    const float* from =
        kv.token_scales + semantics::cache_offset(kv.token_scale_strides, entry_, slot_,
                                                  split_at(stream().split).head);
    const std::uint32_t to = ptx::shared_address(&shared().scale[warp_][stage][kSide][r]);
    ptx::copy_async<4>(to, from, ((bits_ >> r) & 1U) != 0 ? 4 : 0);
  }

  // Until the oldest of the ring's groups is there.
  __device__ __forceinline__ void wait_oldest() const {
    switch (C::kMaxStages == 1 ? 1 : p_.pipeline_stages) {
      case 2: ptx::wait_copies<3>(); break;
      case 4: ptx::wait_copies<7>(); break;
      case 8: ptx::wait_copies<15>(); break;
      default: ptx::wait_copies<1>(); break;
    }
    __syncwarp();
  }

  const KernelParams& p_;
  const int lane_;
  const int warp_;
  const std::uint32_t
      tiles_;  // two query buffers, the area where warps are combined, each warp's ring
  const std::uint32_t ring_;
  int split_ = -1;    // at work
  int consumed_ = 0;  // kv tiles
  int stage_ = 0;     // consumed_ % stages

 private:
  int fetched_ = 0;  // kv tiles
  // The kv tile to be loaded next: kv tiles left, see WarpStream; its first key; and of the lane's
  // key (lane % 16) block and slot. Bits say which of its 16 keys may be read.
  int left_ = 0;
  int key_ = 0;
  std::int32_t entry_ = -1;
  std::int32_t slot_ = 0;
  std::uint32_t bits_ = 0;
};

}  // namespace quire::cuda::sm80
