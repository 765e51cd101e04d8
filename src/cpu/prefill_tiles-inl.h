// Prefill by the tile instructions of tiles.h: many bf16 rows of one kv head.
//
//   K and V as bf16 tiles once per kv tile, for all rows:
//     K   16 keys x 32 elements, transposed in pairs of elements (32-bit words)
//     V   32 keys x 16 columns, each pair of keys interleaved
//   then for each 32 rows, so that their S and P stay in L1:
//     S = Q K^T -> scale -> softmax-inl.h -> P as bf16 -> O = alpha O + P V
//
// Q, K and V are exact in bf16 (uses_tiles in tuning.h); P is rounded to bf16, as on GPUs, so that outputs
// in fp32 are left to prefill-inl.h. Scales of keys multiply S, scales of values P.
#if defined(QUIRE_CPU_PREFILL_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_PREFILL_TILES_INL_H_
#undef QUIRE_CPU_PREFILL_TILES_INL_H_
#else
#define QUIRE_CPU_PREFILL_TILES_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

using Words = hn::RebindToUnsigned<Df>;
constexpr std::int32_t kBlockOfRows = 2 * kTileRows;

// Rows as bf16, whatever they are stored as, zeros behind their last element.
class Bf16Rows {
 public:
  // `staging` has room for a row of `padded` elements as fp32.
  Bf16Rows(DType dtype, std::int32_t size, std::int32_t padded, float* staging)
      : widen_(widener(dtype)),
        in_place_(dtype == DType::kBFloat16 && size == padded),
        size_(size),
        padded_(padded),
        staging_(staging) {}

  // The row itself where it can be read in place, else a copy of it in `to`.
  HWY_INLINE const std::uint16_t* operator()(const void* row, std::uint16_t* to) const {
    if (in_place_) return static_cast<const std::uint16_t*>(row);
    copy(row, to);
    return to;
  }

  void copy(const void* row, std::uint16_t* to) const {
    const Df d;
    const hn::Rebind<std::uint16_t, Df> d16;
    widen_(row, size_, 1.0F, staging_, padded_);
    for (std::int32_t i = 0; i < padded_; i += kVec) {
      const auto bits = hn::ShiftRight<16>(hn::BitCast(Words(), hn::LoadU(d, staging_ + i)));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<Df>(), bits)), d16, to + i);
    }
  }

 private:
  WidenRow widen_;
  bool in_place_;
  std::int32_t size_;
  std::int32_t padded_;
  float* staging_;
};

// Zeros in place of rows that are not there.
alignas(64) inline constexpr std::uint16_t kZeroRow16[round_up(576, kTileDepth)] = {};

HWY_INLINE std::int32_t padded_depth(const WorkItem& item) {
  return static_cast<std::int32_t>(round_up(item.params->layer.head_size, kTileDepth));
}
HWY_INLINE std::int32_t padded_columns(const WorkItem& item) {
  return static_cast<std::int32_t>(round_up(item.params->layer.head_size_v, kTileColumns));
}

inline void load_tile_queries(const WorkItem& item) {
  const LayerParams& layer = item.params->layer;
  const std::int32_t depth = padded_depth(item);
  const Bf16Rows rows(layer.dtype, layer.head_size, depth, item.scratch->staging);
  std::uint16_t* to = item.scratch->tiles.q;
  for (std::int32_t r = 0; r < item.head_rows; ++r, to += depth) {
    if (r >= item.rows) {
      std::fill(to, to + depth, std::uint16_t{0});
      continue;
    }
    rows.copy(item.query_row(0, r), to);
  }
}

