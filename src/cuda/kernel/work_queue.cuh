// How a CTA finds its work where items may be whole.
#pragma once

#include "cuda/kernel/work_iterator.cuh"

namespace quire::cuda {

// The splits of a CTA where items may be whole (ScheduleHeader::whole_tiles): first whole items,
// which CTAs take one by one, then its work range.
class WorkQueue {
 public:
  WorkQueue() = default;
  // Of CTA `cta` of the `num_ctas` that take whole items.
  __device__ WorkQueue(const ScheduleView& schedule, std::int32_t cta, std::int32_t num_ctas)
      : header_(*schedule.header),
        range_(schedule, cta),
        turn_(0),
        cta_(cta),
        num_ctas_(num_ctas) {}

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
  // In place of the constructor, with what it reads in two halves: as one it takes more registers
  // than a warp that only loads may have.
  __device__ void begin_whole(const ScheduleView& schedule, std::int32_t cta,
                              std::int32_t num_ctas) {
    header_ = *schedule.header;
    turn_ = 0;
    cta_ = cta;
    num_ctas_ = num_ctas;
  }
  __device__ void begin_range(const ScheduleView& schedule, std::int32_t cta) {
    range_ = WorkIterator(schedule, cta);
  }

  __device__ std::int32_t cta() const { return cta_; }
  __device__ ItemCtas item_ctas(const Split& split) const { return range_.item_ctas(split); }

 private:
  // Each CTA that had an item asks once when none is left, so there are as many calls as items, and
  // the last puts the counter back to 0.
  __device__ const WorkTile* next_whole(const ScheduleView& schedule, std::int32_t* head) {
    const int items = header_.whole_tiles * schedule.heads;
    int item = cta_;
    if (turn_ > 0) {
      const int taken = atomicAdd(schedule.taken, 1);
      if (taken == items - 1) *schedule.taken = 0;
      item = num_ctas_ + taken;
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
  std::int32_t cta_;
  std::int32_t num_ctas_;
};

}  // namespace quire::cuda
