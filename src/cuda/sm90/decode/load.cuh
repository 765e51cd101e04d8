// The loading side of the decode kernel: three warps, each a loop over the CTA's splits.
//
//   splits: work ranges and tiles of the plan -> PublishedSplit, C::kSplitsAhead of them
//   rows:   row tables and queries of the splits, DecodeConfig::kRowsAhead of them
//   tiles:  block table -> boxes of K and V by the copy engine -> the ring
//
// A warp gets a box out every 150 clocks, a kv tile of eight boxes every 1,200: with two CTAs a
// multiprocessor that is twice as fast as memory.
#pragma once

#include "cuda/kernel/work_iterator.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode/bytes.cuh"
#include "cuda/sm90/decode/config.cuh"
#include "cuda/sm90/tensor_map.h"

namespace quire::cuda::sm90 {

// A place in a ring of `kSize` buffers and its barriers.
template <int kSize>
struct RingPlace : ptx::RingPosition {
  using Barriers = RingBarriers<kSize>;
  __device__ __forceinline__ void wait_full(const Barriers& b) const {
    ptx::mbarrier_wait(ptx::shared_address(&b.full[index]), parity);
  }
  __device__ __forceinline__ void wait_empty(const Barriers& b) const {
    ptx::mbarrier_wait(ptx::shared_address(&b.empty[index]), parity ^ 1U);
  }
  __device__ __forceinline__ void arrive_full(const Barriers& b) const {
    ptx::mbarrier_arrive(ptx::shared_address(&b.full[index]));
  }
  __device__ __forceinline__ void arrive_empty(const Barriers& b) const {
    ptx::mbarrier_arrive(ptx::shared_address(&b.empty[index]));
  }
  __device__ __forceinline__ void next() { advance(kSize); }
};

// As RowTable::may_read().
__device__ __forceinline__ bool may_read(const LoadableKeys& keys, std::int32_t key) {
  return key < keys.kv_len && (key < keys.out_of_window_begin || key >= keys.out_of_window_end);
}

template <class C>
class DecodeLoader {
 public:
  using Shared = DecodeShared<C>;
  using SplitPlace = RingPlace<C::kSplitsAhead>;

  __device__ DecodeLoader(const KernelParams& p, const KvMaps& maps, Shared& shared)
      : p_(p), maps_(maps), shared_(shared), lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ void run(int warp) {
    if (warp == 0) {
      load_tiles();
    } else if (warp == 1) {
      load_rows();
    } else if (warp == 2 && lane_ == 0) {
      if constexpr (C::kInTeams) {
        publish_taken();
      } else {
        publish_splits();
      }
    }
  }

 private:
  // ---- splits -----------------------------------------------------------------------------------

  // One lane.
  __device__ __forceinline__ void publish_splits() {
    const ScheduleView& s = p_.schedule;
    const auto cta = static_cast<std::int32_t>(blockIdx.x);
    // What is needed first is on its way at once: a load through the L2 cache takes 0.6 us.
    WorkIterator iterator(s, cta);
    shared_.splits[0].split.tile = s.first_tiles[cta];
    shared_.cta_step = s.header->cta_step;
    SplitPlace at;
    for (bool is_first = true;; is_first = false, at.next()) {
      at.wait_empty(shared_.split_barriers);
      PublishedSplit& to = shared_.splits[at.index];
      Split& split = to.split;
      const WorkTile* tile =
          iterator.next(s, &split.head, &split.kv_tile_begin, &split.kv_tile_end);
      if (tile == nullptr) {
        split.head = -1;
      } else {
        if (!is_first) split.tile = *tile;
        if (split.kv_tile_end < 0) split.kv_tile_end = split.tile.num_kv_tiles();
        to.item_ctas = iterator.item_ctas(split);
      }
      at.arrive_full(shared_.split_barriers);
      if (tile == nullptr) return;
    }
  }

  // The same where teams take splits one by one. One lane.
  __device__ __forceinline__ void publish_taken() {
    typename C::Splits splits(p_.schedule);
    SplitPlace at;
    for (bool found = true; found; at.next()) {
      at.wait_empty(shared_.split_barriers);
      PublishedSplit& to = shared_.splits[at.index];
      found = splits.next(p_.schedule, &to);
      if (!found) to.split.head = -1;
      at.arrive_full(shared_.split_barriers);
    }
  }

  // Calls take(split) for each split of the CTA, which the other warps are done with then.
  template <class Take>
  __device__ __forceinline__ void for_each_split(const Take& take) {
    for (SplitPlace at;; at.next()) {
      at.wait_full(shared_.split_barriers);
      const Split& split = shared_.splits[at.index].split;
      if (split.head < 0) return;
      take(split);
      at.arrive_empty(shared_.split_barriers);
    }
  }

