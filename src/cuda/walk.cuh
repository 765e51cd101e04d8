// How a CTA finds its work: a contiguous range of cost, cut into segments (tile, head, units).
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
  std::int64_t item_begin;
  // No initialisers: a Segment lives in shared memory too.
  __device__ bool whole() const { return unit_begin == 0 && unit_end == tile.num_units(); }
};

// Where a cut at cost position x of an item falls in its units.
__device__ __forceinline__ std::int32_t unit_of_cut(const Tile& tile, std::int64_t x) {
  const std::int32_t count = tile.num_units();
  if (x >= tile.cost) return count;
  const auto unit = static_cast<std::int32_t>(x) - kOverhead;
  if (unit <= 0) return 0;
  const std::int32_t rounded = (unit + tile.chunk_units / 2) / tile.chunk_units * tile.chunk_units;
  return rounded < count ? rounded : count;
}

class Walker {
 public:
  Walker() = default;
  __device__ explicit Walker(const ScheduleView& schedule)
      : num_ctas_(schedule.header->num_ctas), total_(schedule.header->total_cost) {
    const auto cta = static_cast<std::int32_t>(blockIdx.x);
    tile_ = head_ = 0;
    position_ = end_ = 0;
    if (cta >= num_ctas_) return;
    position_ = bound(cta);
    end_ = bound(cta + 1);
    tile_ = schedule.starts[cta].tile;
    head_ = schedule.starts[cta].head;
  }

  // The next piece of work; false when there is none left.
  __device__ bool next(const ScheduleView& schedule, Segment* segment) {
    while (position_ < end_) {
      const Tile& tile = schedule.tiles[tile_];
      const std::int64_t item_begin = tile.cost_begin + std::int64_t{head_} * tile.cost;
      const std::int64_t x0 = position_ - item_begin;
      const std::int64_t x1 = semantics::min_of(end_ - item_begin, tile.cost);
      const std::int32_t begin = x0 == 0 ? 0 : unit_of_cut(tile, x0);
      const std::int32_t end = unit_of_cut(tile, x1);
      const bool mine = begin < end || (x0 == 0 && tile.num_units() == 0);
      if (mine) {
        segment->tile = tile;
        segment->head = head_;
        segment->unit_begin = begin;
        segment->unit_end = end;
        segment->item_begin = item_begin;
      }
      position_ = item_begin + x1;
      if (x1 == tile.cost && ++head_ == schedule.heads) {
        head_ = 0;
        ++tile_;
      }
      if (mine) return true;
    }
    return false;
  }

  // The CTAs whose ranges meet the item.
  __device__ std::int32_t first_cta(const Segment& segment) const {
    return cta_of(segment.item_begin);
  }
  __device__ std::int32_t last_cta(const Segment& segment) const {
    return cta_of(segment.item_begin + segment.tile.cost - 1);
  }

  // How many partial results a CTA leaves of the item: one for what begins it, else one a chunk
  // (one in all where chunks do not matter). `*begins`: whether it holds the item's beginning.
  __device__ std::int32_t parts_of(const Segment& segment, std::int32_t cta, bool one_part,
                                   bool* begins) const {
    const std::int64_t x0 = semantics::max_of(bound(cta) - segment.item_begin, 0);
    const std::int64_t x1 =
        semantics::min_of(bound(cta + 1) - segment.item_begin, segment.tile.cost);
    const std::int32_t begin = unit_of_cut(segment.tile, x0);
    const std::int32_t end = unit_of_cut(segment.tile, x1);
    *begins = begin == 0 && end > 0;
    if (begin >= end) return 0;
    if (one_part || begin == 0) return 1;
    return (end - begin + segment.tile.chunk_units - 1) / segment.tile.chunk_units;
  }

 private:
  __device__ std::int64_t bound(std::int64_t cta) const { return cta * total_ / num_ctas_; }
  __device__ std::int32_t cta_of(std::int64_t position) const {
    auto cta = static_cast<std::int32_t>(position * num_ctas_ / total_);
    while (cta + 1 < num_ctas_ && bound(cta + 1) <= position) ++cta;
    while (bound(cta) > position) --cta;
    return cta;
  }

  // No initialisers: a Walker lives in shared memory too.
  std::int32_t num_ctas_;
  std::int32_t tile_;
  std::int32_t head_;
  std::int64_t total_;
  std::int64_t position_;
  std::int64_t end_;
};

}  // namespace quire::cuda
