// What an instance of the tensor-core kernel is made of, and its shared memory.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/finish.cuh"
#include "cuda/tile/ptx.cuh"

namespace quire::cuda::sm80 {

inline constexpr int kMmaThreads = 128;
inline constexpr int kWide = 576;  // head sizes above 256: V in passes of 256 columns

template <class Type_, bool kBytes_, int kHead_, bool kFew_, bool kGeneral_>
struct MmaConfig {
  using Type = Type_;
  static constexpr bool kBytes = kBytes_;  // K and V are stored in 8 bits
  static constexpr bool kFew = kFew_;
  static constexpr bool kGeneral = kGeneral_;  // soft cap, ALiBi, query-query bias
  static constexpr int kHeadK = kHead_;
  static constexpr int kHeadV = kHead_ > 256 ? 256 : kHead_;
  static constexpr int kMTiles = kHead_ <= 128 ? 2 : 1;   // 16-row tiles of a warp
  static constexpr int kMinCtas = kHead_ <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int kWarpRows = kFew ? 1 : 4;
  static constexpr int kWarpKeys = kFew ? 4 : 1;
  static constexpr int kRows = 16 * kMTiles * kWarpRows;
  static constexpr int kKeys = kHead_ > 256 ? 32 : 64;
  static constexpr int kKeysPerWarp = kKeys / kWarpKeys;
  static constexpr int kPitchK = kHeadK * 2;  // bytes of a row in shared memory
  static constexpr int kPitchV = kHeadV * 2;
  static constexpr int kResultPitch = kHeadV + 4;  // floats
  static constexpr int kRing = 4;                  // tiles whose row offsets are known
  static constexpr int kMaxStages = kRing - 1;
  static constexpr int kQueryBytes = kRows * kPitchK;
  static constexpr int kTileK = kKeys * kPitchK;
  static constexpr int kTileV = kKeys * kPitchV;
  static constexpr int kStageK = kBytes ? kTileK / 2 : kTileK;
  static constexpr int kStageV = kBytes ? kTileV / 2 : kTileV;
  static constexpr int kPiecesK = kStageK / kKeys / 16;  // 16-byte pieces of a stored row
  static constexpr int kPiecesV = kStageV / kKeys / 16;
};

template <class C>
struct MmaShared {
  RowTable<C::kRows> rows;
  typename Finisher<C::kRows, kMmaThreads>::Shared finish;
  // Of each key's row, in bytes from side_base; -1: absent. `complete`: by warp, whether none is.
  std::int64_t offset[C::kRing][2][C::kKeys];
  int4 complete[C::kRing];
  const char* side_base[2];                            // K and V of the segment's head and columns
  float scale[C::kBytes ? C::kRing : 1][2][C::kKeys];  // of tokens
  float warp_max[C::kWarpKeys][16];
  float warp_sum[C::kWarpKeys][16];
  float max[C::kRows];
  float sum[C::kRows];
  // One for all threads, here rather than in everybody's registers. Thread 0 walks.
  Walker walker;
  Segment segment;
  int kv_head;  // of the segment, and its columns of V
  int first_column;
  int columns;
  bool has_work;
};

template <class C>
constexpr int mma_shared_bytes(int stages) {
  const int fixed = (static_cast<int>(sizeof(MmaShared<C>)) + 127) / 128 * 128;
  const int loop =
      C::kQueryBytes + stages * (C::kStageK + C::kStageV) + (C::kBytes ? C::kTileK + C::kTileV : 0);
  const int merged_rows = C::kRows + (C::kFew ? 16 * C::kWarpKeys : 0);
  const int end = merged_rows * C::kResultPitch * static_cast<int>(sizeof(float));
  return fixed + (loop > end ? loop : end);
}

}  // namespace quire::cuda::sm80
