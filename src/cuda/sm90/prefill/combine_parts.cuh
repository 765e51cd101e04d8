// Items that were cut between CTAs: when a CTA has done all its work, its consumers combine those
// of which it is the last to leave a partial.
//
// kernel/combine_splits.cuh does the same for any output, but with calls and local memory: wherever
// they are in a kernel, ptxas sets registers aside for them, and the loop over keys spills. The
// outputs here are of 16 bits, in whole pieces.
#pragma once

#include "cuda/kernel/partial.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/sm90/prefill/rows.cuh"

namespace quire::cuda::sm90 {

// Eight columns of a row.
struct PartialPiece {
  Combine combine;
  float4 low = make_float4(0, 0, 0, 0);
  float4 high = make_float4(0, 0, 0, 0);

  __device__ __forceinline__ void add(const PartialRows& from, int r, int c) {
    const auto* o = reinterpret_cast<const float4*>(from.o + r * from.pitch + c);
    const float4 added_low = __ldcg(o);
    const float4 added_high = __ldcg(o + 1);
    combine.add(__ldcg(from.max + r), __ldcg(from.sum + r));
    low = combine.value(low, added_low);
    high = combine.value(high, added_high);
  }

  // As a shared prefix's, for the tiles behind it; and with the prefix's, which comes before.
  __device__ __forceinline__ void store(const PrefixRow& to, int c) const {
    auto* o = reinterpret_cast<float4*>(to.o + c);
    o[0] = low;
    o[1] = high;
    if (c == 0) {
      *to.max = combine.max;
      *to.sum = combine.sum;
    }
  }
  __device__ __forceinline__ void combine_prefix(const PrefixRow& from, int c) {
    const auto* o = reinterpret_cast<const float4*>(from.o + c);
    Combine both{*from.max, *from.sum};
    both.add(combine.max, combine.sum);
    low = both.value(o[0], low);
    high = both.value(o[1], high);
    combine = both;
  }
};

// The partials of an item in the order of its keys, normalised, to the output.
template <class C>
__device__ __forceinline__ void combine_item(const KernelParams& p, const PrefillTask& task) {
  constexpr int kPieces = C::kHeadSize / 8;
  // One after the other, the latency of loads would add up; with more the loop over keys spills.
  constexpr int kAhead = C::kWide ? 2 : 1;
  const WorkTile& tile = task.split.tile;
  const ItemCtas& ctas = task.item_ctas;
  const int count = tile.rows * kPieces;
#pragma unroll 1
  for (int base = static_cast<int>(threadIdx.x); base < count;
       base += kAhead * C::kConsumerThreads) {
    PartialPiece pieces[kAhead];
#pragma unroll 1
    for (std::int32_t cta = ctas.first; cta <= ctas.last; ++cta) {
      const bool first = cta == ctas.first;
      if (!first && __ldcg(&p.schedule.work_ranges[cta].num_partials) == 0) continue;
      const PartialRows from = partial_rows<C::kRows>(p.schedule, cta, first ? 0 : 1);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = min(base + u * C::kConsumerThreads, count - 1);
        pieces[u].add(from, i / kPieces, i % kPieces * 8);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = base + u * C::kConsumerThreads;
      if (i >= count) break;
      const int r = i / kPieces;
      const int c = i % kPieces * 8;
      if (tile.prefix_row >= 0) {
        const PrefixRow prefix(p, task.split, r);
        if (p.schedule.shared_rows != nullptr) {
          pieces[u].store(prefix, c);
          continue;
        }
        pieces[u].combine_prefix(prefix, c);
      }
      const float scale =
          normalise_row(p, task.split, r, pieces[u].combine.max, pieces[u].combine.sum, c == 0);
      const RowPlace place = row_place(p, tile, task.split.head, r);
      auto* to = static_cast<std::uint16_t*>(p.output) + place.token * p.output_token_stride +
                 place.head * p.output_head_stride + c;
      const float4& x = pieces[u].low;
      const float4& y = pieces[u].high;
      *reinterpret_cast<uint4*>(to) = make_uint4(
          C::Type::pack(x.x * scale, x.y * scale), C::Type::pack(x.z * scale, x.w * scale),
          C::Type::pack(y.x * scale, y.y * scale), C::Type::pack(y.z * scale, y.w * scale));
    }
  }
}

// All consumers.
template <class C>
__device__ __forceinline__ void combine_parts(const KernelParams& p, PrefillShared<C>& shared) {
  const auto sync = [] { ptx::sync_threads(kAllConsumersBarrier, C::kConsumerThreads); };
  sync();  // all have stored their rows
#pragma unroll 1
  for (int i = 1; i >= 0; --i) {  // in the order of the range: what was found begun comes first
    const PrefillTask& task = shared.part[i];
    if (!task.exists) continue;
    if (threadIdx.x == 0) {
      std::int32_t* counter = p.schedule.arrivals + task.item_ctas.first;
      shared.is_last = ptx::count_arrival(counter) == task.item_ctas.count - 1;
      if (shared.is_last) *counter = 0;
    }
    sync();
    if (shared.is_last) combine_item<C>(p, task);
    sync();
  }
}

}  // namespace quire::cuda::sm90
