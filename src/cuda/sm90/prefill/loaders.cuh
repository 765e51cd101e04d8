// The producer warpgroup of the prefill kernel: one warp finds work, one has the copy engine bring
// K and V, two copy queries and outputs. (Over 8-bit caches another warpgroup widens what arrives:
// widener.cuh.)
#pragma once

#include "cuda/kernel/kv_address.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/prefill/config.cuh"
#include "cuda/sm90/prefill/rows.cuh"

namespace quire::cuda::sm90 {

__device__ __forceinline__ std::uint32_t barrier_address(const std::uint64_t& barrier) {
  return ptx::shared_address(&barrier);
}

__device__ __forceinline__ UnreadableKeys unreadable_keys(const KernelParams& p,
                                                          const WorkTile& tile,
                                                          const LoadableKeys& keys, int box_keys) {
  UnreadableKeys result;
  const Mask& mask = p.layer.mask;
  result.end = keys.kv_len;
  result.before_window = keys.out_of_window_begin < keys.out_of_window_end &&
                         (keys.out_of_window_begin | keys.out_of_window_end) % box_keys != 0;
  const bool left = mask.window == WindowKind::kLeft;
  if (!mask.causal || (mask.window != WindowKind::kNone && !left) || p.batch.causal != nullptr ||
      p.batch.num_ranges != 0 || p.batch.visible_prefix_lens != nullptr ||
      p.batch.has_positions() || p.schedule.shared_rows != nullptr) {
    return result;
  }
  // The sequence's last row sees its last key, if it has not been cut off.
  const std::int64_t rows = tile.kv_len - tile.context_len;
  if (tile.first_token - tile.first_index + rows > p.batch.num_tokens) return result;
  result.end = keys_of(p, tile);
  if (left) {
    const std::int32_t first = keys.out_of_window_end / box_keys * box_keys;
    result.before_window = result.before_window && tile.context_len > first + mask.window_size - 1;
  }
  return result;
}

// Those of the keys behind what is not windowed: the few before them count as masked.
__device__ __forceinline__ void find_plain_tiles(int kv_tile, PrefillTask* task) {
  const WorkTile& tile = task->split.tile;
  const std::int32_t main_begin = tile.prefix_count - task->split.kv_tile_begin;
  const std::int32_t shift = main_begin - tile.main_first;
  const std::int32_t begin = (tile.common[2] + kv_tile - 1) / kv_tile;
  const std::int32_t end = min(tile.common[3], task->keys.kv_len) / kv_tile;
  task->plain_begin = max(max(begin + shift, main_begin), 0);
  task->plain_end = min(end + shift, task->count);
}

template <class C>
__device__ __forceinline__ void describe_task(const KernelParams& p, int box_keys,
                                              const WorkQueue& queue, PrefillTask* task) {
  Split& split = task->split;
  if (split.kv_tile_end < 0) split.kv_tile_end = split.tile.num_kv_tiles();
  task->count = split.existing_end(keys_of(p, split.tile), C::kKeys) - split.kv_tile_begin;
  task->keys = loadable_keys(p, split.tile);
  find_plain_tiles(C::kKeys, task);
  task->plain_causal = is_plain_causal(p);
  task->unreadable = unreadable_keys(p, split.tile, task->keys, box_keys);
  task->item_ctas = queue.item_ctas(split);
}

// Which of the CTAs that prefill this one is.
struct PrefillPlace {
  std::int32_t cta;
  std::int32_t num_ctas;
};

// One warp: the splits of the CTA at `place` into task[], one after the other, and one that does
// not exist.
template <class C>
__device__ __forceinline__ void find_tasks(const KernelParams& p, int box_keys,
                                           PrefillShared<C>& shared, const PrefillPlace& place) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  WorkQueue& queue = shared.queue;  // not in registers: there are few
  if (lane == 0) {
    queue.begin_whole(p.schedule, place.cta, place.num_ctas);
  } else if (lane == 1) {
    queue.begin_range(p.schedule, place.cta);
  }
  __syncwarp();
  ptx::RingPosition at;
  std::uint32_t parity = 1;  // of task_wanted: the first task is
  for (bool exists = true; exists; at.advance(kTasks)) {
    ptx::mbarrier_wait(barrier_address(shared.task_wanted), parity);
    parity ^= 1U;
    ptx::mbarrier_wait(barrier_address(shared.task_empty[at.index]), at.parity ^ 1U);
    PrefillTask& task = shared.task[at.index];
    Split& split = task.split;
    const WorkTile* tile = nullptr;
    if (lane == 0) {
      tile = queue.next(p.schedule, &split.head, &split.kv_tile_begin, &split.kv_tile_end);
    }
    tile = reinterpret_cast<const WorkTile*>(
        __shfl_sync(~0U, reinterpret_cast<std::uintptr_t>(tile), 0));
    exists = tile != nullptr;
    constexpr int kPieces = sizeof(WorkTile) / 16;
    static_assert(sizeof(WorkTile) % 16 == 0 && kPieces <= 32);
    if (exists && lane < kPieces) {
      reinterpret_cast<uint4*>(&split.tile)[lane] = reinterpret_cast<const uint4*>(tile)[lane];
    }
    __syncwarp();
    if (lane == 0) {
      task.exists = exists;
      task.count = 0;
      if (exists) describe_task<C>(p, box_keys, queue, &task);
    }
    // Of each lane: racecheck does not see that __syncwarp() orders their pieces before one's arrival.
    ptx::mbarrier_arrive(barrier_address(shared.task_full[at.index]));
    __syncwarp();
  }
}

