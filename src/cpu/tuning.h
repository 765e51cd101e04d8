// (problem) -> tile policy. Pure functions; each number has its reason beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace quire::cpu {

// How one request's queries and keys are tiled. Depends on the layer and on the request's own
// query length only (batch invariance).
struct TilePolicy {
  std::int32_t tokens = 1;    // query tokens of a tile; rows = tokens * group
  std::int32_t kv_tile = 64;  // keys of a unit of work
  std::int32_t min_units_per_chunk = 1;
  bool few_rows = false;    // memory-bound: K is used as it lies, see cpu/attention-inl.h
  bool splittable = false;  // whether keys may be cut into chunks
};

// Up to this many rows the CPU kernel reads K and V straight from the cache, widening each vector
// once per 4 rows; above it, transposing K once per tile for all rows is cheaper. At 20 rows the
// direct way was 1.2 times faster (docs/experiments.md).
inline constexpr std::int32_t kFewRows = 32;

// Rows of a prefill tile: 96 = 16 blocks of the 6-row micro-kernel; Q, S, O and a K and V tile of
// head size 128 then take 200 KiB, a fraction of a 1 MiB L2.
inline constexpr std::int32_t kPrefillRows = 96;

// Up to this many rows a request is memory-bound enough that splitting its keys can pay.
inline constexpr std::int32_t kSplitRows = 64;

inline TilePolicy tile_policy(const LayerParams& layer, std::int64_t query_len) {
  const std::int64_t rows = query_len * layer.group;
  TilePolicy policy;
  if (rows <= kFewRows) {
    policy.few_rows = true;
    policy.kv_tile = 32;  // K and V as fp32 at head size 128: 32 KiB, the size of an L1
  }
  policy.splittable = rows <= kSplitRows;
  // At least 256 keys a chunk: a chunk costs one fold of its rows, well under 1 % of 256 keys.
  policy.min_units_per_chunk = 256 / policy.kv_tile;
  const std::int32_t most_rows = policy.splittable ? kSplitRows : kPrefillRows;
  policy.tokens = std::max(most_rows / layer.group, 1);
  return policy;
}

// Tiles of rows that share a prefix: many rows, long keys, few tiles.
inline TilePolicy shared_prefix_policy(const LayerParams& layer) {
  TilePolicy policy;
  policy.splittable = true;
  policy.min_units_per_chunk = 256 / policy.kv_tile;
  policy.tokens = std::max(kPrefillRows / layer.group, 1);
  return policy;
}

// Most kv heads that one item of few rows takes together. All heads of a token lie side by side in
// the NHD cache, so reading them together walks memory in order: one head at a time reached 18 of
// 38 GB/s, all together 31 (docs/experiments.md). Their widened K and V stay within 256 KiB of L2.
inline std::int32_t most_heads(const LayerParams& layer, std::int32_t kv_tile) {
  const std::int64_t floats = std::int64_t{kv_tile} * (layer.head_size + layer.head_size_v);
  const auto fit = static_cast<std::int32_t>(std::max<std::int64_t>(65536 / floats, 1));
  return std::min(fit, layer.num_kv_heads);
}

// Items a worker should find before heads are taken together at the expense of parallelism.
inline constexpr std::int32_t kItemsPerThread = 4;

// Relative cost of one unit for one kv head: reading and widening its elements, plus the
// multiply-adds of every row. 8 rows of multiply-adds take about as long as the reading.
inline std::int64_t unit_cost(const LayerParams& layer, std::int64_t rows, std::int32_t kv_tile) {
  return (layer.head_size + layer.head_size_v) * std::int64_t{kv_tile} * (8 + rows) / 64;
}

// Ranges of work per thread. More balance better on noisy machines, fewer split less.
inline constexpr std::int32_t kRangesPerThread = 8;

}  // namespace quire::cpu
