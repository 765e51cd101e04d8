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

// The units that cover `visible`, each once. Keys are below 2^31: divisions by a unit that is not known
// at compile time take a fifth of the instructions in 32 bits.
QUIRE_HOST_DEVICE KvUnits make_units(const Spans& visible, std::int32_t unit) {
  const auto divisor = static_cast<std::uint32_t>(unit);
  const auto below = [divisor](std::int64_t key) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(key) / divisor);
  };
  const auto up_to = [divisor](std::int64_t key) {
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(key) + divisor - 1) / divisor);
  };
  KvUnits units;
  std::int32_t next = 0;
  if (!visible.prefix.empty()) {
    units.prefix_first = below(visible.prefix.begin);
    next = up_to(visible.prefix.end);
    units.prefix_count = next - units.prefix_first;
  }
  if (!visible.main.empty()) {
    const std::int32_t first = below(visible.main.begin);
    units.main_first = first > next ? first : next;
    const std::int32_t end = up_to(visible.main.end);
    units.main_count = end > units.main_first ? end - units.main_first : 0;
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
