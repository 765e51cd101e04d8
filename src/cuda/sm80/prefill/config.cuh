// What an instance of the prefill kernel is made of, and its shared memory.
#pragma once

#include <type_traits>

#include "cuda/kernel/combine_splits.cuh"
#include "cuda/kernel/team.cuh"
#include "cuda/kernel/work_queue.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/policy.h"

namespace quire::cuda::sm80 {

// Head sizes above 256 take the bucket 576: V in passes of 256 columns, half the keys a tile.
template <class Type_, bool kKv8_, int kHeadSize_, bool kScoreMod_>
struct PrefillConfig {
  using Type = Type_;
  static constexpr bool kKv8 = kKv8_;            // K and V are stored in 8 bits
  static constexpr bool kScoreMod = kScoreMod_;  // soft cap, ALiBi, query-query bias
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  static constexpr int kHeadSizeK = kHeadSize_;
  static constexpr int kHeadSizeV = kHeadSize_ > 256 ? 256 : kHeadSize_;
  // 32 rows a warp where O leaves registers for it: each K and V fragment read from shared memory
  // then feeds two products. Else twice the warps, since two warps a scheduler hide latencies here.
  static constexpr int kMTiles = kHeadSize_ <= 128 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kThreads = kHeadSize_ == 256 ? 256 : 128;
  static constexpr int kMinCtas = kHeadSize_ == 64 ? 3 : (kHeadSize_ == 128 ? 2 : 1);
  static constexpr int kRows = 16 * kMTiles * (kThreads / 32);
  static constexpr int kKeys = kHeadSize_ > 256 ? 32 : 64;
  // Keys whose scores are in registers at a time. With 64 there would be none left for operands
  // that are loaded ahead.
  static constexpr int kStepKeys = 32;
  static constexpr int kStrips = kKeys / 16;      // of 16 keys
  static constexpr int kPitchK = kHeadSizeK * 2;  // bytes of a row in shared memory
  static constexpr int kPitchV = kHeadSizeV * 2;
  static constexpr int kMaxStages = 3;
  static constexpr int kQueryBytes = kRows * kPitchK;
  static constexpr int kTileK = kKeys * kPitchK;
  static constexpr int kTileV = kKeys * kPitchV;
  static constexpr int kStageK = kKv8 ? kTileK / 2 : kTileK;
  static constexpr int kStageV = kKv8 ? kTileV / 2 : kTileV;
  static constexpr int kPiecesK = kStageK / kKeys / 16;  // 16-byte pieces of a stored row
  static constexpr int kPiecesV = kStageV / kKeys / 16;
  // Kv tiles whose addresses are looked up together, by one warp, and the ring that they lie in.
  static constexpr int kBatch = 8;
  static constexpr int kRing = 2 * kBatch;
};

// How a tile's K (side 0) or V (side 1) is copied: 16 bytes a thread and step.
template <class C, int kSide>
struct PrefillSide {
  static constexpr int kPieces = kSide == 0 ? C::kPiecesK : C::kPiecesV;
  static constexpr int kPitch = kSide == 0 ? C::kPitchK : C::kPitchV;
  static constexpr int kStage = kSide == 0 ? C::kStageK : C::kStageV;
  static constexpr int kCount = C::kKeys * kPieces;
  static constexpr int kSteps = (kCount + C::kThreads - 1) / C::kThreads;
  // Rows between two pieces of a thread, if they all have the same column.
  static constexpr int kRowStep = C::kThreads % kPieces == 0 ? C::kThreads / kPieces : 0;
  // Pieces keep their place within a row from step to step.
  static constexpr bool kRegular = kRowStep > 0 && kCount % C::kThreads == 0 &&
                                   (C::kKv8 || kRowStep % 8 == 0);
};

enum class Copy : std::uint8_t {
  kWhole,    // every row is there, in strips of 16
  kPartial,  // some rows read as zeros
  kRows      // anything: row by row
};

// Where the keys of a kv tile are. A strip is 16 keys in one block: its rows follow each other.
template <class C>
struct alignas(16) KvTile {
  const char* strip[2][C::kStrips];  // K and V: address of each strip's first row
  std::uint64_t present;             // a bit a key; unmapped ones read as zeros
  std::uint64_t unmapped;  // visible or not, their block does not exist (see unmapped.cuh)
  std::int32_t first;      // key
  std::int32_t count;      // of keys from the first on that some row may see
  bool masked;             // some row does not see some key
  bool whole;              // both sides are kWhole
  Copy how[2];
  std::int32_t block[C::kKv8 ? C::kStrips : 1];  // for the scales of tokens
  std::int32_t slot[C::kKv8 ? C::kStrips : 1];
};

// A split as copies see it.
struct PrefillTask {
  Split split;
  int count;  // key tiles
  int kv_head;
  int first_column;  // of V, in this pass
  int columns;
  LoadableKeys keys;
  const char* base[2];  // K and V of the head and columns
  bool exists;
};

template <class C>
using PrefillTeam = CtaTeam<C::kThreads>;
template <class C>
using PrefillEpilogue = Epilogue<PrefillTeam<C>, C::kRows>;
template <class C>
using PrefillCombiner = SplitCombiner<PrefillTeam<C>, C::kRows>;

template <class C>
struct PrefillShared {
  RowTable<C::kRows> rows;
  typename PrefillCombiner<C>::Shared combine;
  // Of the present split and the next one, in turn.
  PrefillTask task[2];
  KvTile<C> ring[2][C::kRing];
  float scale[C::kKv8 ? C::kMaxStages : 1][2][C::kKeys];  // of tokens
  float unmapped_max[C::kUnmappedApart ? C::kRows : 1];   // see unmapped.cuh
  float unmapped_sum[C::kUnmappedApart ? C::kRows : 1];
  WorkQueue queue;
};

template <class C>
constexpr int prefill_shared_bytes(int stages) {
  const int fixed = (static_cast<int>(sizeof(PrefillShared<C>)) + 127) / 128 * 128;
  return fixed + C::kQueryBytes + stages * (C::kStageK + C::kStageV) +
         (C::kKv8 ? C::kTileK + C::kTileV : 0);
}

}  // namespace quire::cuda::sm80
