// Decode items that were cut between work ranges: the team that leaves the last partial of one
// combines them. As ../prefill/combine_parts.cuh, and for the same reasons.
#pragma once

#include "cuda/sm90/decode/config.cuh"
#include "cuda/sm90/prefill/combine_parts.cuh"

namespace quire::cuda::sm90 {

// The multiplying warpgroup, after it has stored a partial.
template <class C>
__device__ __forceinline__ void combine_ranges(const KernelParams& p,
                                               const PublishedSplit& published, int& is_last) {
  using Team = typename C::Team;
  const ItemCtas& ctas = published.item_ctas;
  Team::sync();
  if (Team::thread() == 0) {
    std::int32_t* counter = p.schedule.arrivals + ctas.first;
    const bool last = ptx::count_arrival(counter) == ctas.count - 1;
    if (last) *counter = 0;
    is_last = last ? 1 : 0;
  }
  Team::sync();
  if (is_last != 0) {
    constexpr int kPieces = C::kHeadSize / 8;
    const Split& split = published.split;
#pragma unroll 1
    for (int i = Team::thread(); i < split.tile.rows * kPieces; i += Team::kSize) {
      const int r = i / kPieces;
      const int c = i % kPieces * 8;
      PartialPiece piece;
#pragma unroll 1
      for (std::int32_t cta = ctas.first; cta <= ctas.last; ++cta) {
        const bool first = cta == ctas.first;
        if (!first && __ldcg(&p.schedule.work_ranges[cta].num_partials) == 0) continue;
        piece.add(partial_rows<C::kRows>(p.schedule, cta, first ? 0 : 1), r, c);
      }
      const float scale = normalise_row(p, split, r, piece.combine.max, piece.combine.sum, c == 0);
      const RowPlace place = row_place(p, split.tile, split.head, r);
      auto* to = static_cast<std::uint16_t*>(p.output) + place.token * p.output_token_stride +
                 place.head * p.output_head_stride + c;
      const float4& x = piece.low;
      const float4& y = piece.high;
      *reinterpret_cast<uint4*>(to) = make_uint4(
          C::Type::pack(x.x * scale, x.y * scale), C::Type::pack(x.z * scale, x.w * scale),
          C::Type::pack(y.x * scale, y.y * scale), C::Type::pack(y.z * scale, y.w * scale));
    }
  }
  Team::sync();  // is_last is no longer read
}

}  // namespace quire::cuda::sm90
