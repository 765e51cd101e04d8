// What lies between S and P V, for decode and prefill alike: score_mod, mask, online softmax.
//
//   S[rows, keys of a kv tile] -> soft cap, ALiBi -> query-query bias -> mask (-inf), row maxima
//     -> new running maxima, alpha -> P = exp(S - max), row sums
//
// What a row computes does not depend on the other rows of its tile.
#if defined(QUIRE_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_SOFTMAX_INL_H_
#undef QUIRE_CPU_SOFTMAX_INL_H_
#else
#define QUIRE_CPU_SOFTMAX_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/simd/vec-inl.h"
#include "semantics/softmax_state.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Columns of S: keys of a kv tile, counted from its first.
struct Columns {
  std::int32_t begin = 0;
  std::int32_t end = 0;
};

// Rows of an item, all of one kv head. A multiple of 16 begins them.
struct Rows {
  std::int32_t begin = 0;
  std::int32_t end = 0;
};

HWY_INLINE Columns columns_of(semantics::Span span, std::int64_t first, std::int32_t count) {
  return {static_cast<std::int32_t>(std::clamp<std::int64_t>(span.begin - first, 0, count)),
          static_cast<std::int32_t>(std::clamp<std::int64_t>(span.end - first, 0, count))};
}

HWY_INLINE void add_qq_bias(const BatchParams& batch, const TileToken& token, std::int64_t first,
                            std::int32_t count, float* s) {
  if (token.query_index >= batch.qq_size) return;
  const float* bias =
      batch.qq_bias + token.seq * batch.qq_seq_stride + token.query_index * batch.qq_row_stride;
  const Columns own =
      columns_of({token.context_len, token.context_len + batch.qq_size}, first, count);
  for (std::int32_t t = own.begin; t < own.end; ++t) {
    // -inf hides the key, whatever its score.
    const float x = bias[first + t - token.context_len];
    s[t] = x == kMinusInfinity ? x : s[t] + x;
  }
}

// Soft cap and ALiBi on one row of S, the keys [first, first + count).
HWY_INLINE void soft_cap_and_alibi(const LayerParams& layer, std::int32_t head,
                                   const TileToken& token, std::int64_t first, std::int32_t count,
                                   float* s) {
  const Df d;
  const VecOps ops;
  const Vf cap = hn::Set(d, layer.soft_cap);
  const Vf inverse_cap = hn::Set(d, layer.soft_cap > 0 ? inverse_of_cap(layer.soft_cap) : 0.0F);
  const Vf slope = hn::Set(d, layer.alibi_slopes != nullptr ? layer.alibi_slopes[head] : 0.0F);
  const Vf lanes = hn::Mul(hn::Iota(d, 0.0F), hn::Set(d, static_cast<float>(token.kv_stride)));
  for (std::int32_t t = 0; t < count; t += kVec) {
    Vf x = hn::Load(d, s + t);
    if (layer.soft_cap > 0) x = soft_cap(ops, x, cap, inverse_cap);
    if (layer.alibi_slopes != nullptr) {
      // j - p is exact in fp32 up to 2^24. Beyond, rounding changes it by 2^-24 of itself.
      const std::int64_t distance = token.distance + (first + t) * token.kv_stride;
      const Vf j_minus_p = hn::Add(hn::Set(d, static_cast<float>(distance)), lanes);
      x = layer.alibi_sqrt ? alibi_sqrt(ops, x, slope, j_minus_p) : alibi(ops, x, slope, j_minus_p);
    }
    hn::Store(x, d, s + t);
  }
}

// Masks one row (columns outside both spans become -inf) and returns its maximum. Writes `padded`
// columns, a whole number of vectors. The maximum may miss a NaN; the row's sum will be NaN then.
HWY_INLINE float mask_and_max(Columns a, Columns b, std::int32_t padded, float* s) {
  const Df d;
  Vf max = hn::Set(d, kMinusInfinity);
  const bool all = (a.begin == 0 && a.end == padded) || (b.begin == 0 && b.end == padded);
  if (all) {
    for (std::int32_t t = 0; t < padded; t += kVec) max = hn::Max(max, hn::Load(d, s + t));
    return hn::GetLane(hn::MaxOfLanes(d, max));
  }
  const auto bound = [&](std::int32_t x) { return hn::Set(d, static_cast<float>(x)); };
  const Vf a_begin = bound(a.begin), a_end = bound(a.end);
  const Vf b_begin = bound(b.begin), b_end = bound(b.end);
  for (std::int32_t t = 0; t < padded; t += kVec) {
    const Vf column = hn::Iota(d, static_cast<float>(t));
    const auto in_a = hn::And(hn::Ge(column, a_begin), hn::Lt(column, a_end));
    const auto in_b = hn::And(hn::Ge(column, b_begin), hn::Lt(column, b_end));
    const Vf x = hn::IfThenElse(hn::Or(in_a, in_b), hn::Load(d, s + t), hn::Set(d, kMinusInfinity));
    hn::Store(x, d, s + t);
    max = hn::Max(max, x);
  }
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

// score_mod, mask and row maxima of S, for kv head h of the item.
HWY_INLINE void mask_scores(const WorkItem& item, const KvTile& kv_tile, std::int32_t h,
                            const Rows& rows, std::int32_t padded) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const Scratch& scratch = *item.scratch;
  const bool has_cap_or_alibi = layer.soft_cap > 0 || layer.alibi_slopes != nullptr;
  for (std::int32_t r = rows.begin; r < rows.end; ++r) {
    const TileToken& token = scratch.tokens[r / layer.group];
    float* s = scratch.s + (r - rows.begin) * kMaxKvTile;
    if (has_cap_or_alibi) {
      soft_cap_and_alibi(layer, (item.first_kv_head + h) * layer.group + r % layer.group, token,
                         kv_tile.first, padded, s);
    }
    if (p.batch.qq_bias != nullptr) add_qq_bias(p.batch, token, kv_tile.first, kv_tile.count, s);
    scratch.new_max[r] =
        mask_and_max(columns_of(token.visible.prefix, kv_tile.first, kv_tile.count),
                     columns_of(token.visible.main, kv_tile.first, kv_tile.count), padded, s);
  }
}