// The fourth coordinate of the box that holds the keys from `key` on, and its last; outside the
// tensor (zeros) for keys that may not be read and blocks that do not exist.
struct KvBox {
  std::int32_t block;  // kUnread or kUnmapped: zeros
  std::int32_t eight;  // slot / 8
  static constexpr std::int32_t kUnread = -1;
  static constexpr std::int32_t kUnmapped = -2;
};

__device__ __forceinline__ KvBox kv_box(const KernelParams& p, const PrefillTask& task,
                                        std::int32_t key, std::int32_t count) {
  const LoadableKeys& keys = task.keys;
  KvBox box{KvBox::kUnread, 0};
  if (key >= keys.kv_len ||
      (key >= keys.out_of_window_begin && key + count <= keys.out_of_window_end)) {
    return box;
  }
  const KvRow row = kv_row(p, task.split.tile, key);
  box.block = row.block < 0 ? KvBox::kUnmapped : static_cast<std::int32_t>(row.block);
  box.eight = static_cast<std::int32_t>(row.slot) / 8;
  return box;
}

// One warp: K and V of the tasks' kv tiles, the last first: it holds the causal mask, and what
// comes after it in time is the same for all of a sequence's tiles. A lane has a box. Blocks are
// looked up a tile ahead.
template <class C>
class KvLoader {
 public:
  __device__ __forceinline__ KvLoader(const KernelParams& p, const KvMaps& maps, char* memory,
                                      PrefillShared<C>& shared)
      : p_(p),
        maps_(maps),
        shared_(shared),
        memory_(ptx::shared_address(memory)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        boxes_(C::kKeys / maps.box_keys) {}

  __device__ __forceinline__ void run() {
    if (lane_ == 0) {
      ptx::prefetch_map(&maps_.k.map);
      ptx::prefetch_map(&maps_.v.map);
    }
    ptx::RingPosition at;
    while (true) {
      ptx::mbarrier_wait(barrier_address(shared_.task_full[at.index]), at.parity);
      const PrefillTask& task = shared_.task[at.index];
      if (!task.exists) break;
      load(task);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(barrier_address(shared_.task_empty[at.index]));
      at.advance(kTasks);
    }
  }

 private:
  __device__ __forceinline__ void load(const PrefillTask& task) {
    const std::int32_t head = task.split.head;
    KvBox next = look_up(task, task.count - 1);
    ptx::await_launch();  // K and V may be this step's
    const std::int32_t want_at = min(task.count, kTilesLeft) - 1;
    if (want_at < 0) want_task();
    for (std::int32_t i = task.count - 1; i >= 0; --i) {
      if (i == want_at) want_task();
      const KvBox box = next;
      if (i > 0) next = look_up(task, i - 1);
      wait_for_room(true);
      if (lane_ == 0) describe(task, i);
      if constexpr (C::kUnmappedApart) {
        const std::uint32_t unmapped = __ballot_sync(~0U, box.block == KvBox::kUnmapped);
        if (lane_ == 0) tile_info().unmapped = unmapped;
      }
      load_side(maps_.k, true, box, head);
      wait_for_room(false);
      load_side(maps_.v, false, box, head);
      stage_.advance(C::kStages);
    }
  }

  __device__ __forceinline__ KvBox look_up(const PrefillTask& task, std::int32_t i) const {
    if (i < 0 || lane_ >= boxes_) return {KvBox::kUnread, 0};
    const std::int32_t first = task.split.tile.kv_tile(task.split.kv_tile_begin + i) * C::kKeys;
    return kv_box(p_, task, first + lane_ * maps_.box_keys, maps_.box_keys);
  }

  __device__ __forceinline__ void want_task() const {
    if (lane_ == 0) ptx::mbarrier_arrive(barrier_address(shared_.task_wanted));
  }

  __device__ __forceinline__ void wait_for_room(bool is_k) const {
    if constexpr (C::kKv8) {
      ptx::mbarrier_wait(barrier_address(shared_.bytes_empty[bytes_.index]), bytes_.parity ^ 1U);
    } else {
      const std::uint32_t s = stage_.index;
      ptx::mbarrier_wait(barrier_address(is_k ? shared_.k_empty[s] : shared_.v_empty[s]),
                         stage_.parity ^ 1U);
    }
  }

  __device__ __forceinline__ TileInfo& tile_info() const {
    return shared_.tile[stage_.index + stage_.parity * C::kStages];
  }

  __device__ __forceinline__ void describe(const PrefillTask& task, std::int32_t i) const {
    const WorkTile& tile = task.split.tile;
    const int first = tile.kv_tile(task.split.kv_tile_begin + i) * C::kKeys;
    TileInfo& info = tile_info();
    info.first = first;
    info.partial = task.unreadable.are_in(task.keys, first, C::kKeys, maps_.box_keys);
  }

  __device__ __forceinline__ void load_side(const KvMap& map, bool is_k, const KvBox& box,
                                            std::int32_t head) {
    constexpr int kBytes = C::kKv8 ? C::kByteTileBytes : C::kTileBytes;
    const std::uint32_t s = C::kKv8 ? bytes_.index : stage_.index;
    const int ring = C::kKv8 ? C::kBytesAt : (is_k ? C::kKeysAt : C::kValuesAt);
    const std::uint32_t full = barrier_address(C::kKv8 ? shared_.bytes_full[s]
                                               : is_k  ? shared_.k_full[s]
                                                       : shared_.v_full[s]);
    if (lane_ == 0) ptx::mbarrier_arrive_expect(full, kBytes);
    __syncwarp();
    if (lane_ < boxes_) {
      const std::uint32_t to =
          memory_ + static_cast<std::uint32_t>(ring) + s * kBytes +
          static_cast<std::uint32_t>(lane_ * maps_.box_keys * (kBytes / C::kKeys));
      ptx::load_box(to, &map.map, full, 0, 0, 0, box.block * map.heads_per_block + head, box.eight,
                    ptx::kEvictNormal);
    }
    if (C::kKv8) bytes_.advance(C::kByteStages);
  }

  const KernelParams& p_;
  const KvMaps& maps_;
  PrefillShared<C>& shared_;
  const std::uint32_t memory_;
  const int lane_;
  const int boxes_;
  ptx::RingPosition stage_;
  ptx::RingPosition bytes_;  // with C::kKv8
};

// Two warps: the query rows of each task, as wgmma reads them (64 rows a warpgroup, columns of 64
// elements, 128-byte swizzle), and back from there its rows of output, while consumers are at the
// next task: at the end of theirs they would wait for the stores. Rows may be of any tokens and
// heads, so this is not the copy engine's.
template <class C>
class RowCopier {
  static constexpr int kPieces = C::kRowBytes / 16;
  static constexpr int kRowsAtOnce = 32 / kPieces;

