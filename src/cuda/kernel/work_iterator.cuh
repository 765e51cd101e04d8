// How a CTA finds its work: a contiguous range of units, cut into segments (tile, head, units).
#pragma once

#include <cstdint>

#include "cuda/kernel_params.h"
#include "cuda/plan/tuning.h"

namespace quire::cuda {

struct Segment {
  Tile tile;
  std::int32_t head;  // kv head and column pass, see KernelParams::passes
  std::int32_t unit_begin;
  std::int32_t unit_end;
  std::int32_t stop;  // existing_end(), where two sides must agree: in the decode kernel
  // No initialisers: a Segment lives in shared memory too.
  QUIRE_HOST_DEVICE bool whole() const { return unit_begin == 0 && unit_end == tile.num_units(); }

  // The end of its units of which any key exists. Only the call knows how many keys direct attention
  // has: a plan over wild lengths counts on more, and would have them worked through.
  QUIRE_HOST_DEVICE std::int32_t existing_end(std::int32_t num_keys, std::int32_t kv_tile) const {
    return static_cast<std::int32_t>(
        clamp_index(tile.units_before(num_keys, kv_tile), unit_begin, unit_end));
  }
};

// The CTAs that work on one item, and how many of them leave a part.
struct Sharers {
  std::int32_t first;
  std::int32_t last;
  std::int32_t count;
};

class Walker {
 public:
  Walker() = default;
  // The plan writes the starts of all CTAs of the grid; those without work start where they end.
  QUIRE_HOST_DEVICE Walker(const ScheduleView& schedule, std::int32_t cta) {
    const CtaStart start = schedule.starts[cta];
    const CtaStart end = schedule.starts[cta + 1];
    tile_ = start.tile;
    head_ = start.head;
    unit_ = start.unit;
    before_ = {start.first_cta, start.last_cta, start.num_sharers};
    end_tile_ = end.tile;
    end_head_ = end.head;
    end_unit_ = end.unit;
    after_ = {end.first_cta, end.last_cta, end.num_sharers};
  }

  // The next piece of work is units [begin, end) of head `head` of the tile that is returned (end -1:
  // to its last); null when there is none left.
  QUIRE_HOST_DEVICE const Tile* next(const ScheduleView& schedule, std::int32_t* head,
                                     std::int32_t* begin, std::int32_t* end) {
    const bool last = tile_ == end_tile_ && head_ == end_head_;
    if (last ? unit_ >= end_unit_ : tile_ > end_tile_) return nullptr;
    const Tile* tile = schedule.tiles + tile_;
    *head = head_;
    *begin = unit_;
    *end = last ? end_unit_ : -1;
    if (last) {
      unit_ = end_unit_;
      return tile;
    }
    unit_ = 0;
    if (++head_ == schedule.heads) {
      head_ = 0;
      ++tile_;
    }
    return tile;
  }

  QUIRE_HOST_DEVICE bool next(const ScheduleView& schedule, Segment* segment) {
    const Tile* tile = next(schedule, &segment->head, &segment->unit_begin, &segment->unit_end);
    if (tile == nullptr) return false;
    segment->tile = *tile;
    if (segment->unit_end < 0) segment->unit_end = segment->tile.num_units();
    return true;
  }

  // Of a segment that is not a whole item.
  QUIRE_HOST_DEVICE Sharers sharers(const Segment& segment) const {
    return segment.unit_begin > 0 ? before_ : after_;
  }

 private:
  // No initialisers: a Walker lives in shared memory too.
  std::int32_t tile_;
  std::int32_t head_;
  std::int32_t unit_;
  std::int32_t end_tile_;
  std::int32_t end_head_;
  std::int32_t end_unit_;
  Sharers before_;  // of the item that the range starts in the middle of,
  Sharers after_;   // and of the one that it ends in the middle of
};

}  // namespace quire::cuda
