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

// The first threads of a CTA, with a named barrier. kReadsIndex: a thread's index is read anew each
// time, for kernels that would spill it if it were kept.
template <int kThreads, int kBarrier, bool kReadsIndex>
struct FirstThreads {
  static constexpr int kSize = kThreads;
  static __device__ __forceinline__ int thread() {
    auto thread = static_cast<int>(threadIdx.x);
    if (kReadsIndex) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int lane() { return thread() % 32; }
  static __device__ __forceinline__ void sync() { ptx::sync_threads(kBarrier, kThreads); }
  // Waits like sync(); whether any of the threads came with `value`.
  static __device__ __forceinline__ bool any(bool value) {
    return ptx::any_of_threads(kBarrier, kThreads, value);
  }
};

// The warpgroup that multiplies.
inline constexpr int kMultiplierBarrier = 1;
template <bool kReadsIndex>
using Multipliers = FirstThreads<kWarpgroupThreads, kMultiplierBarrier, kReadsIndex>;

template <class Type_, bool kKv8_, int kHeadSize_, int kRows_, bool kSoftCap_>
struct DecodeConfig {
  using Type = Type_;  // of the products
  using Team = Multipliers<std::is_same_v<Type_, ptx::Half> &&
                           (kKv8_ ? kRows_ == 40 : kHeadSize_ == 64 && kRows_ == 8)>;
  static constexpr int kSplitsAhead = 4;        // that are published
  static constexpr bool kInTeams = false;       // see ../mixed/config.cuh
  static constexpr bool kKv8 = kKv8_;           // K and V of 8 bits
  static constexpr int kHeadSize = kHeadSize_;  // of K and V
  static constexpr int kRows = kRows_;
  static constexpr bool kSoftCap = kSoftCap_;
  // CTAs of a multiprocessor: while an item ends in one, the other's loads go on.
  static constexpr int kCtas = decode_ctas(kHeadSize, kRows, kKv8);
  static constexpr int kColumns = kHeadSize / 64;                  // of 64 elements
  static constexpr int kGroupBytes = kHeadSize * (kKv8 ? 8 : 16);  // eight keys of K or V
  static constexpr int kTileBytes = kKvTile / 8 * kGroupBytes;
  static constexpr int kQueryBytes = kRows * kHeadSize * 2;
  // Splits whose queries and row tables are ready or in use. At head size 256 a second query would
  // cost the ring its third tile.
  static constexpr int kRowsAhead = kHeadSize > 128 ? 1 : 2;
  static constexpr int kWeightBytes = kRows / 8 * 1024;  // of a kv tile
  static constexpr int kOutputPitch = kHeadSize + 4;     // floats
  // Where the products' registers do not fit an equal share.
  static constexpr bool kMovesRegisters =
      (kKv8 && kCtas == 2) || kRows >= 24 || kRows * kHeadSize >= 4096;
  static constexpr int kMultiplierRegisters = kKv8 && kRows == 32 ? 192 : 184;
  static constexpr int kLoaderRegisters = 256 - kMultiplierRegisters;
  // A warpgroup that multiplies, three warps that load; registers move between whole warpgroups.
  static constexpr int kThreads = kWarpgroupThreads + (kMovesRegisters ? 128 : 96);
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  // Who gives a tile back: a lane of each warp, or, where threads read DecodeShared::unmapped
  // themselves, each of them.
  static constexpr int kTileArrivals = kUnmappedApart ? kWarpgroupThreads : kWarpgroupWarps;
  // Weights are up to 2^(8 + this), see DecodeAttention: as large as they may be in fp16, since
  // small ones lose bits below 2^-14.
  static constexpr int kWeightLog2 = kKv8 ? 7 : 0;
  // Keys of a kv tile that may have scales of their own.
  static constexpr int kScaledKeys = kKv8 ? kKvTile : 1;
};

template <class C>
using DecodeEpilogue = Epilogue<typename C::Team, C::kRows>;
template <class C>
using DecodeCombiner =  // as many partials ahead as registers allow
    SplitCombiner<typename C::Team, C::kRows, (C::kCtas > 2) ? 4 : 8>;

// A split, and the CTAs that work on its item. head -1: there is none, the work is done.
struct PublishedSplit {
  Split split;
  ItemCtas item_ctas;
  std::int32_t cta;  // DecodeConfig::kInTeams: whose work range it is of
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
  alignas(1024) char query[C::kRowsAhead][C::kQueryBytes];
  alignas(1024) char weights[2][C::kWeightBytes];  // P^T
  // At an item's end: O, and each warp's sums, of its keys.
  union {
    alignas(16) float o[C::kRows][C::kOutputPitch];
    typename DecodeCombiner<C>::Shared combine;  // when `o` has been read
  };
  float max[C::kRows];
  float sum[kWarpgroupWarps][C::kRows];
  // Counted apart, see DecodeAttention::set_unmapped_apart().
  float num_unmapped[kWarpgroupWarps][C::kRows];
  // 8-bit caches: log2 of what O is relative to besides its row's reference (byte_tile.cuh), the
  // same for each warp.
  float value_log2[kWarpgroupWarps][C::kRows];
  DecodeRows<C::kRows> rows[C::kRowsAhead];
  PublishedSplit splits[C::kSplitsAhead];
  std::int32_t cta_step;  // ScheduleHeader's
  // The item whose last kv tiles this CTA has had, see fold.cuh.
  PublishedSplit held;
  RowTable<C::kRows> held_rows;
  RingBarriers<C::kSplitsAhead> split_barriers;
  RingBarriers<C::kRowsAhead> row_barriers;
};

// A CTA's part of a multiprocessor's shared memory, of which it costs 1 KiB more.
template <class C>
inline constexpr int kDecodeSharedBytes = 228 * 1024 / C::kCtas - 1024;

// Tiles of K and V in flight or at work: as many as there is room for, with a KiB for their
// barriers and unmapped boxes.
template <class C>
constexpr int decode_tiles() {
  const auto others = static_cast<int>(sizeof(DecodeTables<C>)) + 1024;
  const int room = (kDecodeSharedBytes<C> - others) / (C::kTileBytes + C::kScaledKeys * 4);
  // Tiles of up to 16 KiB in pairs: one more was slower (40 rows of 128: 142 -> 146 us).
  return C::kHeadSize <= 128 ? room / 2 * 2 : room;
}

template <class C>
struct DecodeShared : DecodeTables<C> {
  static constexpr int kTiles = decode_tiles<C>();
  static_assert(!C::kKv8 || kTiles % 2 == 0);  // a buffer is K's or V's there, see init_barriers()
  alignas(1024) char tiles[kTiles][C::kTileBytes];  // K and V of a kv tile in turn
  RingBarriers<kTiles> tile_barriers;
  float token_scales[kTiles][C::kScaledKeys];
  // Of a tile of K, bit b: box b is of a block that does not exist, but has keys that may be read.
  std::uint32_t unmapped[kTiles];
};

}  // namespace quire::cuda::sm90
