// The CPU attention kernels of one ISA.
//
//   per item (work tile x kv heads), per kv tile:
//     find the rows of its keys through the block table (kv_tile-inl.h) ->
//     S = Q K^T -> score_mod, mask, online softmax (softmax-inl.h) -> O = alpha O + P V
//
// Four ways to S and P V:
//   decode-inl.h          few rows: memory-bound, K and V straight from the cache
//   decode_widened-inl.h  few rows, int4 or head sizes that are not whole vectors: fp32 copies
//   prefill-inl.h         many rows: compute-bound, K and V widened into panels once for all rows
//   prefill_tiles-inl.h   the same in bf16 by tile instructions
//
// Bytes: each K and V row that is needed is read once per work tile. Flops: 4 x rows x keys x head
// size. Threads share nothing while they run.
#if defined(QUIRE_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_ATTENTION_INL_H_
#undef QUIRE_CPU_ATTENTION_INL_H_
#else
#define QUIRE_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>

#include "cpu/decode-inl.h"
#include "cpu/decode_pairs-inl.h"
#include "cpu/decode_widened-inl.h"
#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/prefill-inl.h"
#include "cpu/prefill_tiles-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"
#include "semantics/softmax_state.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

inline void load_queries(const WorkItem& item) {
  if (item.multiply_tiles != nullptr) return load_tile_queries(item);
  if (item.multiply_pairs != nullptr) return load_pair_queries(item);
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const WidenRow widen = widener(layer.dtype);
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    float* to = item.scratch->q + std::int64_t{h} * item.head_rows * item.padded_k;
    for (std::int32_t r = 0; r < item.rows; ++r, to += item.padded_k) {
      widen(item.query_row(h, r), layer.head_size, item.query_scale, to, item.padded_k);
    }
    // Decode takes blocks of 4 rows.
    std::fill(to, to + (round_up(item.rows, 4) - item.rows) * item.padded_k, 0.0F);
  }
}

// Rows of padding between kv heads keep whatever their outputs hold: with one query row a head they
// are fifteen of sixteen.
HWY_INLINE void clear(const WorkItem& item, const Partial& out) {
  const std::int64_t rows = std::int64_t{item.head_rows} * item.kv_heads;
  // Decode works in blocks of up to 4 rows, products of bf16 on 8 or 16.
  const bool bf16 = item.multiply_tiles != nullptr || item.multiply_pairs != nullptr;
  const std::int64_t touched = bf16 ? item.head_rows : round_up(item.rows, 4);
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    float* o = head_of(item, out, h).o;
    std::fill(o, o + touched * item.padded_v, 0.0F);
  }
  std::fill(out.max, out.max + rows, kMinusInfinity);
  std::fill(out.sum, out.sum + rows, 0.0F);
}

// The keys of the i-th kv tile of the item's tile; none if there is no such kv tile.
inline void resolve_kv_tile(const WorkItem& item, std::int32_t i, KvTile* out) {
  const WorkTile& tile = *item.tile;
  out->count = 0;
  if (i >= tile.kv_tiles.count()) return;
  const std::int64_t begin = std::int64_t{tile.kv_tiles.at(i)} * tile.kv_tile;
  const std::int64_t end = std::min(begin + tile.kv_tile, item.visible_end);
  // Products by tiles add up 32 keys, then the rest: which 32 must not depend on where the rows of a
  // tile begin to see, which is other in another chunk of the prompt. Kv tiles are whole such steps.
  const std::int64_t visible_begin = item.multiply_tiles == nullptr
                                         ? item.visible_begin
                                         : item.visible_begin / kTileDepth * kTileDepth;
  out->first = std::max(begin, visible_begin);
  out->count = static_cast<std::int32_t>(std::max<std::int64_t>(end - out->first, 0));
  resolve_rows(item, item.params->k, out->first, out->count, &out->k);
  resolve_rows(item, item.params->v, out->first, out->count, &out->v);
}

inline void attend_chunk(const WorkItem& item, std::int32_t kv_tile_begin, std::int32_t kv_tile_end,
                         const Partial& out) {
  const LayerParams& layer = item.params->layer;
  const bool whole_vectors = layer.head_size % kVec == 0 && layer.head_size_v % kVec == 0 &&
                             layer.kv_dtype != semantics::kInt4;
  const auto attend = item.multiply_tiles != nullptr   ? attend_prefill_tiles
                      : item.multiply_pairs != nullptr ? attend_decode_pairs
                      : !item.tile->decode             ? attend_prefill
                      : whole_vectors                  ? attend_decode
                                                       : attend_decode_widened;
  clear(item, out);
  KvTile kv_tiles[2];  // this one and the next
  resolve_kv_tile(item, kv_tile_begin, &kv_tiles[kv_tile_begin & 1]);
  if (item.cold) prefetch_kv_tile(item, kv_tiles[kv_tile_begin & 1]);
  for (std::int32_t i = kv_tile_begin; i < kv_tile_end; ++i) {
    // The kv tile after the chunk's last is prefetched too: mostly, this thread takes the next
    // chunk.
    resolve_kv_tile(item, i + 1, &kv_tiles[(i + 1) & 1]);
    const KvTile& kv_tile = kv_tiles[i & 1];
    // Kv tiles ascend: behind the first without keys, all are without.
    if (kv_tile.count == 0) break;
    attend(item, kv_tile, kv_tiles[(i + 1) & 1], out);
  }
}

// into[0, size) = into * weight_into + later * weight_later
HWY_INLINE void weighted_sum(float* into, float weight_into, const float* later, float weight_later,
                             std::int32_t size) {
  const Df d;
  const Vf wi = hn::Set(d, weight_into);
  const Vf wl = hn::Set(d, weight_later);
  for (std::int32_t i = 0; i < size; i += kVec) {
    const Vf sum = hn::MulAdd(hn::LoadU(d, later + i), wl, hn::Mul(hn::LoadU(d, into + i), wi));
    hn::StoreU(sum, d, into + i);
  }
}

inline void combine(const Partial& into, const Partial& later, std::int32_t rows,
                    std::int64_t padded_v) {
  for (std::int32_t r = 0; r < rows; ++r) {
    const auto combined =
        semantics::combine(semantics::SoftmaxState<float>{into.max[r], into.sum[r]},
                           semantics::SoftmaxState<float>{later.max[r], later.sum[r]});
    const std::int64_t row = static_cast<std::int64_t>(r) * padded_v;
    weighted_sum(into.o + row, combined.weight_a, later.o + row, combined.weight_b, padded_v);
    into.max[r] = combined.state.max;
    into.sum[r] = combined.state.sum;
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