// K: kLanes keys by kLanes words at a time.
HWY_INLINE void load_k_tiles(const WorkItem& item, const KvTileRows& rows, std::int32_t count) {
  const Df d;
  const std::int64_t depth = padded_depth(item);
  const Bf16Rows to_bf16(item.params->k.dtype, item.params->layer.head_size, padded_depth(item),
                         item.scratch->staging);
  for (std::int64_t first = 0; first < round_up(count, kTileColumns); first += kVec) {
    const std::uint16_t* keys[kLanes];
    for (std::int32_t t = 0; t < kVec; ++t) {
      const bool mapped = first + t < count && rows.row[first + t] != nullptr;
      keys[t] =
          mapped ? to_bf16(rows.row[first + t], item.scratch->tiles.rows + t * depth) : kZeroRow16;
    }
    // Words of a key lie 16 apart in its column of tiles, whatever the tile.
    std::uint16_t* column = item.scratch->tiles.k + first / kTileColumns * depth * kTileColumns +
                            first % kTileColumns * 2;
    for (std::int32_t word = 0; word < depth / 2; word += kVec) {
      Vf block[kLanes];
      HWY_UNROLL(16)
      for (std::int32_t t = 0; t < kVec; ++t) {
        block[t] = hn::LoadU(d, reinterpret_cast<const float*>(keys[t]) + word);
      }
      transpose(block);
      HWY_UNROLL(16)
      for (std::int32_t i = 0; i < kVec; ++i) {
        hn::StoreU(block[i], d,
                   reinterpret_cast<float*>(column) + (word + i) * std::int64_t{kTileColumns});
      }
    }
  }
}

// V: pairs of keys, kLanes columns at a time. Returns whether all of it is finite.
HWY_INLINE bool load_v_tiles(const WorkItem& item, const KvTileRows& rows, std::int32_t count) {
  const Words words;
  const hn::Rebind<std::uint16_t, Df> d16;
  const std::int32_t columns = padded_columns(item);
  const std::int64_t depth = round_up(count, kTileDepth);
  const Bf16Rows to_bf16(item.params->v.dtype, item.params->layer.head_size_v, columns,
                         item.scratch->staging);
  std::uint16_t* copies = item.scratch->tiles.rows;
  MagnitudeBits greatest = hn::Zero(words);
  for (std::int32_t t = 0; t < depth; t += 2) {
    const auto row = [&](std::int32_t key, std::uint16_t* copy) {
      return key < count && rows.row[key] != nullptr ? to_bf16(rows.row[key], copy) : kZeroRow16;
    };
    const std::uint16_t* even = row(t, copies);
    const std::uint16_t* odd = row(t + 1, copies + columns);
    std::uint16_t* to = item.scratch->tiles.v + static_cast<std::int64_t>(t / 2) * 2 * kTileColumns;
    for (std::int32_t i = 0; i < columns; i += kVec) {
      const auto low = hn::PromoteTo(words, hn::LoadU(d16, even + i));
      const auto high = hn::ShiftLeft<16>(hn::PromoteTo(words, hn::LoadU(d16, odd + i)));
      greatest = hn::Max(greatest, hn::Max(hn::ShiftLeft<17>(low), hn::ShiftLeft<1>(high)));
      hn::StoreU(hn::Or(low, high), words,
                 reinterpret_cast<std::uint32_t*>(to + i / kTileColumns * depth * kTileColumns) +
                     i % kTileColumns);
    }
  }
  return is_finite(greatest);
}

// The scales of the keys or values of a kv tile, 1 where there are none.
struct TokenScales {
  alignas(64) float scale[kMaxKvTile];
  bool any = false;
  bool finite = true;
};

HWY_INLINE void load_scales(const KvParams& kv, const KvTileRows& rows, std::int32_t padded,
                            std::int32_t count, TokenScales* out) {
  out->any = kv.token_scales != nullptr;
  if (!out->any) return;
  for (std::int32_t t = 0; t < padded; ++t) {
    out->scale[t] = t < count && rows.scale[t] != nullptr ? *rows.scale[t] : 1.0F;
    out->finite = out->finite && std::isfinite(out->scale[t]);
  }
}