  // ---- row tables and queries -------------------------------------------------------------------

  __device__ __forceinline__ void load_rows() {
    const QueryChange change = query_change(p_);
    RingPlace<C::kRowsAhead> at;
    for_each_split([&](const Split& split) {
      at.wait_empty(shared_.row_barriers);
      const std::uint32_t query = ptx::shared_address(shared_.query[at.index]);
      if constexpr (C::kKv8) {
        load_query_for_bytes<C>(p_, split, change, query, shared_.rows[at.index].score_factors);
      } else {
        load_query(split, change, query);
      }
      if constexpr (C::kInTeams) {
        fill_row_table<WarpTeam>(p_, split, split.head, shared_.rows[at.index]);
      } else {
        fill_rows<WarpTeam>(p_, split, split.head, shared_.rows[at.index]);
      }
      ptx::commit_copies();
      ptx::wait_copies<0>();
      ptx::fence_async_proxy();
      at.arrive_full(shared_.row_barriers);
      at.next();
    });
  }

  // Rows of the query in columns of 64 elements, under the 128-byte swizzle. Rows that the tile
  // does not have are 0: what they would hold otherwise could ask for ever new references.
  __device__ __forceinline__ void load_query(const Split& split, const QueryChange& change,
                                             std::uint32_t to) const {
    constexpr int kPieces = C::kHeadSize / 8;
#pragma unroll 4
    for (int i = lane_; i < C::kRows * kPieces; i += 32) {
      const int r = i / kPieces;
      const int c = i % kPieces;
      uint4 x{};
      if (r < split.tile.rows) {
        const RowPlace place = row_place(p_, split.tile, split.head, r);
        const auto* row = static_cast<const std::uint16_t*>(p_.query) +
                          place.token * p_.query_token_stride + place.head * p_.query_head_stride;
        x = *reinterpret_cast<const uint4*>(row + c * 8);
      }
      ptx::store_piece(to + static_cast<std::uint32_t>(c / 8 * C::kRows * 128 + r * 128 +
                                                       ((c % 8 ^ r % 8) << 4)),
                       change(x.x), change(x.y), change(x.z), change(x.w));
    }
  }

  // ---- K and V ----------------------------------------------------------------------------------

  // Where a lane's boxes of K and V are in their caches.
  struct Box {
    std::int32_t row[2] = {-1, -1};  // fourth coordinate; -1: outside, which reads as zeros
    std::int32_t slots = 0;          // fifth coordinate
    std::int32_t block = 0;
    bool is_unmapped = false;
  };

  // Box `lane` of the kv tiles from `kv_tile` on: block table entries of 32 boxes at a time.
  __device__ __forceinline__ Box find_box(const Split& split, int boxes, int kv_tile) const {
    Box box;
    const int i = kv_tile + lane_ / boxes;
    if (i >= split.kv_tile_end) return box;
    const LoadableKeys keys = loadable_keys(p_, split.tile);
    const std::int32_t first = split.tile.kv_tile(i) * kKvTile + lane_ % boxes * maps_.box_keys;
    const std::int32_t end = min(first + maps_.box_keys, keys.kv_len);
    const bool is_hidden = first >= keys.out_of_window_begin && end <= keys.out_of_window_end;
    if (first >= end || is_hidden) return box;
    const std::int32_t logical =
        p_.block_shift >= 0 ? first >> p_.block_shift : first / p_.layer.block_size;
    const std::int32_t entry =
        __ldg(p_.batch.block_table + split.tile.seq * p_.batch.table_stride + logical);
    box.slots = (first - logical * p_.layer.block_size) / 8;
    box.is_unmapped = static_cast<std::uint32_t>(entry) >= p_.block_limit;
    if (!box.is_unmapped) {
      box.block = entry;
      box.row[0] = entry * maps_.k.heads_per_block + split.head;
      box.row[1] = entry * maps_.v.heads_per_block + split.head;
    }
    return box;
  }

  __device__ __forceinline__ void load_tiles() {
    if (lane_ == 0) {
      ptx::prefetch_map(&maps_.k.map);
      ptx::prefetch_map(&maps_.v.map);
    }
    const int boxes = kKvTile / maps_.box_keys;
    const int tiles_known = 32 / boxes;
    RingPlace<Shared::kTiles> at;
    for_each_split([&](const Split& split) {
      const int end = split.kv_tile_end;
      int known = split.kv_tile_begin;  // boxes hold kv tiles [known, + tiles_known)
      Box box = find_box(split, boxes, known);
      Box next = find_box(split, boxes, known + tiles_known);
      ptx::await_launch();  // K and V may be this step's
      for (int kv_tile = known; kv_tile < end; ++kv_tile) {
        if (kv_tile == known + tiles_known) {
          known += tiles_known;
          box = next;
          next = find_box(split, boxes, known + tiles_known);
        }
        load_side<0>(split, kv_tile, boxes, box, kv_tile - known, at);
        at.next();
        load_side<1>(split, kv_tile, boxes, box, kv_tile - known, at);
        at.next();
      }
    });
  }

