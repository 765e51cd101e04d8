// How a CTA finds its work: a contiguous range of units, cut into segments (tile, head, units).
#pragma once

#include <cstdint>

#include "cuda/limits.h"
#include "cuda/work.h"

namespace quire::cuda {

struct Segment {
  Tile tile;
  std::int32_t head;  // kv head and column pass, see KernelParams::passes
  std::int32_t unit_begin;
  std::int32_t unit_end;
  // No initialisers: a Segment lives in shared memory too.
  QUIRE_HOST_DEVICE bool whole() const { return unit_begin == 0 && unit_end == tile.num_units(); }
};

// The CTAs that work on one item, and how many of them leave a part.
struct Sharers {
  std::int32_t first;
  std::int32_t last;
  std::int32_t count;
};

// Piece by piece: kernels call it where their registers are full.
QUIRE_HOST_DEVICE void copy_tile(const Tile* from, Tile* to) {
  struct alignas(16) Piece {
    std::int64_t low;
    std::int64_t high;
  };
  static_assert(sizeof(Tile) % sizeof(Piece) == 0);
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (std::size_t i = 0; i < sizeof(Tile) / sizeof(Piece); ++i) {
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
  }
}

class Walker {
 public:
  Walker() = default;
  QUIRE_HOST_DEVICE Walker(const ScheduleView& schedule, std::int32_t cta) : tile_(0), head_(0) {
    end_tile_ = end_head_ = end_unit_ = unit_ = 0;
    if (cta >= schedule.header->num_ctas) return;
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

  // The next piece of work; false when there is none left.
  QUIRE_HOST_DEVICE bool next(const ScheduleView& schedule, Segment* segment) {
    const bool last = tile_ == end_tile_ && head_ == end_head_;
    if (last ? unit_ >= end_unit_ : tile_ > end_tile_) return false;
    copy_tile(schedule.tiles + tile_, &segment->tile);
    segment->head = head_;
    segment->unit_begin = unit_;
    segment->unit_end = last ? end_unit_ : segment->tile.num_units();
    if (last) {
      unit_ = end_unit_;
      return true;
    }
    unit_ = 0;
    if (++head_ == schedule.heads) {
      head_ = 0;
      ++tile_;
    }
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
