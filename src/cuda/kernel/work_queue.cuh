// How a CTA finds its work where items may be whole.
#pragma once

#include "cuda/kernel/work_iterator.cuh"

namespace quire::cuda {

// The splits of a CTA where items may be whole (ScheduleHeader::whole_tiles): first whole items,
// which CTAs take one by one, then its work range.
class WorkQueue {
 public:
  WorkQueue() = default;
  __device__ WorkQueue(const ScheduleView& schedule, std::int32_t cta)
      : header_(*schedule.header), range_(schedule, cta), turn_(0) {}

  // As WorkIterator::next().
  __device__ const WorkTile* next(const ScheduleView& schedule, std::int32_t* head,
                                  std::int32_t* begin, std::int32_t* end) {
    if (turn_ >= 0) {
      const WorkTile* tile = next_whole(schedule, head);
      *begin = 0;
      *end = -1;
      if (tile != nullptr) return tile;
    }
    turn_ = -1;
    return range_.next(schedule, head, begin, end);
  }
  __device__ bool next(const ScheduleView& schedule, Split* split) {
    const WorkTile* tile = next(schedule, &split->head, &split->kv_tile_begin, &split->kv_tile_end);
    if (tile == nullptr) return false;
    split->tile = *tile;
    if (split->kv_tile_end < 0) split->kv_tile_end = split->tile.num_kv_tiles();
    return true;
  }
  __device__ ItemCtas item_ctas(const Split& split) const { return range_.item_ctas(split); }

 private:
  // Each CTA that had an item asks once when none is left, so there are as many calls as items, and
  // the last puts the counter back to 0.
  __device__ const WorkTile* next_whole(const ScheduleView& schedule, std::int32_t* head) {
    const int items = header_.whole_tiles * schedule.heads;
    int item = static_cast<int>(blockIdx.x);
    if (turn_ > 0) {
      const int taken = atomicAdd(schedule.taken, 1);
      if (taken == items - 1) *schedule.taken = 0;
      item = static_cast<int>(gridDim.x) + taken;
    }
    turn_ = 1;
    if (item >= items) return nullptr;
    int tile;
    header_.whole_item(item, schedule.heads, &tile, head);
    return schedule.tiles + tile;
  }

  // No initialisers: a WorkQueue lives in shared memory too.
  ScheduleHeader header_;
  WorkIterator range_;
  std::int32_t turn_;  // 0: it has taken nothing yet; -1: no whole items are left
};

}  // namespace quire::cuda
