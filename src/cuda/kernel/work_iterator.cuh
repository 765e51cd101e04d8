// How a CTA finds its work: its range of kv tiles, one work item after the other. What it has of an
// item is a split, which may be the whole item.
#pragma once

#include <cstdint>

#include "cuda/kernel_params.h"

namespace quire::cuda {

struct Split {
  WorkTile tile;
  std::int32_t head;  // kv head and column pass, see KernelParams::passes
  std::int32_t kv_tile_begin;
  std::int32_t kv_tile_end;
  std::int32_t stop;  // existing_end(), where two sides must agree: in the decode kernel
  // No initialisers: a Split lives in shared memory too.
  QUIRE_HOST_DEVICE bool whole() const {
    return kv_tile_begin == 0 && kv_tile_end == tile.num_kv_tiles();
  }

  // The end of those of its kv tiles that have a key. Only the call knows how many keys direct
  // attention has: a plan over wild lengths has more kv tiles, and they would be worked through.
  QUIRE_HOST_DEVICE std::int32_t existing_end(std::int32_t num_keys, std::int32_t kv_tile) const {
    return static_cast<std::int32_t>(
        clamp_index(tile.kv_tiles_before(num_keys, kv_tile), kv_tile_begin, kv_tile_end));
  }
};

// The CTAs that work on one item, and how many of them leave a partial.
struct ItemCtas {
  std::int32_t first;
  std::int32_t last;
  std::int32_t count;
};

class WorkIterator {
 public:
  WorkIterator() = default;
  // The plan writes the work ranges of all CTAs of the grid; one without work begins where it ends.
  QUIRE_HOST_DEVICE WorkIterator(const ScheduleView& schedule, std::int32_t cta) {
    const WorkRange start = schedule.work_ranges[cta];
    const WorkRange end = schedule.work_ranges[cta + 1];
    tile_ = start.tile;
    head_ = start.head;
    kv_tile_ = start.kv_tile;
    before_ = {start.first_cta, start.last_cta, start.num_ctas_at_work};
    end_tile_ = end.tile;
    end_head_ = end.head;
    end_kv_tile_ = end.kv_tile;
    after_ = {end.first_cta, end.last_cta, end.num_ctas_at_work};
  }

  // The next split: kv tiles [begin, end) of head `head` of the tile that is returned (end -1: to
  // its last); null when there is none left.
  QUIRE_HOST_DEVICE const WorkTile* next(const ScheduleView& schedule, std::int32_t* head,
                                         std::int32_t* begin, std::int32_t* end) {
    const bool last = tile_ == end_tile_ && head_ == end_head_;
    if (last ? kv_tile_ >= end_kv_tile_ : tile_ > end_tile_) return nullptr;
    const WorkTile* tile = schedule.tiles + tile_;
    *head = head_;
    *begin = kv_tile_;
    *end = last ? end_kv_tile_ : -1;
    if (last) {
      kv_tile_ = end_kv_tile_;
      return tile;
    }
    kv_tile_ = 0;
    if (++head_ == schedule.heads) {
      head_ = 0;
      ++tile_;
    }
    return tile;
  }

  QUIRE_HOST_DEVICE bool next(const ScheduleView& schedule, Split* split) {
    const WorkTile* tile = next(schedule, &split->head, &split->kv_tile_begin, &split->kv_tile_end);
    if (tile == nullptr) return false;
    split->tile = *tile;
    if (split->kv_tile_end < 0) split->kv_tile_end = split->tile.num_kv_tiles();
    return true;
  }

  // Of a split that is not a whole item.
  QUIRE_HOST_DEVICE ItemCtas item_ctas(const Split& split) const {
    return split.kv_tile_begin > 0 ? before_ : after_;
  }

 private:
  // No initialisers: a WorkIterator lives in shared memory too.
  std::int32_t tile_;
  std::int32_t head_;
  std::int32_t kv_tile_;
  std::int32_t end_tile_;
  std::int32_t end_head_;
  std::int32_t end_kv_tile_;
  ItemCtas before_;  // of the item that the range begins in the middle of,
  ItemCtas after_;   // and of the one that it ends in the middle of
};

}  // namespace quire::cuda