// ---- running maximum and sum --------------------------------------------------------------------

// New maxima, and what earlier sums and outputs are multiplied with. Vectors run over rows.
HWY_INLINE void update_max(const WorkItem& item, const Rows& rows, const Partial& state) {
  const Df d;
  const Scratch& scratch = *item.scratch;
  const Vf minus_infinity = hn::Set(d, kMinusInfinity);
  for (std::int32_t r = rows.begin; r < rows.end; r += kVec) {
    const Vf old_max = hn::LoadU(d, state.max + r);
    const Vf max = hn::Max(old_max, hn::LoadU(d, scratch.new_max + r));
    const Vf shift = hn::IfThenElse(hn::Eq(max, minus_infinity), hn::Zero(d), max);
    hn::StoreU(max, d, state.max + r);
    hn::StoreU(shift, d, scratch.new_max + r);
    hn::StoreU(exp_below_0(hn::Sub(old_max, shift)), d, scratch.alpha + r);
  }
}

// S -> P = exp(S - shift) * 2^-kWeightsDownLog2 in place, and the row sums.
HWY_INLINE void exponentiate(const WorkItem& item, const Rows& rows, std::int32_t padded,
                             const Partial& state) {
  const Df d;
  const Scratch& scratch = *item.scratch;
  for (std::int32_t r = rows.begin; r < rows.end; ++r) {
    float* s = scratch.s + (r - rows.begin) * kMaxKvTile;
    const Vf shift = hn::Set(d, scratch.new_max[r]);
    Vf sum = hn::Zero(d);
    for (std::int32_t t = 0; t < padded; t += kVec) {
      const Vf weight = exp_below_0<kWeightsDownLog2>(hn::Sub(hn::Load(d, s + t), shift));
      hn::Store(weight, d, s + t);
      sum = hn::Add(sum, weight);
    }
    state.sum[r] = state.sum[r] * scratch.alpha[r] + hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// The part of a partial that belongs to kv head h of the item.
HWY_INLINE Partial head_of(const WorkItem& item, const Partial& out, std::int32_t h) {
  const std::int64_t row = std::int64_t{h} * item.head_rows;
  return {out.o + row * item.padded_v, out.max + row, out.sum + row};
}

// All steps between S and P V. scratch->s holds the S of `rows`, whole vectors of `padded` keys.
HWY_INLINE void softmax(const WorkItem& item, const KvTile& kv_tile, std::int32_t h,
                        const Rows& rows, std::int32_t padded, const Partial& state) {
  mask_scores(item, kv_tile, h, rows, padded);
  update_max(item, rows, state);
  exponentiate(item, rows, padded, state);
}

// The same of all rows of the item.
HWY_INLINE void softmax(const WorkItem& item, const KvTile& kv_tile, std::int32_t h,
                        const Partial& state) {
  softmax(item, kv_tile, h, {0, item.rows},
          static_cast<std::int32_t>(round_up(kv_tile.count, kVec)), state);
}

// ---- values that are not finite -----------------------------------------------------------------
//
// A key that a row does not see has weight 0 there, and 0 * NaN is NaN: a value, or its scale, that
// is not finite must be left out, not multiplied. Kv tiles that every row sees whole cannot have
// such a key. In the others V is searched once for values that are not finite; only if there is
// one, each row takes the keys that it sees alone (masked_values). That is slow, and gives every
// row the same bits as the fast way wherever that gives numbers.

// Whether every row of the tile sees every key.
HWY_INLINE bool seen_by_all(const WorkItem& item, const KvTile& kv_tile) {
  const std::int64_t end = kv_tile.first + kv_tile.count;
  const auto holds_tile = [&](const semantics::Span& span) {
    return span.begin <= kv_tile.first && end <= span.end;
  };
  return holds_tile(item.common.main) || holds_tile(item.common.prefix);
}

// Whether one row sees a key: by the mask, and by a query-query bias of -inf.
HWY_INLINE bool sees(const BatchParams& batch, const TileToken& token, std::int64_t key) {
  if (!token.visible.contains(key)) return false;
  const std::int64_t own = key - token.context_len;
  if (batch.qq_bias == nullptr || token.query_index >= batch.qq_size) return true;
  if (own < 0 || own >= batch.qq_size) return true;
  const float bias =
      batch
          .qq_bias[token.seq * batch.qq_seq_stride + token.query_index * batch.qq_row_stride + own];
  return bias != -std::numeric_limits<float>::infinity();
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
