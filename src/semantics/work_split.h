// How the keys of one query tile are cut into units and chunks. Every number depends on the
// request's own lengths and the layer only, never on the rest of the batch: that is what batch
// invariance needs, and it costs nothing to always have it.
#pragma once

#include <cstdint>

#include "semantics/host_device.h"
#include "semantics/mask.h"

namespace quire::semantics {

// The kv tiles a query tile visits: tile indices [prefix_first, prefix_first + prefix_count) and
// then [main_first, main_first + main_count), in units of the kv tile.
struct KvUnits {
  std::int32_t prefix_first = 0;
  std::int32_t prefix_count = 0;
  std::int32_t main_first = 0;
  std::int32_t main_count = 0;
  QUIRE_HOST_DEVICE std::int32_t count() const { return prefix_count + main_count; }
  // The absolute kv tile of the i-th visit.
  QUIRE_HOST_DEVICE std::int32_t at(std::int32_t i) const {
    return i < prefix_count ? prefix_first + i : main_first + (i - prefix_count);
  }
};

// The units that cover `visible`, each once.
QUIRE_HOST_DEVICE KvUnits make_units(const Spans& visible, std::int64_t unit) {
  KvUnits units;
  std::int64_t next = 0;
  if (!visible.prefix.empty()) {
    const std::int64_t first = visible.prefix.begin / unit;
    next = (visible.prefix.end + unit - 1) / unit;
    units.prefix_first = static_cast<std::int32_t>(first);
    units.prefix_count = static_cast<std::int32_t>(next - first);
  }
  if (!visible.main.empty()) {
    const std::int64_t first = max_of(visible.main.begin / unit, next);
    const std::int64_t end = (visible.main.end + unit - 1) / unit;
    units.main_first = static_cast<std::int32_t>(first);
    units.main_count = end > first ? static_cast<std::int32_t>(end - first) : 0;
  }
  return units;
}

// A query tile's keys fall into at most kMaxChunks chunks. Chunks are folded in order whoever
// computes them, so the result's bits do not depend on how chunks are handed out.
inline constexpr std::int32_t kMaxChunks = 16;

// Units of one chunk; the last may be shorter. `min_units` keeps chunks worth their bookkeeping.
QUIRE_HOST_DEVICE std::int32_t chunk_units(std::int32_t num_units, std::int32_t min_units) {
  const std::int32_t size = (num_units + kMaxChunks - 1) / kMaxChunks;
  return size > min_units ? size : min_units;
}

QUIRE_HOST_DEVICE std::int32_t num_chunks(std::int32_t num_units, std::int32_t units_per_chunk) {
  return num_units == 0 ? 1 : (num_units + units_per_chunk - 1) / units_per_chunk;
}

}  // namespace quire::semantics