 public:
  __device__ __forceinline__ RowCopier(const KernelParams& p, char* memory,
                                       PrefillShared<C>& shared)
      : p_(p),
        shared_(shared),
        memory_(ptx::shared_address(memory)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32) % 2) {}

  __device__ __forceinline__ void run() {
    while (true) {
      if (C::kQueryBuffers == 1) store_before();
      ptx::mbarrier_wait(barrier_address(shared_.task_full[at_.template index<kTasks>()]),
                         at_.template parity<kTasks>());
      const PrefillTask& task = shared_.task[at_.template index<kTasks>()];
      if (!task.exists) break;
      load(task);
      if (C::kQueryBuffers == 2) store_before();
      at_.advance();
    }
    if (C::kQueryBuffers == 2) store_before();
  }

 private:
  // Where a piece of a row lies, this lane's of a row.
  __device__ __forceinline__ std::uint32_t address(const ptx::RingCounter& at, int r) const {
    const int piece = lane_ % kPieces;
    return memory_ + at.index<C::kQueryBuffers>() * C::kQueryBytes +
           static_cast<std::uint32_t>(piece / 8 * 64 * 128 + r / 64 * 64 * C::kRowBytes +
                                      r % 64 * 128 + (((piece % 8) ^ (r % 8)) << 4));
  }

