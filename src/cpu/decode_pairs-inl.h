// Decode by the instructions of pairs.h: 5 to 32 query rows a kv head, over fp8 caches fewer too
// (uses_pairs in tuning.h).
//
//   S = scale * Q K^T (rows in lanes) -> softmax-inl.h -> P as bf16 -> O = alpha O + P V
//
// Q, K and V are exact in bf16, P is rounded to it, as in prefill_tiles-inl.h.
#if defined(QUIRE_CPU_DECODE_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_DECODE_PAIRS_INL_H_
#undef QUIRE_CPU_DECODE_PAIRS_INL_H_
#else
#define QUIRE_CPU_DECODE_PAIRS_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "cpu/decode-inl.h"
#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/pairs.h"
#include "cpu/prefill_tiles-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// The pairs of a kv head of the item.
HWY_INLINE std::uint32_t* pair_queries(const WorkItem& item, std::int32_t h) {
  return reinterpret_cast<std::uint32_t*>(item.scratch->tiles.q) +
         std::int64_t{h} * item.head_rows * item.params->layer.head_size / 2;
}

inline void load_pair_queries(const WorkItem& item) {
  const LayerParams& layer = item.params->layer;
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    std::uint32_t* to = pair_queries(item, h);
    for (std::int32_t first = 0; first < item.rows;) {
      const std::int32_t lanes = pair_lanes(item.rows, first);
      for (std::int32_t lane = 0; lane < lanes; ++lane) {
        const std::int32_t r = first + lane;
        const void* from =
            r < item.rows ? static_cast<const void*>(item.query_row(h, r)) : kZeroRow16;
        for (std::int64_t i = 0; i < layer.head_size / 2; ++i) {
          std::memcpy(to + i * lanes + lane, static_cast<const char*>(from) + i * 4, 4);
        }
      }
      to += std::int64_t{layer.head_size} / 2 * lanes;
      first += lanes;
    }
  }
}

// Rows of 8-bit elements as bf16 in `to`, which takes their place. Fetches rows of the next kv tile
// meanwhile, in place of the kernels, which would take them for bf16.
HWY_INLINE void widen_rows(const WorkItem& item, DType dtype, std::int32_t count, std::int32_t size,
                           std::uint16_t* to, StoredRows* rows) {
  if (dtype == DType::kBFloat16) return;
  const ByteTable& table = byte_table(dtype);
  for (std::int32_t t = 0; t < count; ++t, to += size) {
    for (std::int32_t i = 0; i < size; i += 64) __builtin_prefetch(rows->prefetch[t] + i, 0, 2);
    if (rows->row[t] == kZeroRow) continue;
    item.multiply_pairs->widen(rows->row[t], size, table, to);
    rows->row[t] = to;
  }
  std::fill(rows->prefetch, rows->prefetch + round_up(count, kVec), kZeroRow);
}

// As masked_values of decode-inl.h: a row at a time, with the bits of all rows together.
HWY_NOINLINE inline void masked_pair_values(const WorkItem& item, const KvTile& kv_tile,
                                            const PairValues& product, const StoredRows& values) {
  const bool scaled = item.params->v.token_scales != nullptr;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = item.scratch->tokens[r / item.params->layer.group];
    StoredRows seen = values;
    for (std::int32_t t = 0; t < kv_tile.count; ++t) {
      if (sees(item.params->batch, token, kv_tile.first + t)) continue;
      seen.row[t] = kZeroRow;
      seen.scale[t] = 1.0F;
    }
    weights_to_bf16(item, scaled ? seen.scale : nullptr,
                    static_cast<std::int32_t>(round_up(kv_tile.count, kVec)), r, r + 1);
    PairValues row = product;
    row.values = seen.row;
    row.weights += r * row.weights_stride;
    row.alpha += r;
    row.o += r * row.o_stride;
    row.rows = 1;
    item.multiply_pairs->values(row);
  }
}

// One step of an item: all its kv heads over one kv tile.
inline void attend_decode_pairs(const WorkItem& item, const KvTile& kv_tile, const KvTile& next,
                                const Partial& out) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const Scratch& scratch = *item.scratch;
  const std::int32_t count = kv_tile.count;
  StoredRows rows;
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    const Partial state = head_of(item, out, h);
    stored_rows(item, p.k, kv_tile.k, count, next.k, next.count, h, &rows);
    widen_rows(item, p.k.dtype, count, layer.head_size, scratch.tiles.k, &rows);
    item.multiply_pairs->scores({rows.row, rows.prefetch, count, pair_queries(item, h),
                                 layer.head_size, item.rows, item.query_scale, scratch.s,
                                 kMaxKvTile});
    if (p.k.token_scales != nullptr) scale_columns(rows.scale, count, item.rows, scratch.s);
    softmax(item, kv_tile, h, {0, item.rows}, static_cast<std::int32_t>(round_up(count, kPairKeys)),
            state);
    stored_rows(item, p.v, kv_tile.v, count, next.v, next.count, h, &rows);
    widen_rows(item, p.v.dtype, count, layer.head_size_v, scratch.tiles.v, &rows);
    const PairValues product = {rows.row,          rows.prefetch, count,   scratch.tiles.p,
                                kMaxKvTile,        scratch.alpha, state.o, item.padded_v,
                                layer.head_size_v, item.rows};
    if (!seen_by_all(item, kv_tile) &&
        !rows_are_finite<DType::kBFloat16>(rows, count, layer.head_size_v)) {
      masked_pair_values(item, kv_tile, product, rows);
      continue;
    }
    weights_to_bf16(item, p.v.token_scales != nullptr ? rows.scale : nullptr,
                    static_cast<std::int32_t>(round_up(count, kVec)), 0,
                    static_cast<std::int32_t>(round_up(item.rows, kPairRows)));
    item.multiply_pairs->values(product);
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
