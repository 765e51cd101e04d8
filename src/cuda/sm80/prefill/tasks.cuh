// What a CTA of the prefill kernel does next, and where the keys of its tiles are.
#pragma once

#include "cuda/kernel/kv_address.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/sm80/prefill/config.cuh"

namespace quire::cuda::sm80 {

// Whether 16 keys from a multiple of 16 on lie in one block; else copies look up each row.
__device__ __forceinline__ bool has_strips(const KernelParams& p) {
  return !p.layer.paged || p.layer.block_size % 16 == 0;
}

// Whether rows can be copied in whole pieces, 16 rows from one address.
template <class C, int kSide>
__device__ __forceinline__ bool is_regular(const KernelParams& p) {
  constexpr int kElement = C::kKv8 ? 1 : 2;
  const KvParams& kv = kSide == 0 ? p.k : p.v;
  return PrefillSide<C, kSide>::kRegular && has_strips(p) &&
         (kSide == 0 ? p.k_copy_bytes : p.v_copy_bytes) >= 16 &&
         (kSide == 0 ? p.layer.head_size : p.layer.head_size_v) * kElement % 16 == 0 &&
         kv.strides.slot >= 0 && kv.strides.slot < (1 << 26);
}

template <class C>
__device__ __forceinline__ int first_key_of(const Split& split, int i) {
  constexpr int kSteps = kKvTile / C::kKeys;
  return split.tile.kv_tile(split.kv_tile_begin + i / kSteps) * kKvTile + i % kSteps * C::kKeys;
}

// Bits [begin, end) of 16, both clamped.
__device__ __forceinline__ std::uint32_t bits_between(int begin, int end) {
  begin = min(max(begin, 0), 16);
  end = min(max(end, 0), 16);
  return begin < end ? (1U << end) - (1U << begin) : 0U;
}

// One warp: tiles [first, first + kBatch) of a task into the ring, a lane a strip of 16 keys.
template <class C>
__device__ __forceinline__ void look_up(const KernelParams& p, PrefillShared<C>& shared, int turn,
                                        int first) {
  const auto lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
  const PrefillTask& task = shared.task[turn];
  const WorkTile& tile = task.split.tile;
  const int i = first + lane / C::kStrips;
  const bool used = lane < C::kBatch * C::kStrips && i < task.count;
  const std::uint32_t lanes = __ballot_sync(~0U, used);
  if (!used) return;
  const int g = lane % C::kStrips;
  KvTile<C>& to = shared.ring[turn][i % C::kRing];
  const int first_key = first_key_of<C>(task.split, i);
  const int key = first_key + g * 16;
  std::uint32_t present =
      bits_between(0, task.keys.kv_len - key) &
      ~bits_between(task.keys.out_of_window_begin - key, task.keys.out_of_window_end - key);
  KvRow row;
  std::uint32_t unmapped = 0;
  if (present != 0 && has_strips(p)) {
    row = kv_row(p, tile, key);
    if (row.block < 0) {
      unmapped = present;
      present = 0;
    }
  } else if (C::kUnmappedApart) {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const bool is_present = (present >> i & 1U) != 0;
      if (is_present && kv_row(p, tile, key + i).block < 0) unmapped |= 1U << i;
    }
  }
  const bool found = row.block >= 0;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const KvParams& kv = side == 0 ? p.k : p.v;
    to.strip[side][g] =
        task.base[side] +
        (found ? row.block * kv.strides.block + row.slot * kv.strides.slot : 0) * (C::kKv8 ? 1 : 2);
  }
  if constexpr (C::kKv8) {
    to.block[g] = static_cast<std::int32_t>(row.block);
    to.slot[g] = static_cast<std::int32_t>(row.slot);
  }
  reinterpret_cast<std::uint16_t*>(&to.present)[g] = static_cast<std::uint16_t>(present);
  reinterpret_cast<std::uint16_t*>(&to.unmapped)[g] = static_cast<std::uint16_t>(unmapped);
  const std::uint32_t full = __ballot_sync(lanes, present == 0xFFFFU);
  if (g == 0) {
    constexpr std::uint32_t kAll = (1U << C::kStrips) - 1;
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

// One warp: the next split into task[turn], and its first tiles' keys. Not called but in line:
// where O is live, a call spills it, and then in the whole loop over keys.
template <class C>
__device__ __forceinline__ void prepare(const KernelParams& p, PrefillShared<C>& shared, int turn) {
  PrefillTask& task = shared.task[turn];
  if (threadIdx.x % 32 == 0) {
    Split& split = task.split;
    task.exists = shared.queue.next(p.schedule, &split);
    task.count = 0;
    if (task.exists) {
      task.count = (split.existing_end(keys_of(p, split.tile), kKvTile) - split.kv_tile_begin) *
                   (kKvTile / C::kKeys);
      task.kv_head = split.head / p.passes;
      task.first_column = (split.head - task.kv_head * p.passes) * p.columns;
      task.columns = min(p.columns, p.layer.head_size_v - task.first_column);
      task.keys = loadable_keys(p, split.tile);
      const KvParams& k = p.k;
      const KvParams& v = p.v;
      task.base[0] =
          static_cast<const char*>(k.data) + task.kv_head * k.strides.head * size_of(k.dtype);
      task.base[1] = static_cast<const char*>(v.data) +
                     (task.kv_head * v.strides.head + task.first_column) * size_of(v.dtype);
    }
  }
  __syncwarp();
  look_up(p, shared, turn, 0);
}

}  // namespace quire::cuda::sm80