  // K or V of kv tile `kv_tile`, the n-th of those that the lanes' boxes are of.
  template <int kSide>
  __device__ __forceinline__ void load_side(const Split& split, int kv_tile, int boxes,
                                            const Box& box, int n,
                                            const RingPlace<Shared::kTiles>& at) {
    const KvMap& map = kSide == 0 ? maps_.k : maps_.v;
    const int from = n * boxes + lane_ % boxes;
    const std::int32_t row = __shfl_sync(~0U, box.row[kSide], from);
    const std::int32_t slots = __shfl_sync(~0U, box.slots, from);
    const auto& barriers = shared_.tile_barriers;
    at.wait_empty(barriers);
    const std::uint32_t full = ptx::shared_address(&barriers.full[at.index]);
    if constexpr (kSide == 0 && C::kUnmappedApart) {
      const std::uint32_t unmapped = __ballot_sync(~0U, box.is_unmapped) >> (n * boxes);
      if (lane_ == 0) shared_.unmapped[at.index] = unmapped & ((1U << boxes) - 1U);
    }
    if constexpr (C::kKv8) {
      const KvParams& kv = kSide == 0 ? p_.k : p_.v;
      if (kv.token_scales != nullptr) {
        const int first = split.tile.kv_tile(kv_tile) * kKvTile;
        load_token_scales(kv, split, first, box, n * boxes,
                          ptx::shared_address(shared_.token_scales[at.index]));
        ptx::mbarrier_arrive_after_copies(full);
      }
    }
    if (lane_ == 0) ptx::mbarrier_arrive_expect(full, C::kTileBytes);
    __syncwarp();
    if (lane_ < boxes) {
      const std::uint32_t to = ptx::shared_address(shared_.tiles[at.index]) +
                               static_cast<std::uint32_t>(lane_ * (C::kTileBytes / boxes));
      ptx::load_box(to, &map.map, full, 0, 0, 0, row, slots, ptx::kEvictFirst);
    }
  }

  // Of the 64 keys from `first` on, whose boxes lanes know from `first_lane` on; 0 for keys that may
  // not be read or do not exist, whose values are 0 too.
  __device__ __forceinline__ void load_token_scales(const KvParams& kv, const Split& split,
                                                    int first, const Box& box, int first_lane,
                                                    std::uint32_t to) const {
    const LoadableKeys keys = loadable_keys(p_, split.tile);
#pragma unroll
    for (int key = lane_; key < kKvTile; key += 32) {
      const int lane = first_lane + key / maps_.box_keys;
      const std::int32_t block = __shfl_sync(~0U, box.block, lane);
      const std::int32_t slot = __shfl_sync(~0U, box.slots, lane) * 8 + key % maps_.box_keys;
      const bool is_there = __shfl_sync(~0U, box.row[0], lane) >= 0 && may_read(keys, first + key);
      ptx::copy_async<4>(to + static_cast<std::uint32_t>(key * 4),
                         kv.token_scales + semantics::cache_offset(kv.token_scale_strides, block,
                                                                   slot, split.head),
                         is_there ? 4 : 0);
    }
  }

  const KernelParams& p_;
  const KvMaps& maps_;
  Shared& shared_;
  const int lane_;
};

// One thread, before any other looks.
template <class C>
__device__ __forceinline__ void init_barriers(const KernelParams& p, DecodeShared<C>& shared) {
  const auto init = [](auto& barriers, int full, int empty) {
    for (auto& barrier : barriers.full) ptx::mbarrier_init(ptx::shared_address(&barrier), full);
    for (auto& barrier : barriers.empty) ptx::mbarrier_init(ptx::shared_address(&barrier), empty);
  };
  for (int i = 0; i < DecodeShared<C>::kTiles; ++i) {
    // The copies' bytes; of tokens' scales, each lane's.
    const KvParams& kv = i % 2 == 0 ? p.k : p.v;
    const int full = C::kKv8 && kv.token_scales != nullptr ? 33 : 1;
    ptx::mbarrier_init(ptx::shared_address(&shared.tile_barriers.full[i]), full);
    ptx::mbarrier_init(ptx::shared_address(&shared.tile_barriers.empty[i]), C::kTileArrivals);
  }
  // Two warps that load, tiles and row tables, and the warpgroup.
  init(shared.split_barriers, 1, 2 * 32 + kWarpgroupThreads);
  init(shared.row_barriers, 32, kWarpgroupThreads);
  ptx::mbarrier_fence_init();
}

}  // namespace quire::cuda::sm90