// s[r][t] *= scale * key_scale[t]
HWY_INLINE void scale_scores(const WorkItem& item, const TokenScales& key_scales,
                             std::int32_t padded, std::int32_t rows) {
  const Df d;
  const Vf scale = hn::Set(d, item.query_scale);
  for (std::int32_t r = 0; r < rows; ++r) {
    float* s = item.scratch->s + r * kMaxKvTile;
    for (std::int32_t t = 0; t < padded; t += kVec) {
      Vf x = hn::Mul(hn::Load(d, s + t), scale);
      if (key_scales.any) x = hn::Mul(x, hn::Load(d, key_scales.scale + t));
      hn::Store(x, d, s + t);
    }
  }
}

// P of the rows [begin, end) as bf16, times the values' scales if there are any, up to a whole step of
// the tile instruction. Rounds halves up: weights are not negative. A NaN may get lost; its row's sum is
// NaN then.
HWY_INLINE void weights_to_bf16(const WorkItem& item, const float* value_scales,
                                std::int32_t padded, std::int32_t begin, std::int32_t end) {
  const Df d;
  const Words words;
  const hn::Rebind<std::uint16_t, Df> d16;
  const auto depth = static_cast<std::int32_t>(round_up(padded, kTileDepth));
  for (std::int32_t r = begin; r < end; ++r) {
    const float* s = item.scratch->s + r * kMaxKvTile;
    std::uint16_t* to = item.scratch->tiles.p + r * kMaxKvTile;
    for (std::int32_t t = 0; t < padded; t += kVec) {
      Vf x = hn::Load(d, s + t);
      if (value_scales != nullptr) x = hn::Mul(x, hn::Load(d, value_scales + t));
      const auto bits = hn::ShiftRight<16>(hn::Add(hn::BitCast(words, x), hn::Set(words, 0x8000)));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<Df>(), bits)), d16, to + t);
    }
    std::fill(to + padded, to + depth, std::uint16_t{0});
  }
}

HWY_INLINE void rescale(const WorkItem& item, const Rows& rows, const Partial& state) {
  const Df d;
  for (std::int32_t r = rows.begin; r < rows.end; ++r) {
    const float alpha = item.scratch->alpha[r];
    if (alpha == 1.0F) continue;
    float* o = state.o + r * item.padded_v;
    for (std::int64_t i = 0; i < item.padded_v; i += kVec) {
      hn::StoreU(hn::Mul(hn::LoadU(d, o + i), hn::Set(d, alpha)), d, o + i);
    }
  }
}

// ---- values that are not finite (softmax-inl.h tells why) ---------------------------------------
//
// Their elements, and whole keys whose scale is not finite, are zeros in the tiles, and each row
// that sees the key adds them here. Elements beside them keep their bits.

// Calls visit(key, column, value times scale) for each of them.
template <class Visit>
HWY_INLINE void for_nonfinite_values(const WorkItem& item, const KvTile& kv_tile,
                                     const Visit& visit) {
  const std::int32_t size = item.params->layer.head_size_v;
  const WidenRow widen = widener(item.params->v.dtype);
  for (std::int32_t t = 0; t < kv_tile.count; ++t) {
    if (kv_tile.v.row[t] == nullptr) continue;
    const float scale = kv_tile.v.scale[t] == nullptr ? 1.0F : *kv_tile.v.scale[t];
    widen(kv_tile.v.row[t], size, 1.0F, item.scratch->staging, size);
    for (std::int32_t i = 0; i < size; ++i) {
      const float x = item.scratch->staging[i];
      if (!std::isfinite(scale) || !std::isfinite(x)) visit(t, i, x * scale);
    }
  }
}

HWY_NOINLINE inline void clear_nonfinite_values(const WorkItem& item, const KvTile& kv_tile,
                                                TokenScales* scales) {
  const std::int64_t depth = round_up(kv_tile.count, kTileDepth);
  for_nonfinite_values(item, kv_tile, [&](std::int64_t t, std::int64_t i, float) {
    item.scratch->tiles
        .v[(i / kTileColumns * depth + t / 2 * 2) * kTileColumns + i % kTileColumns * 2 + t % 2] =
        0;
  });
  for (std::int32_t t = 0; scales->any && t < kv_tile.count; ++t) {
    if (!std::isfinite(scales->scale[t])) scales->scale[t] = 1.0F;
  }
}

