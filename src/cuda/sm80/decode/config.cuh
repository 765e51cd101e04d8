// What an instance of the decode kernel is made of, and its shared memory.
#pragma once

#include <type_traits>

#include "cuda/kernel/combine_splits.cuh"
#include "cuda/kernel/team.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/policy.h"

namespace quire::cuda::sm80 {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeWarps = kDecodeThreads / 32;
using DecodeTeam = CtaTeam<kDecodeThreads>;

template <class Type_, bool kKv8_, int kHeadSize_, int kRows_, bool kScoreMod_>
struct DecodeConfig {
  using Type = Type_;
  static constexpr bool kKv8 = kKv8_;            // K and V are stored in 8 bits
  static constexpr bool kScoreMod = kScoreMod_;  // soft cap, ALiBi, query-query bias
  static constexpr int kHeadSize = kHeadSize_;   // smaller heads are filled up with zeros
  static constexpr int kHeadSizeV = kHeadSize_;
  static constexpr int kRows = kRows_;
  static constexpr int kMTiles = kRows / 16;
  // CTAs of a multiprocessor. More of them hide each other's latencies: with 16 rows of head
  // size 128 three took 109 us where two took 134 (16 sequences of 4k).
  static constexpr int kMinCtas = kRows > 16 || kHeadSize > 128 ? 2 : (kHeadSize == 64 ? 4 : 3);
  static constexpr int kKeys = kKvTile / kDecodeWarps;  // of a warp in a kv tile
  static constexpr int kPitch = kHeadSize * 2;          // bytes of a row that is multiplied
  static constexpr int kStoredPitch = kKv8 ? kHeadSize : kHeadSize * 2;
  static constexpr int kPieces = kStoredPitch / 16;  // 16-byte pieces of a stored row
  static constexpr int kTileBytes = kKeys * kPitch;  // K or V of a warp's keys
  static constexpr int kStageBytes = kKeys * kStoredPitch;
  // Kv tiles in flight in each CTA: some 96 KiB of K and V a multiprocessor.
  static constexpr int kMaxStages =
      (kHeadSize == 64 ? 2 : 1) * (kRows > 16 ? 2 : 1) * (kKv8 ? 2 : 1);
  static constexpr int kQueryBytes = kRows * kPitch;
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  static constexpr int kStates = kDecodeWarps * (kUnmappedApart ? 2 : 1);
  // Rows that are combined together: a thread has eight columns.
  static constexpr int kCombineRows = kHeadSize == 64 ? 8 : kHeadSize == 128 ? 4 : 2;
  static constexpr int kCombinePitch = kHeadSize + 4;  // floats
  static constexpr int kCombineBytes = kDecodeWarps * kCombineRows * kCombinePitch * 4;
};

inline constexpr int kSplitsAhead = 4;

// What a warp's loading side knows, kept out of registers. Lane 0 writes, all lanes read.
struct WarpStream {
  WorkIterator iterator;
  Split splits[kSplitsAhead];  // a ring
  int num_known;               // splits known so far
  bool all_known;
  // The next kv tile to be loaded and the split that it is in; `left`: as many kv tiles follow each
  // other from it on, 0: there is nothing to load (yet).
  int split;
  int kv_tile;
  int left;
  int key;  // the warp's first of the kv tile
  // Of that split. All keys in [full_begin, full_end) may be read.
  int full_begin;
  int full_end;
  LoadableKeys keys;
  const char* base[2];        // K and V: block 0, slot 0 of the split's kv head
  const std::int32_t* table;  // the sequence's block table
  int first_kv_row;           // of direct attention
};

// Partials loaded together when splits are combined: 48 registers' worth, or 24 where four CTAs
// leave a thread 128. With more, the loop over keys spills.
template <class C>
using DecodeCombiner = SplitCombiner<DecodeTeam, C::kRows, C::kMinCtas == 4 ? 6 : 12>;

template <class C>
struct DecodeShared {
  RowTable<C::kRows> rows[2];  // of the split at work and the next
  typename DecodeCombiner<C>::Shared combine;
  // Of each warp's keys; from [kDecodeWarps] on, of those that are unmapped (see
  // set_unmapped_apart).
  float max[C::kStates][C::kRows];
  float sum[C::kStates][C::kRows];
  std::uint32_t unmapped[kDecodeWarps][C::kMaxStages];  // keys whose block does not exist
  WarpStream stream[kDecodeWarps];  // every warp iterates by itself, so that none waits for another
  float scale[C::kKv8 ? kDecodeWarps : 1][C::kMaxStages][2][C::kKeys];  // of tokens
};

template <class C>
constexpr int decode_fixed_bytes() {
  return (static_cast<int>(sizeof(DecodeShared<C>)) + 127) / 128 * 128;
}

template <class C>
constexpr int decode_shared_bytes(int stages) {
  return decode_fixed_bytes<C>() + 2 * C::kQueryBytes + C::kCombineBytes +
         kDecodeWarps * (stages * 2 * C::kStageBytes + (C::kKv8 ? C::kTileBytes : 0));
}

}  // namespace quire::cuda::sm80