  // The buffer is free: what store_before() read it for is done.
  __device__ __forceinline__ void load(const PrefillTask& task) {
    const WorkTile& tile = task.split.tile;
    const SharedRow* shared_rows = p_.schedule.shared_rows;
#pragma unroll 1
    for (int base = warp_ * 32; base < C::kRows; base += 64) {
      // Each lane finds a row, then whole rows are copied, a few at a time.
      RowPlace place = row_place(p_, tile, task.split.head, base + lane_);
      if (shared_rows != nullptr) {
        place.token = shared_rows[tile.prefix_row + place.index].token;
      }
      const std::int64_t offset =
          (place.token * p_.query_token_stride + place.head * p_.query_head_stride) * 2;
#pragma unroll 4
      for (int i = 0; i < 32; i += kRowsAtOnce) {
        const int r = i + lane_ / kPieces;
        const char* row = static_cast<const char*>(p_.query) + __shfl_sync(~0U, offset, r);
        ptx::copy_async<16>(address(at_, base + r), row + lane_ % kPieces * 16);
      }
    }
    ptx::commit_copies();
    ptx::wait_copies<0>();
    const QueryChange change = query_change(p_);
    if (change.any()) {
#pragma unroll 1
      for (int base = warp_ * 32; base < C::kRows; base += 64) {
#pragma unroll 1
        for (int i = 0; i < 32; i += kRowsAtOnce) {
          const std::uint32_t a = address(at_, base + i + lane_ / kPieces);
          const uint4 x = ptx::load_piece(a);
          ptx::store_piece(a, change(x.x), change(x.y), change(x.z), change(x.w));
        }
      }
    }
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(
        barrier_address(shared_.query_full[at_.template index<C::kQueryBuffers>()]));
  }