HWY_NOINLINE inline void add_nonfinite_values(const WorkItem& item, const KvTile& kv_tile,
                                              const Rows& rows, const Partial& state) {
  const Scratch& scratch = *item.scratch;
  for_nonfinite_values(item, kv_tile, [&](std::int32_t t, std::int32_t i, float value) {
    for (std::int32_t r = rows.begin; r < rows.end; ++r) {
      const TileToken& token = scratch.tokens[r / item.params->layer.group];
      if (!sees(item.params->batch, token, kv_tile.first + t)) continue;
      state.o[r * item.padded_v + i] += scratch.s[(r - rows.begin) * kMaxKvTile + t] * value;
    }
  });
}

// ---- one step -----------------------------------------------------------------------------------

HWY_INLINE void attend_rows(const WorkItem& item, const KvTile& kv_tile, const Rows& rows,
                            const TokenScales& key_scales, const TokenScales& value_scales,
                            const Partial& out) {
  const Scratch& scratch = *item.scratch;
  const std::int32_t depth = padded_depth(item);
  const auto padded = static_cast<std::int32_t>(round_up(kv_tile.count, kTileColumns));
  const std::int32_t tile_rows =
      static_cast<std::int32_t>(round_up(rows.end - rows.begin, kTileRows));
  TileProduct product;
  product.a = scratch.tiles.q + std::int64_t{rows.begin} * depth;
  product.a_stride = depth;
  product.b = scratch.tiles.k;
  product.b_stride = std::int64_t{depth} * kTileColumns;
  product.c = scratch.s;
  product.c_stride = kMaxKvTile;
  product.rows = tile_rows;
  product.depth = depth;
  product.columns = padded;
  item.multiply_tiles(product);
  scale_scores(item, key_scales, padded, rows.end - rows.begin);
  softmax(item, kv_tile, 0, rows, padded, out);
  weights_to_bf16(item, value_scales.any ? value_scales.scale : nullptr, padded, 0, tile_rows);
  rescale(item, rows, out);
  product.a = scratch.tiles.p;
  product.a_stride = kMaxKvTile;
  product.b = scratch.tiles.v;
  product.depth = static_cast<std::int32_t>(round_up(kv_tile.count, kTileDepth));
  product.b_stride = std::int64_t{product.depth} * kTileColumns;
  product.c = out.o + rows.begin * item.padded_v;
  product.c_stride = item.padded_v;
  product.columns = padded_columns(item);
  product.add = true;
  item.multiply_tiles(product);
}

// One step of an item: one kv head over one kv tile.
inline void attend_prefill_tiles(const WorkItem& item, const KvTile& kv_tile, const KvTile& next,
                                 const Partial& out) {
  const AttentionParams& p = *item.params;
  const auto padded = static_cast<std::int32_t>(round_up(kv_tile.count, kTileColumns));
  TokenScales key_scales;
  TokenScales value_scales;
  prefetch_kv_tile(item, next);
  load_k_tiles(item, kv_tile.k, kv_tile.count);
  const bool finite = load_v_tiles(item, kv_tile.v, kv_tile.count);
  load_scales(p.k, kv_tile.k, padded, kv_tile.count, &key_scales);
  load_scales(p.v, kv_tile.v, padded, kv_tile.count, &value_scales);
  const bool apart = !(finite && value_scales.finite) && !seen_by_all(item, kv_tile);
  if (apart) clear_nonfinite_values(item, kv_tile, &value_scales);
  for (std::int32_t r = 0; r < item.rows; r += kBlockOfRows) {
    const Rows rows{r, std::min(r + kBlockOfRows, item.rows)};
    attend_rows(item, kv_tile, rows, key_scales, value_scales, out);
    if (apart) add_nonfinite_values(item, kv_tile, rows, out);
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
