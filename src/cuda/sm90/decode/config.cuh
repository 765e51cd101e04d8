// What an instance of the decode kernel is made of, and its shared memory.
#pragma once

#include "cuda/kernel/combine_splits.cuh"
#include "cuda/kernel/team.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/sm90/decode/policy.h"

namespace quire::cuda::sm90 {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupWarps = 4;

// The first threads of a CTA, with a named barrier.
template <int kThreads, int kBarrier>
struct FirstThreads {
  static constexpr int kSize = kThreads;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ void sync() { ptx::sync_threads(kBarrier, kThreads); }
};

// The warpgroup that multiplies.
inline constexpr int kMultiplierBarrier = 1;
using Multipliers = FirstThreads<kWarpgroupThreads, kMultiplierBarrier>;

template <class Type_, bool kKv8_, int kHeadSize_, int kRows_>
struct DecodeConfig {
  using Type = Type_;                           // of the products
  static constexpr bool kKv8 = kKv8_;           // K and V of 8 bits
  static constexpr int kHeadSize = kHeadSize_;  // of K and V
  static constexpr int kRows = kRows_;
  // CTAs of a multiprocessor: while an item ends in one, the other's loads go on.
  static constexpr int kCtas = decode_ctas(kHeadSize, kRows, kKv8);
  static constexpr int kColumns = kHeadSize / 64;                  // of 64 elements
  static constexpr int kGroupBytes = kHeadSize * (kKv8 ? 8 : 16);  // eight keys of K or V
  static constexpr int kTileBytes = kKvTile / 8 * kGroupBytes;
  static constexpr int kQueryBytes = kRows * kHeadSize * 2;
  static constexpr int kWeightBytes = kRows / 8 * 1024;  // of a kv tile
  static constexpr int kOutputPitch = kHeadSize + 4;     // floats
  // Where the products' registers do not fit an equal share.
  static constexpr bool kMovesRegisters =
      (kKv8 && kCtas == 2) || kRows >= 32 ||
      (kRows == 24 && kHeadSize == 128 && std::is_same_v<Type, ptx::Half>);
  static constexpr int kMultiplierRegisters = kKv8 ? 184 : 176;
  static constexpr int kLoaderRegisters = kKv8 ? 72 : 80;
  // A warpgroup that multiplies, three warps that load; registers move between whole warpgroups.
  static constexpr int kThreads = kWarpgroupThreads + (kMovesRegisters ? 128 : 96);
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  // Weights are up to 2^(8 + this), see DecodeAttention: as large as they may be in fp16, since
  // small ones lose bits below 2^-14.
  static constexpr int kWeightLog2 = kKv8 ? 7 : 0;
  // Keys of a kv tile that may have scales of their own.
  static constexpr int kScaledKeys = kKv8 ? kKvTile : 1;
};

template <class C>
using DecodeEpilogue = Epilogue<Multipliers, C::kRows>;
template <class C>
using DecodeCombiner =  // as many partials ahead as registers allow
    SplitCombiner<Multipliers, C::kRows, (C::kCtas > 2) ? 4 : 8>;

// A split, and the CTAs that work on its item. head -1: there is none, the work is done.
struct PublishedSplit {
  Split split;
  ItemCtas item_ctas;
};

// Parity barriers of a ring of buffers, as shared addresses are made of them.
template <int kSize>
struct RingBarriers {
  std::uint64_t full[kSize];
  std::uint64_t empty[kSize];
};

template <int kRows>
struct DecodeRows : RowTable<kRows> {
  alignas(16) float score_factors[kRows];  // 8-bit caches: scores are multiplied by it (bytes.cuh)
};

// All but the rings of K and V.
template <class C>
struct DecodeTables {
  alignas(1024) char query[kRowsAhead][C::kQueryBytes];
  alignas(1024) char weights[2][C::kWeightBytes];  // P^T
  // At an item's end: O, and each warp's sums, of its keys.
  alignas(16) float o[C::kRows][C::kOutputPitch];
  float max[C::kRows];
  float sum[kWarpgroupWarps][C::kRows];
  // Counted apart, see DecodeAttention::set_unmapped_apart().
  float num_unmapped[kWarpgroupWarps][C::kRows];
  // 8-bit caches: log2 of what O is relative to besides its row's reference (byte_tile.cuh), the
  // same for each warp.
  float value_log2[kWarpgroupWarps][C::kRows];
  DecodeRows<C::kRows> rows[kRowsAhead];
  PublishedSplit splits[kSplitsAhead];
  typename DecodeCombiner<C>::Shared combine;
  RingBarriers<kSplitsAhead> split_barriers;
  RingBarriers<kRowsAhead> row_barriers;
};

// A CTA's part of a multiprocessor's shared memory, of which it costs 1 KiB more.
template <class C>
inline constexpr int kDecodeSharedBytes = 228 * 1024 / C::kCtas - 1024;

// Kv tiles in flight or at work: as many as there is room for, with a KiB for their barriers and
// unmapped boxes.
template <class C>
constexpr int decode_stages() {
  const auto others = static_cast<int>(sizeof(DecodeTables<C>)) + 1024;
  return (kDecodeSharedBytes<C> - others) / (2 * (C::kTileBytes + C::kScaledKeys * 4));
}

template <class C>
struct DecodeShared : DecodeTables<C> {
  static constexpr int kStages = decode_stages<C>();
  alignas(1024) char tiles[2][kStages][C::kTileBytes];  // K, V
  RingBarriers<kStages> tile_barriers[2];
  float token_scales[2][kStages][C::kScaledKeys];
  // Bit b: box b of the tile is of a block that does not exist, but has keys that may be read.
  std::uint32_t unmapped[kStages];
};

}  // namespace quire::cuda::sm90
