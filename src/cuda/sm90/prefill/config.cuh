// What an instance of the prefill kernel is made of, and its shared memory.
#pragma once

#include <type_traits>

#include "cuda/kernel/combine_splits.cuh"
#include "cuda/kernel/work_queue.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/sm90/tensor_map.h"

namespace quire::cuda::sm90 {

inline constexpr int kWarpgroup = 128;

template <class Type_, bool kKv8_, int kHeadSize_, bool kSoftCap_>
struct PrefillConfig {
  using Type = Type_;
  static constexpr bool kKv8 = kKv8_;  // K and V are stored in 8 bits
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr bool kSoftCap = kSoftCap_;
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  // At head size 256 O takes 128 registers: two warpgroups, half the keys, and one buffer of
  // queries.
  static constexpr bool kWide = kHeadSize > 128;
  // Over 8-bit caches a warpgroup that widens K and V takes the third one's registers.
  static constexpr int kConsumers = kWide || kKv8 ? 2 : 3;  // warpgroups, 64 rows each
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kWide ? 64 : 128;           // of a tile of K and V
  static constexpr int kStages = kHeadSize <= 64 ? 4 : 2;  // of K and of V
  static constexpr int kQueryBuffers = kWide ? 1 : 2;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + (kKv8 ? 2 : 1) * kWarpgroup;
  static constexpr int kRowBytes = kHeadSize * 2;
  static constexpr int kQueryBytes = kRows * kRowBytes;  // of a buffer
  static constexpr int kTileBytes = kKeys * kRowBytes;   // of K or V
  // In the image of tensor_map.h: from eight keys to the next eight.
  static constexpr int kKeyStride = 8 * kRowBytes;
  // Whether a consumer that has its turn to multiply by V keeps it until it has begun to multiply by
  // the next K. Two consumers fall into step without it: their products wait for each other, and
  // then both are at their softmax. Of three, the others would wait too long.
  static constexpr bool kKeepsTurn = kConsumers == 2;
  static constexpr int kConsumerRegisters = kKv8 ? 192 : (kConsumers == 2 ? 232 : 160);
  static constexpr int kProducerRegisters = kKv8 ? 64 : (kConsumers == 2 ? 40 : 32);
  // Tiles as they are stored, of K and V by turns.
  static constexpr int kByteTileBytes = kKeys * kHeadSize;
  static constexpr int kByteStages = kKv8 ? kStages : 0;
  // Where things begin in shared memory.
  static constexpr int kKeysAt = kQueryBuffers * kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kBytesAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kSharedAt = kBytesAt + kByteStages * kByteTileBytes;
  // So many tiles the loader may be ahead of the K ring; PrefillShared::tile has room for them.
  static_assert(kByteStages / 2 < kStages);
};

// Consumers wait for each other at these barriers; 0 is __syncthreads.
inline constexpr int kAllConsumersBarrier = 1;
inline constexpr int kWarpgroupBarrier = 2;  // and the next ones: of one consumer warpgroup
inline constexpr int kTurnBarrier = 5;       // and the next ones: its turn to multiply by V

// Which keys of the boxes that a task reads may not be read: they may hold NaN, which a weight of 0
// does not hide, so their rows of V are cleared. That costs a fence and a barrier. Keys that some
// other row of the sequence sees have been written: for them it is not needed.
struct UnreadableKeys {
  std::int32_t end;    // from here on
  bool before_window;  // some in the box in which the windows begin

  // Of the tile whose first key is `first`, with `count` keys.
  __device__ __forceinline__ bool are_in(const LoadableKeys& keys, int first, int count,
                                         int box_keys) const {
    const int end_read = (keys.kv_len + box_keys - 1) / box_keys * box_keys;
    return min(first + count, end_read) > end || (before_window && first < keys.out_of_window_end &&
                                                  first + count > keys.out_of_window_begin);
  }
};

// A split as the warps of a CTA see it.
struct PrefillTask {
  Split split;
  bool exists;
  std::int32_t count;  // kv tiles
  // Of them, those that all rows see all of.
  std::int32_t plain_begin;
  std::int32_t plain_end;
  bool plain_causal;  // is_plain_causal()
  LoadableKeys keys;
  UnreadableKeys unreadable;
  ItemCtas item_ctas;
};

// What the loader of K and V tells of a kv tile.
struct TileInfo {
  std::int32_t first;      // key
  std::uint32_t unmapped;  // a bit a box: its block does not exist
  bool partial;            // UnreadableKeys
};

// An item's task is needed until its output has been stored, while the next two are under way.
inline constexpr int kTasks = 4;
// The next task is looked for when so many tiles of one are left to load: early enough for its
// first copies to follow, and not earlier, for whole items go to whoever asks first.
inline constexpr int kTilesLeft = 2;

template <class C>
struct PrefillShared {
  std::uint64_t task_wanted;
  std::uint64_t task_full[kTasks];
  std::uint64_t task_empty[kTasks];
  std::uint64_t query_full[C::kQueryBuffers];
  // Of each consumer: the item of the buffer is done, its rows of O, if it is whole, lie over the
  // queries.
  std::uint64_t output_full[C::kQueryBuffers][C::kConsumers];
  std::uint64_t k_full[C::kStages];
  std::uint64_t k_empty[C::kStages];
  std::uint64_t v_full[C::kStages];
  std::uint64_t v_empty[C::kStages];
  // Of tiles as they are stored, between the loader and the warps that widen. Those of K and V are
  // between the warps that widen and the consumers then.
  std::uint64_t bytes_full[C::kKv8 ? C::kByteStages : 1];
  std::uint64_t bytes_empty[C::kKv8 ? C::kByteStages : 1];
  PrefillTask task[kTasks];
  // Parts of items that are cut at the ends of the CTA's range: begun by it, and found begun.
  // Combined when all its work is done, where the registers of the loop are free.
  PrefillTask part[2];
  bool is_last;
  // Of each consumer: the last tile (counted from 1) of which a thread has seen that its maximum has
  // to be looked at.
  std::uint32_t rare[C::kConsumers];
  // Twice as many as there are stages: a tile's is needed after its K has been given back.
  TileInfo tile[2 * C::kStages];
  WorkQueue queue;
  float unmapped[C::kUnmappedApart ? C::kRows : 1];  // see PrefillRows::set_unmapped_apart
};

template <class C>
constexpr int prefill_shared_bytes() {
  return C::kSharedAt + static_cast<int>(sizeof(PrefillShared<C>));
}

}  // namespace quire::cuda::sm90