  // The output of the task before this one, if there is one.
  __device__ __forceinline__ void store_before() {
    if (at_.is_first()) return;
    ptx::await_launch();
    const ptx::RingCounter at = at_.before();
    const std::uint32_t buffer = at.index<C::kQueryBuffers>();
    const PrefillTask& task = shared_.task[at.index<kTasks>()];
    // Others go elsewhere, from the consumers' registers.
    const bool stores = task.split.whole() && p_.schedule.shared_rows == nullptr;
#pragma unroll 1
    for (int base = warp_ * 32; base < C::kRows; base += 64) {
      ptx::mbarrier_wait(barrier_address(shared_.output_full[buffer][base / 64]),
                         at.parity<C::kQueryBuffers>());
      if (stores) store_rows(task.split, at, base);
    }
    __syncwarp();  // what is loaded next goes over what other lanes have read
    ptx::mbarrier_arrive(barrier_address(shared_.task_empty[at.index<kTasks>()]));
  }

  // Rows [base, base + 32).
  __device__ __forceinline__ void store_rows(const Split& split, const ptx::RingCounter& at,
                                             int base) {
    const RowPlace place = row_place(p_, split.tile, split.head, base + lane_);
    const std::int64_t offset =
        (place.token * p_.output_token_stride + place.head * p_.output_head_stride) * 2;
    const int rows = split.tile.rows - base;
#pragma unroll 2
    for (int i = 0; i < 32; i += kRowsAtOnce) {
      const int r = i + lane_ / kPieces;
      char* row = static_cast<char*>(p_.output) + __shfl_sync(~0U, offset, r);
      const uint4 x = ptx::load_piece(address(at, base + r));
      if (r < rows) *reinterpret_cast<uint4*>(row + lane_ % kPieces * 16) = x;
    }
  }

  const KernelParams& p_;
  PrefillShared<C>& shared_;
  const std::uint32_t memory_;
  const int lane_;
  const int warp_;
  ptx::RingCounter at_;  // of tasks and of queries
};

// One thread, before any other looks.
template <class C>
__device__ __forceinline__ void init_barriers(PrefillShared<C>& shared) {
  for (int i = 0; i < kTasks; ++i) {
    ptx::mbarrier_init(barrier_address(shared.task_full[i]), 32);
    // The loader of K and V, the threads that copy queries and outputs, the consumers, and the
    // warps that widen.
    ptx::mbarrier_init(barrier_address(shared.task_empty[i]),
                       1 + 64 + C::kConsumerThreads + (C::kKv8 ? kWarpgroup : 0));
  }
  for (int i = 0; i < C::kQueryBuffers; ++i) {
    ptx::mbarrier_init(barrier_address(shared.query_full[i]), 64);
    for (int w = 0; w < C::kConsumers; ++w) {
      ptx::mbarrier_init(barrier_address(shared.output_full[i][w]), kWarpgroup);
    }
  }
  for (int i = 0; i < C::kStages; ++i) {
    ptx::mbarrier_init(barrier_address(shared.k_full[i]), C::kKv8 ? kWarpgroup : 1);
    ptx::mbarrier_init(barrier_address(shared.k_empty[i]), C::kConsumers);
    ptx::mbarrier_init(barrier_address(shared.v_full[i]), C::kKv8 ? kWarpgroup : 1);
    ptx::mbarrier_init(barrier_address(shared.v_empty[i]), C::kConsumers);
  }
  for (int i = 0; i < C::kByteStages; ++i) {
    ptx::mbarrier_init(barrier_address(shared.bytes_full[i]), 1);
    ptx::mbarrier_init(barrier_address(shared.bytes_empty[i]), kWarpgroup);
  }
  ptx::mbarrier_init(barrier_address(shared.task_wanted), 1);
  ptx::mbarrier_fence_init();
  shared.part[0].exists = shared.part[1].exists = false;
  for (std::uint32_t& tile : shared.rare) tile = 0;
}

}  // namespace quire::cuda::sm90
