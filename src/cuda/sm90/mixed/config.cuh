// What an instance of the mixed kernel is made of: an instance of the prefill kernel, and of the
// decode kernel two CTAs, which are teams here.
#pragma once

#include "cuda/sm90/decode/config.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace quire::cuda::sm90 {

inline constexpr int kDecodeTeams = 2;  // of a CTA
inline constexpr int kTeamBarrier = 8;  // and the next one; the prefill kernel's are below

// Of a team, the warpgroup that multiplies: team t's is warpgroup t, and warpgroup 2 + t loads.
struct TeamMultipliers {
  static constexpr int kSize = kWarpgroupThreads;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x % 128); }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int barrier() {
    return kTeamBarrier + static_cast<int>(threadIdx.x / 128);
  }
  static __device__ __forceinline__ void sync() { ptx::sync_threads(barrier(), kSize); }
  static __device__ __forceinline__ bool any(bool value) {
    return ptx::any_of_threads(barrier(), kSize, value);
  }
};

// The splits of all teams of the grid, which take them one by one: items that are not cut, in their
// order, then work ranges.
class SplitsOfAll {
 public:
  __device__ explicit SplitsOfAll(const ScheduleView& schedule) {
    const ScheduleHeader& header = *schedule.header;
    items_ = header.whole_tiles * schedule.heads;
    cta_step_ = header.cta_step;
    units_ = items_ + (header.whole_tiles < header.num_tiles ? header.num_ctas : 0);
  }

  __device__ bool next(const ScheduleView& schedule, PublishedSplit* to) {
    while (true) {
      if (in_range_) {
        if (range_.next(schedule, &to->split)) {
          to->item_ctas = range_.item_ctas(to->split);
          to->cta = cta_;
          return true;
        }
        in_range_ = false;
      }
      // Each team asks once when none is left; the last of them puts the counter back to 0.
      const std::int32_t unit = atomicAdd(schedule.taken, 1);
      const auto teams = static_cast<std::int32_t>(gridDim.x) * kDecodeTeams;
      if (unit == units_ + teams - 1) *schedule.taken = 0;
      if (unit >= units_) return false;
      if (unit < items_) {
        take_whole(schedule, unit, &to->split);
        return true;
      }
      cta_ = (unit - items_) * cta_step_;
      range_ = WorkIterator(schedule, cta_);
      in_range_ = true;
    }
  }

 private:
  __device__ void take_whole(const ScheduleView& schedule, std::int32_t item, Split* split) const {
    const std::int32_t tile = item / schedule.heads;
    split->head = item - tile * schedule.heads;
    split->tile = schedule.tiles[tile];
    split->kv_tile_begin = 0;
    split->kv_tile_end = split->tile.num_kv_tiles();
  }

  WorkIterator range_;
  std::int32_t cta_;
  bool in_range_ = false;
  std::int32_t items_;
  std::int32_t units_;  // items and ranges
  std::int32_t cta_step_;
};

template <class Type, int kHeadSize, int kRows>
struct TeamConfig : DecodeConfig<Type, false, kHeadSize, kRows, false> {
  using Team = TeamMultipliers;
  using Splits = SplitsOfAll;
  // What a team has taken it cannot give back: one ahead of the one at work.
  static constexpr int kSplitsAhead = 2;
  static constexpr int kCtas = kDecodeTeams;
  // Splits are taken, results are plain rows, and there are no calls and no local memory: wherever
  // they are in a kernel, ptxas sets registers aside for them, and the prefill loop spills.
  static constexpr bool kInTeams = true;
};

template <class Prefill_, class Decode_>
struct MixedConfig {
  using Prefill = Prefill_;
  using Decode = Decode_;
  static constexpr int kThreads = Prefill::kThreads;
  static constexpr int kRegisters =
      65536 / kThreads / 8 * 8;  // of a thread, where all have as many
  static_assert(kThreads == 2 * kDecodeTeams * kWarpgroupThreads);
  static_assert(!Decode::kMovesRegisters);
};

}  // namespace quire::cuda::sm90
