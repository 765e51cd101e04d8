// How the keys of one query tile are cut into kv_tiles and chunks. Every number depends on the
// request's own lengths and the layer only, never on the rest of the batch: that is what batch
// invariance needs, and it costs nothing to always have it.
#pragma once

#include <cstdint>

#include "semantics/host_device.h"
#include "semantics/mask.h"

namespace quire::planning {

// The kv tiles a query tile visits: tile indices [prefix_first, prefix_first + prefix_count) and
// then [main_first, main_first + main_count), in kv_tiles of the kv tile.
struct KvTiles {
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

// The kv_tiles that cover `visible`, each once. Keys are below 2^31: divisions by a unit that is not known
// at compile time take a fifth of the instructions in 32 bits.
QUIRE_HOST_DEVICE KvTiles kv_tiles_of(const semantics::Spans& visible, std::int32_t kv_tile) {
  const auto divisor = static_cast<std::uint32_t>(kv_tile);
  const auto below = [divisor](std::int64_t key) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(key) / divisor);
  };
  const auto up_to = [divisor](std::int64_t key) {
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(key) + divisor - 1) / divisor);
  };
  KvTiles kv_tiles;
  std::int32_t next = 0;
  if (!visible.prefix.empty()) {
    kv_tiles.prefix_first = below(visible.prefix.begin);
    next = up_to(visible.prefix.end);
    kv_tiles.prefix_count = next - kv_tiles.prefix_first;
  }
  if (!visible.main.empty()) {
    const std::int32_t first = below(visible.main.begin);
    kv_tiles.main_first = first > next ? first : next;
    const std::int32_t end = up_to(visible.main.end);
    kv_tiles.main_count = end > kv_tiles.main_first ? end - kv_tiles.main_first : 0;
  }
  return kv_tiles;
}

// A query tile's keys fall into at most kMaxKvChunks chunks. Chunks are folded in order whoever
// computes them, so the result's bits do not depend on how chunks are handed out.
inline constexpr std::int32_t kMaxKvChunks = 16;

// Units of one chunk; the last may be shorter. `min_kv_tiles` keeps chunks worth their bookkeeping.
QUIRE_HOST_DEVICE std::int32_t kv_tiles_per_chunk(std::int32_t num_kv_tiles,
                                                  std::int32_t min_kv_tiles) {
  const std::int32_t size = (num_kv_tiles + kMaxKvChunks - 1) / kMaxKvChunks;
  return size > min_kv_tiles ? size : min_kv_tiles;
}

QUIRE_HOST_DEVICE std::int32_t num_kv_chunks(std::int32_t num_kv_tiles, std::int32_t per_chunk) {
  return num_kv_tiles == 0 ? 1 : (num_kv_tiles + per_chunk - 1) / per_chunk;
}

}  // namespace quire::planning
