// How the keys of one work tile fall into kv tiles, and these into kv chunks. Every number depends
// on the sequence's own lengths and the layer only, never on the rest of the batch: results that
// depend on where keys were cut would else differ from batch to batch (batch invariance).
#pragma once

#include <cstdint>

#include "semantics/host_device.h"
#include "semantics/mask.h"

namespace quire::planning {

// The kv tiles that a work tile visits: [prefix_first, prefix_first + prefix_count), then
// [main_first, main_first + main_count). Kv tile i has the keys from i times its size on.
struct KvTiles {
  std::int32_t prefix_first = 0;
  std::int32_t prefix_count = 0;
  std::int32_t main_first = 0;
  std::int32_t main_count = 0;
  QUIRE_HOST_DEVICE std::int32_t count() const { return prefix_count + main_count; }
  // The index of the i-th kv tile visited.
  QUIRE_HOST_DEVICE std::int32_t at(std::int32_t i) const {
    return i < prefix_count ? prefix_first + i : main_first + (i - prefix_count);
  }
};

// The kv tiles of `kv_tile` keys that cover `visible`, each once. Keys are below 2^31, and
// divisions by a number that is not known at compile time take a fifth of the instructions in 32
// bits.
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

// A work tile has at most this many kv chunks. Their partials are combined in order, whichever
// thread or CTA computed them, so that results do not depend on how chunks are handed out.
inline constexpr std::int32_t kMaxKvChunks = 16;

// The last chunk may have fewer. With fewer than `min_kv_tiles`, a partial would cost too much
// beside the attention over its chunk.
QUIRE_HOST_DEVICE std::int32_t kv_tiles_per_chunk(std::int32_t num_kv_tiles,
                                                  std::int32_t min_kv_tiles) {
  const std::int32_t size = (num_kv_tiles + kMaxKvChunks - 1) / kMaxKvChunks;
  return size > min_kv_tiles ? size : min_kv_tiles;
}

QUIRE_HOST_DEVICE std::int32_t num_kv_chunks(std::int32_t num_kv_tiles, std::int32_t per_chunk) {
  return num_kv_tiles == 0 ? 1 : (num_kv_tiles + per_chunk - 1) / per_chunk;
}

}  // namespace quire::planning
