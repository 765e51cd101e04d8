// What a CTA of the prefill kernel does next, and where the keys of its tiles are.
#pragma once

#include "cuda/kernel/kv_address.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/sm80/prefill/config.cuh"

namespace quire::cuda::sm80 {

// Whole items in order of their cost, whoever is free takes the next one. The counter is back at 0
// when all are taken: each CTA that had an item asks once in vain, so there are as many calls as
// items.
__device__ __forceinline__ bool next_whole_item(const ScheduleView& schedule, bool first,
                                                Segment* segment) {
  const int items = schedule.header->num_tiles * schedule.heads;
  int item = static_cast<int>(blockIdx.x);
  if (!first) {
    const int taken = atomicAdd(schedule.taken, 1);
    if (taken == items - 1) *schedule.taken = 0;
    item = static_cast<int>(gridDim.x) + taken;
  }
  if (item >= items) return false;
  const int tile = item / schedule.heads;
  segment->tile = schedule.tiles[tile];
  segment->head = item - tile * schedule.heads;
  segment->unit_begin = 0;
  segment->unit_end = segment->tile.num_units();
  return true;
}

// Whether 16 keys from a multiple of 16 on lie in one block; else copies look up each row.
__device__ __forceinline__ bool in_groups(const KernelParams& p) {
  return !p.layer.paged || p.layer.block_size % 16 == 0;
}

// Whether rows can be copied in whole pieces, 16 rows from one address.
template <class C, int kSide>
__device__ __forceinline__ bool is_regular(const KernelParams& p) {
  constexpr int kElement = C::kBytes ? 1 : 2;
  const KvParams& kv = kSide == 0 ? p.k : p.v;
  return PrefillSide<C, kSide>::kRegular && in_groups(p) &&
         (kSide == 0 ? p.k_copy_bytes : p.v_copy_bytes) >= 16 &&
         (kSide == 0 ? p.layer.head_size : p.layer.head_size_v) * kElement % 16 == 0 &&
         kv.strides.slot >= 0 && kv.strides.slot < (1 << 26);
}

template <class C>
__device__ __forceinline__ int first_key_of(const Segment& segment, int i) {
  constexpr int kSteps = kKvTile / C::kKeys;
  return segment.tile.unit(segment.unit_begin + i / kSteps) * kKvTile + i % kSteps * C::kKeys;
}

// Bits [begin, end) of 16, both clamped.
__device__ __forceinline__ std::uint32_t bits_between(int begin, int end) {
  begin = min(max(begin, 0), 16);
  end = min(max(end, 0), 16);
  return begin < end ? (1U << end) - (1U << begin) : 0U;
}

// One warp: tiles [first, first + kBatch) of a task into the ring, a lane a group of 16 keys.
template <class C>
__device__ __forceinline__ void look_up(const KernelParams& p, PrefillShared<C>& shared, int slot,
                                        int first) {
  const auto lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
  const PrefillTask& task = shared.task[slot];
  const Tile& tile = task.segment.tile;
  const int i = first + lane / C::kGroups;
  const bool used = lane < C::kBatch * C::kGroups && i < task.count;
  const std::uint32_t lanes = __ballot_sync(~0U, used);
  if (!used) return;
  const int g = lane % C::kGroups;
  KeyTile<C>& to = shared.ring[slot][i % C::kRing];
  const int first_key = first_key_of<C>(task.segment, i);
  const int key = first_key + g * 16;
  std::uint32_t present = bits_between(0, task.keys.kv_len - key) &
                          ~bits_between(task.keys.hidden_begin - key, task.keys.hidden_end - key);
  KvRow row;
  std::uint32_t absent = 0;
  if (present != 0 && in_groups(p)) {
    row = kv_row(p, tile, key);
    if (row.block < 0) {
      absent = present;
      present = 0;
    }
  } else if (C::kAbsentApart) {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const bool is_present = (present >> i & 1U) != 0;
      if (is_present && kv_row(p, tile, key + i).block < 0) absent |= 1U << i;
    }
  }
  const bool found = row.block >= 0;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const KvParams& kv = side == 0 ? p.k : p.v;
    to.group[side][g] =
        task.base[side] + (found ? row.block * kv.strides.block + row.slot * kv.strides.slot : 0) *
                              (C::kBytes ? 1 : 2);
  }
  if constexpr (C::kBytes) {
    to.block[g] = static_cast<std::int32_t>(row.block);
    to.slot[g] = static_cast<std::int32_t>(row.slot);
  }
  reinterpret_cast<std::uint16_t*>(&to.present)[g] = static_cast<std::uint16_t>(present);
  reinterpret_cast<std::uint16_t*>(&to.absent)[g] = static_cast<std::uint16_t>(absent);
  const std::uint32_t full = __ballot_sync(lanes, present == 0xFFFFU);
  if (g == 0) {
    constexpr std::uint32_t kAll = (1U << C::kGroups) - 1;
    const Copy how = (full >> lane & kAll) == kAll ? Copy::kWhole : Copy::kPartial;
    to.how[0] = is_regular<C, 0>(p) ? how : Copy::kRows;
    to.how[1] = is_regular<C, 1>(p) ? how : Copy::kRows;
    to.whole = to.how[0] == Copy::kWhole && to.how[1] == Copy::kWhole;
    const int end = first_key + C::kKeys;
    to.first = first_key;
    to.count = min(tile.visible_end - first_key, C::kKeys);
    to.masked = !((first_key >= tile.common[2] && end <= min(tile.common[3], task.keys.kv_len)) ||
                  (first_key >= tile.common[0] && end <= min(tile.common[1], task.keys.kv_len)));
  }
}

// One warp: the next segment into task[slot], and its first tiles' keys. Not called but in line:
// where O is live, a call spills it, and then in the whole loop over keys.
template <class C>
__device__ __forceinline__ void prepare(const KernelParams& p, PrefillShared<C>& shared, int slot,
                                        bool first) {
  PrefillTask& task = shared.task[slot];
  if (threadIdx.x % 32 == 0) {
    Segment& segment = task.segment;
    task.exists = p.schedule.header->whole ? next_whole_item(p.schedule, first, &segment)
                                           : shared.walker.next(p.schedule, &segment);
    task.count = 0;
    if (task.exists) {
      task.count = (segment.existing_end(keys_of(p, segment.tile), kKvTile) - segment.unit_begin) *
                   (kKvTile / C::kKeys);
      task.kv_head = segment.head / p.passes;
      task.first_column = (segment.head - task.kv_head * p.passes) * p.columns;
      task.columns = min(p.columns, p.layer.head_size_v - task.first_column);
      task.keys = loadable_keys(p, segment.tile);
      const KvParams& k = p.k;
      const KvParams& v = p.v;
      task.base[0] =
          static_cast<const char*>(k.data) + task.kv_head * k.strides.head * size_of(k.dtype);
      task.base[1] = static_cast<const char*>(v.data) +
                     (task.kv_head * v.strides.head + task.first_column) * size_of(v.dtype);
    }
  }
  __syncwarp();
  look_up(p, shared, slot, 0);
}

}  // namespace quire::cuda::sm80
