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

template <class Type_, bool kBytes_, int kHead_, int kRows_, bool kGeneral_>
struct DecodeConfig {
  using Type = Type_;
  static constexpr bool kBytes = kBytes_;      // K and V are stored in 8 bits
  static constexpr bool kGeneral = kGeneral_;  // soft cap, ALiBi, query-query bias
  static constexpr int kHead = kHead_;         // smaller heads are filled up with zeros
  static constexpr int kHeadV = kHead_;
  static constexpr int kRows = kRows_;
  static constexpr int kMTiles = kRows / 16;
  // CTAs of a multiprocessor. More of them cover for each other's latencies: with 16 rows of head
  // size 128 three took 109 us where two took 134 (16 sequences of 4k).
  static constexpr int kMinCtas = kRows > 16 || kHead > 128 ? 2 : (kHead == 64 ? 4 : 3);
  static constexpr int kKeys = kKvTile / kDecodeWarps;  // of a warp in a unit
  static constexpr int kPitch = kHead * 2;              // bytes of a row that is multiplied
  static constexpr int kStoredPitch = kBytes ? kHead : kHead * 2;
  static constexpr int kPieces = kStoredPitch / 16;  // 16-byte pieces of a stored row
  static constexpr int kTileBytes = kKeys * kPitch;  // K or V of a warp's keys
  static constexpr int kSlotBytes = kKeys * kStoredPitch;
  // Units under way in each CTA: some 96 KiB of K and V a multiprocessor.
  static constexpr int kMaxStages = (kHead == 64 ? 2 : 1) * (kRows > 16 ? 2 : 1) * (kBytes ? 2 : 1);
  static constexpr int kQueryBytes = kRows * kPitch;
  static constexpr bool kAbsentApart = std::is_same_v<Type, ptx::Half>;
  static constexpr int kStates = kDecodeWarps * (kAbsentApart ? 2 : 1);
  // Rows that are merged in one go: a thread has eight columns.
  static constexpr int kMergeRows = kHead == 64 ? 8 : kHead == 128 ? 4 : 2;
  static constexpr int kMergePitch = kHead + 4;  // floats
  static constexpr int kMergeBytes = kDecodeWarps * kMergeRows * kMergePitch * 4;
};

inline constexpr int kSegmentsAhead = 4;

// What a warp's loading side knows, kept out of registers. Lane 0 writes, all lanes read.
struct WarpStream {
  Walker walker;
  Segment segments[kSegmentsAhead];  // a ring
  int num_walked;                    // segments known so far
  bool walk_ended;
  // The next unit to be loaded and the segment that it is in; `left`: as many units follow each
  // other from it on, 0: there is nothing to load (yet).
  int segment;
  int unit;
  int left;
  int key;  // the warp's first of the unit
  // Of that segment. All keys in [full_begin, full_end) may be read.
  int full_begin;
  int full_end;
  LoadableKeys keys;
  const char* base[2];        // K and V: block 0, slot 0 of the segment's kv head
  const std::int32_t* table;  // the sequence's block table
  int first_kv_row;           // of direct attention
};

// Parts ahead: 48 registers' worth, or 24 where four CTAs leave a thread 128. With more, the loop over
// keys spills.
template <class C>
using DecodeCombiner = SplitCombiner<DecodeTeam, C::kRows, C::kMinCtas == 4 ? 6 : 12>;

template <class C>
struct DecodeShared {
  RowTable<C::kRows> rows[2];  // of the segment at work and the next
  typename DecodeCombiner<C>::Shared combine;
  // Of each warp's keys; from [kDecodeWarps] on, of those that are absent (see set_absent_apart).
  float max[C::kStates][C::kRows];
  float sum[C::kStates][C::kRows];
  std::uint32_t absent[kDecodeWarps][C::kMaxStages];  // keys of a unit whose block does not exist
  WarpStream stream[kDecodeWarps];  // every warp walks by itself, so that none waits for another
  float scale[C::kBytes ? kDecodeWarps : 1][C::kMaxStages][2][C::kKeys];  // of tokens
};

template <class C>
constexpr int decode_fixed_bytes() {
  return (static_cast<int>(sizeof(DecodeShared<C>)) + 127) / 128 * 128;
}

template <class C>
constexpr int decode_shared_bytes(int stages) {
  return decode_fixed_bytes<C>() + 2 * C::kQueryBytes + C::kMergeBytes +
         kDecodeWarps * (stages * 2 * C::kSlotBytes + (C::kBytes ? C::kTileBytes : 0));
}

}  // namespace quire::cuda::sm80
