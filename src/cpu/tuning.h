// (problem) -> tile policy, for the ISA that the process runs on. Each number has its reason beside
// it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "params.h"

namespace quire::cpu {

// Whether prefill multiplies by tile instructions: where the ISA has them, everything that they
// multiply is exact in bf16, and a head fills a step of them. Queries of fp16 would lose 3 bits, and
// those of fp32 16.
inline bool uses_tiles(const LayerParams& layer) {
  if (kernels().multiply_tiles == nullptr || layer.head_size < kTileDepth ||
      layer.head_size_v < kTileDepth) {
    return false;
  }
  const auto is_exact = [](DType dtype) {
    return dtype == DType::kBFloat16 || dtype == DType::kFloat8E4M3 ||
           dtype == DType::kFloat8E5M2 || dtype == DType::kInt8;
  };
  return is_exact(layer.dtype) && is_exact(layer.kv_dtype);
}

// Whether so many rows of decode multiply by instructions for bf16, which take 8 rows at a time. Over bf16
// and int8 4 rows and fewer are faster without; over fp8, whose widening is the limit, they are not.
inline bool uses_pairs(const LayerParams& layer, std::int32_t rows) {
  if (kernels().multiply_pairs == nullptr || layer.dtype != DType::kBFloat16 ||
      layer.head_size % 32 != 0 || layer.head_size_v % 32 != 0) {
    return false;
  }
  const bool fp8 = layer.kv_dtype == DType::kFloat8E4M3 || layer.kv_dtype == DType::kFloat8E5M2;
  return uses_tiles(layer) && (fp8 || rows > 4);
}

// How the queries and keys of one sequence are tiled. Depends on the layer and on the sequence's
// own query length only (batch invariance).
struct TilePolicy {
  std::int32_t tokens = 1;    // query tokens of a work tile; rows = tokens * group
  std::int32_t kv_tile = 64;  // keys of one step of the inner loop
  std::int32_t min_kv_tiles_per_chunk = 1;
  bool decode = false;      // memory-bound: decode-inl.h, else prefill-inl.h
  bool splittable = false;  // whether keys may be cut into kv chunks
};

// Up to this many rows the decode kernel reads K and V straight from the cache and widens each
// vector once per 4 rows. With more rows it is cheaper to transpose K once per kv tile for all of
// them (prefill). At 20 rows the decode kernel was 1.2 times faster (docs/experiments.md).
inline constexpr std::int32_t kDecodeRows = 32;

// Rows of a prefill tile: 96 = 16 blocks of the 6-row micro-kernel. Q, S, O and a K and V tile of
// head size 128 then take 200 KiB, a fraction of a 1 MiB L2.
inline constexpr std::int32_t kPrefillRows = 96;

// Keys of a prefill tile on tile instructions: loading and storing a row's O then costs a quarter of
// its products.
inline constexpr std::int32_t kTilesKvTile = 128;

// Up to this many rows the work is memory-bound enough that cutting the keys of a sequence, or
// looking for a shared prefix, can pay. Longer queries reuse the keys that they read.
inline constexpr std::int32_t kSplitRows = 64;

// A chunk costs combining its rows once: well under 1 % of attending to this many keys.
inline constexpr std::int32_t kMinChunkKeys = 256;

inline TilePolicy tile_policy(const LayerParams& layer, std::int64_t query_len) {
  const std::int64_t rows = query_len * layer.group;
  TilePolicy policy;
  if (rows <= kDecodeRows) {
    policy.decode = true;
    policy.kv_tile = 32;  // K and V as fp32 at head size 128: 32 KiB, the size of an L1
  } else if (uses_tiles(layer)) {
    policy.kv_tile = kTilesKvTile;
  }
  policy.splittable = rows <= kSplitRows;
  policy.min_kv_tiles_per_chunk = kMinChunkKeys / policy.kv_tile;
  const std::int32_t most_rows = policy.splittable ? kSplitRows : kPrefillRows;
  policy.tokens = std::max(most_rows / layer.group, 1);
  return policy;
}

// Tiles of a shared prefix hold the rows of all sequences that share it. There are few such tiles
// and their keys are many, so they are cut whatever their rows.
inline TilePolicy shared_prefix_policy(const LayerParams& layer) {
  TilePolicy policy;
  if (uses_tiles(layer)) policy.kv_tile = kTilesKvTile;
  policy.splittable = true;
  policy.min_kv_tiles_per_chunk = kMinChunkKeys / policy.kv_tile;
  policy.tokens = std::max(kPrefillRows / layer.group, 1);
  return policy;
}

// Most kv heads that one decode item takes together. All heads of a token lie side by side in the
// NHD cache, so reading them together walks memory in order: one head at a time reached 18 of
// 38 GB/s, all together 31 (docs/experiments.md). Their widened K and V stay within 256 KiB of L2.
inline std::int32_t most_kv_heads(const LayerParams& layer, std::int32_t kv_tile) {
  const std::int64_t floats = std::int64_t{kv_tile} * (layer.head_size + layer.head_size_v);
  const auto fit = static_cast<std::int32_t>(std::max<std::int64_t>(65536 / floats, 1));
  return std::min(fit, layer.num_kv_heads);
}

// Kv heads are taken together only as far as this many items are left for each thread.
inline constexpr std::int32_t kItemsPerThread = 4;

// Costs are relative: 64 multiply-adds are 1.
//
// Of one kv tile for one kv head: reading and widening its elements, plus the multiply-adds of
// every row. Reading takes about as long as the multiply-adds of 8 rows.
inline std::int64_t kv_tile_cost(const LayerParams& layer, std::int64_t rows,
                                 std::int32_t kv_tile) {
  return (layer.head_size + layer.head_size_v) * std::int64_t{kv_tile} * (8 + rows) / 64;
}

// Of one item and kv head, whatever its keys: widening queries, normalising and storing outputs.
inline std::int64_t item_overhead(const LayerParams& layer, std::int64_t rows) {
  return rows * (layer.head_size + layer.head_size_v) / 16 + 16;
}

// Work ranges per thread. With more, threads that the system slows down hand over more of their
// work to others; with fewer, fewer items are cut.
inline constexpr std::int32_t kRangesPerThread = 8;

}  // namespace quire::cpu
