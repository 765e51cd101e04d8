// The CPU attention kernel of one ISA.
//
//   per item (query tile x kv heads), per unit of kv_tile keys:
//     resolve the unit's rows through the block table (unit-inl.h) ->
//     S = Q K^T -> soft cap, mask, bias -> online softmax -> O = alpha O + P V
//
// Three ways to S and P V:
//   few rows           K and V straight from the cache, all heads of the item in turn
//                      (few_rows-inl.h): memory-bound, no copies
//   few rows, widened  head sizes that are not whole vectors: fp32 copies, dot products
//   many rows          K transposed and V widened into panels once per tile, then the 6-row
//                      micro-kernel (product-inl.h): compute-bound
// Where some row does not see some key and V is not finite, masked_values-inl.h takes P V.
// Bytes: each needed K and V row is read once per query tile. Flops: 4 x rows x keys x head size.
// Workers share nothing while they run. What a row computes does not depend on its tile's others.
#if defined(QUIRE_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_ATTENTION_INL_H_
#undef QUIRE_CPU_ATTENTION_INL_H_
#else
#define QUIRE_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "cpu/few_rows-inl.h"
#include "cpu/kernels.h"
#include "cpu/masked_values-inl.h"
#include "cpu/product-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/unit-inl.h"
#include "semantics/softmax_state.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// ---- scores -------------------------------------------------------------------------------------

// S[r][t] for K rows as they lie: kLanes dot products at a time, summed together.
HWY_INLINE void scores_by_dots(const Item& item, std::int32_t h, std::int32_t count) {
  const Df d;
  const Scratch& scratch = *item.scratch;
  const float* head_q = scratch.q + std::int64_t{h} * item.head_rows * item.padded_k;
  const float* head_k = scratch.k + std::int64_t{h} * item.tile->kv_tile * item.padded_k;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const float* q = head_q + static_cast<std::int64_t>(r) * item.padded_k;
    float* s = scratch.s + r * kMaxKvTile;
    for (std::int32_t t = 0; t < count; t += kVec) {
      const float* k = head_k + static_cast<std::int64_t>(t) * item.padded_k;
      Vf acc[kLanes];
      HWY_UNROLL(16)
      for (std::size_t n = 0; n < kLanes; ++n) acc[n] = hn::Zero(d);
      for (std::int32_t i = 0; i < item.padded_k; i += kVec) {
        const Vf x = hn::Load(d, q + i);
        HWY_UNROLL(16)
        for (std::size_t n = 0; n < kLanes; ++n) {
          acc[n] = hn::MulAdd(x, hn::Load(d, k + n * item.padded_k + i), acc[n]);
        }
      }
      hn::Store(sums_of(acc), d, s + t);
    }
  }
}

// Long head sizes are summed in parts of at most this many products: rounding errors grow with the
// length of a chain of additions, and large logits feel it.
constexpr std::int32_t kMostDepth = 128;

HWY_INLINE void scores_by_panels(const Item& item, std::int32_t count) {
  const Scratch& scratch = *item.scratch;
  const std::int32_t size = item.params->layer.head_size;
  const std::int64_t stride = static_cast<std::int64_t>(item.padded_k) * kPanel;
  const std::int32_t num_panels = (count + kPanel - 1) / kPanel;
  const std::int32_t num_parts = (size + kMostDepth - 1) / kMostDepth;
  const std::int32_t part = (size + num_parts - 1) / num_parts;
  for (std::int32_t i = 0; i < size; i += part) {
    const auto run = i == 0 ? rows_times_panels<Meet::kStore> : rows_times_panels<Meet::kAdd>;
    run(scratch.q + i, item.padded_k, scratch.k + std::int64_t{i} * kPanel, stride, num_panels,
        std::min(part, size - i), scratch.s, kMaxKvTile, item.rows, nullptr);
  }
}

// Key columns of a unit relative to its first key.
struct Columns {
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

// Soft cap and ALiBi on one row of logits, of keys [first, first + count); mask and the rest follow.
HWY_INLINE void modify_scores(const LayerParams& layer, std::int32_t head, const TileToken& token,
                              std::int64_t first, std::int32_t count, float* s) {
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
      // j - p is exact in fp32 up to 2^24; beyond, its rounding is far below the slope's effect.
      const std::int64_t distance = token.distance + (first + t) * token.kv_stride;
      const Vf j_minus_p = hn::Add(hn::Set(d, static_cast<float>(distance)), lanes);
      x = layer.alibi_sqrt ? alibi_sqrt(ops, x, slope, j_minus_p) : alibi(ops, x, slope, j_minus_p);
    }
    hn::Store(x, d, s + t);
  }
}

// Masks one row (columns outside both spans become -inf) and returns its maximum. `padded` columns
// are written, a whole number of vectors. NaN may be missed here: the row's sum will know it.
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

HWY_INLINE void finish_scores(const Item& item, std::int32_t h, std::int64_t first,
                              std::int32_t count, std::int32_t padded) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const Scratch& scratch = *item.scratch;
  const bool modified = layer.soft_cap > 0 || layer.alibi_slopes != nullptr;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = scratch.tokens[r / layer.group];
    float* s = scratch.s + r * kMaxKvTile;
    if (modified) {
      modify_scores(layer, (item.kv_head + h) * layer.group + r % layer.group, token, first, padded,
                    s);
    }
    if (p.batch.qq_bias != nullptr) add_qq_bias(p.batch, token, first, count, s);
    scratch.new_max[r] = mask_and_max(columns_of(token.visible.prefix, first, count),
                                      columns_of(token.visible.main, first, count), padded, s);
  }
}

// ---- softmax ------------------------------------------------------------------------------------

// New maxima, and what earlier sums and outputs are multiplied with. Vectors run over rows.
HWY_INLINE void update_max(const Item& item, const PartialRows& state) {
  const Df d;
  const Scratch& scratch = *item.scratch;
  const Vf minus_infinity = hn::Set(d, kMinusInfinity);
  for (std::int32_t r = 0; r < item.rows; r += kVec) {
    const Vf old_max = hn::LoadU(d, state.max + r);
    const Vf max = hn::Max(old_max, hn::LoadU(d, scratch.new_max + r));
    const Vf shift = hn::IfThenElse(hn::Eq(max, minus_infinity), hn::Zero(d), max);
    hn::StoreU(max, d, state.max + r);
    hn::StoreU(shift, d, scratch.new_max + r);
    hn::StoreU(exp_below_0(hn::Sub(old_max, shift)), d, scratch.alpha + r);
  }
}

// S -> P = exp(S - shift) * 2^-kWeightsDownLog2 in place, and the row sums.
HWY_INLINE void exponentiate(const Item& item, std::int32_t padded, const PartialRows& state) {
  const Df d;
  const Scratch& scratch = *item.scratch;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    float* s = scratch.s + r * kMaxKvTile;
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

// ---- entry points -------------------------------------------------------------------------------

inline void load_queries(const Item& item) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const WidenRow widen = widener(layer.dtype);
  for (std::int32_t h = 0; h < item.heads; ++h) {
    float* to = item.scratch->q + std::int64_t{h} * item.head_rows * item.padded_k;
    for (std::int32_t r = 0; r < item.rows; ++r, to += item.padded_k) {
      const auto token = static_cast<std::size_t>(r / layer.group);
      const std::int64_t head = (item.kv_head + h) * layer.group + r % layer.group;
      const char* from =
          static_cast<const char*>(p.query) +
          (item.scratch->tokens[token].row * p.query_token_stride + head * p.query_head_stride) *
              size_of(layer.dtype);
      widen(from, layer.head_size, item.query_scale, to, item.padded_k);
    }
    // Blocks of 4 rows may reach past the last one.
    std::fill(to, to + (round_up(item.rows, 4) - item.rows) * item.padded_k, 0.0F);
  }
}

HWY_INLINE void clear(const Item& item, const PartialRows& out) {
  const std::int64_t rows = std::int64_t{item.head_rows} * item.heads;
  std::fill(out.o, out.o + rows * item.padded_v, 0.0F);
  std::fill(out.max, out.max + rows, kMinusInfinity);
  std::fill(out.sum, out.sum + rows, 0.0F);
}

// The part of a result that belongs to head h of the item.
HWY_INLINE PartialRows head_of(const Item& item, const PartialRows& out, std::int32_t h) {
  const std::int64_t row = std::int64_t{h} * item.head_rows;
  return {out.o + row * item.padded_v, out.max + row, out.sum + row};
}

// The steps between S and P V, the same for every path.
HWY_INLINE void softmax(const Item& item, std::int32_t h, std::int64_t first, std::int32_t count,
                        const PartialRows& state) {
  const auto padded = static_cast<std::int32_t>(round_up(count, kVec));
  finish_scores(item, h, first, count, padded);
  update_max(item, state);
  exponentiate(item, padded, state);
}

HWY_INLINE void values_by_panels(const Item& item, const Unit& unit, std::int32_t h,
                                 const PartialRows& state) {
  const ValuePanels panels = value_panels(item, h);
  if (!seen_by_all(item, unit) && !is_finite(panels, unit.count)) {
    return seen_values_by_panels(item, unit, panels, state);
  }
  rows_times_panels<Meet::kRescale>(item.scratch->s, kMaxKvTile, panels.data, panels.stride,
                                    panels.count, unit.count, state.o, item.padded_v, item.rows,
                                    item.scratch->alpha);
}

// Many rows of one head: K transposed and V widened once for all of them.
inline void attend_many_rows(const Item& item, const Unit& unit, const Unit& next,
                             const PartialRows& out) {
  prefetch_unit(item, next);
  load_k_panels(item, unit.k, unit.count);
  load_v_panels(item, unit.v, unit.count);
  scores_by_panels(item, unit.count);
  softmax(item, 0, unit.first, unit.count, out);
  values_by_panels(item, unit, 0, out);
}

// Few rows of several heads, widened copies: any head size.
inline void attend_few_rows_widened(const Item& item, const Unit& unit, const Unit& next,
                                    const PartialRows& out) {
  prefetch_unit(item, next);
  load_k_rows(item, unit.k, unit.count);
  load_v_panels(item, unit.v, unit.count);
  for (std::int32_t h = 0; h < item.heads; ++h) {
    const PartialRows state = head_of(item, out, h);
    scores_by_dots(item, h, unit.count);
    softmax(item, h, unit.first, unit.count, state);
    values_by_panels(item, unit, h, state);
  }
}

// Few rows of several heads straight from the cache.
inline void attend_few_rows(const Item& item, const Unit& unit, const Unit& next,
                            const PartialRows& out) {
  const AttentionParams& p = *item.params;
  const Scratch& scratch = *item.scratch;
  const DirectKernels k_kernels = direct_kernels(p.k.dtype);
  const DirectKernels v_kernels = direct_kernels(p.v.dtype);
  DirectRows rows;
  for (std::int32_t h = 0; h < item.heads; ++h) {
    const PartialRows state = head_of(item, out, h);
    direct_rows(item, p.k, unit.k, unit.count, next.k, next.count, h, &rows);
    k_kernels.scores(rows, unit.count, scratch.q + std::int64_t{h} * item.head_rows * item.padded_k,
                     item.padded_k, p.layer.head_size, item.rows, scratch.s);
    if (p.k.token_scales != nullptr) {
      scale_columns(rows.scale, unit.count, item.rows, scratch.s);
    }
    softmax(item, h, unit.first, unit.count, state);
    direct_rows(item, p.v, unit.v, unit.count, next.v, next.count, h, &rows);
    if (!seen_by_all(item, unit) && !v_kernels.is_finite(rows, unit.count, p.layer.head_size_v)) {
      seen_values(item, unit, rows, state);
      continue;
    }
    if (p.v.token_scales != nullptr) {
      scale_columns(rows.scale, unit.count, item.rows, scratch.s);
    }
    v_kernels.values(rows, unit.count, p.layer.head_size_v, item.rows, scratch.s, scratch.alpha,
                     state.o, item.padded_v);
  }
}

inline void run_chunk(const Item& item, std::int32_t unit_begin, std::int32_t unit_end,
                      const PartialRows& out) {
  const WorkTile& tile = *item.tile;
  const LayerParams& layer = item.params->layer;
  const bool direct = layer.head_size % kVec == 0 && layer.head_size_v % kVec == 0;
  const auto attend = !tile.few_rows ? attend_many_rows
                      : direct       ? attend_few_rows
                                     : attend_few_rows_widened;
  // The unit after the chunk's last one is asked for too: the next chunk is most often ours.
  const std::int32_t num_units = tile.units.count();
  Unit units[2];
  const auto resolve = [&](std::int32_t u) {
    Unit& unit = units[u & 1];
    unit.count = 0;
    if (u >= num_units) return;
    const std::int64_t begin = std::int64_t{tile.units.at(u)} * tile.kv_tile;
    const std::int64_t end = std::min(begin + tile.kv_tile, item.hull_end);
    unit.first = std::max(begin, item.hull_begin);
    unit.count = static_cast<std::int32_t>(std::max<std::int64_t>(end - unit.first, 0));
    resolve_rows(item, item.params->k, unit.first, unit.count, &unit.k);
    resolve_rows(item, item.params->v, unit.first, unit.count, &unit.v);
  };
  clear(item, out);
  resolve(unit_begin);
  if (item.cold) prefetch_unit(item, units[unit_begin & 1]);
  for (std::int32_t u = unit_begin; u < unit_end; ++u) {
    resolve(u + 1);
    const Unit& unit = units[u & 1];
    // Units ascend: the first one past every key that exists is the last to look at.
    if (unit.count == 0) break;
    attend(item, unit, units[(u + 1) & 1], out);
  }
}

// into[0, size) = into * weight_into + part * weight_part
HWY_INLINE void weighted_sum(float* into, float weight_into, const float* part, float weight_part,
                             std::int32_t size) {
  const Df d;
  const Vf wi = hn::Set(d, weight_into);
  const Vf wp = hn::Set(d, weight_part);
  for (std::int32_t i = 0; i < size; i += kVec) {
    const Vf sum = hn::MulAdd(hn::LoadU(d, part + i), wp, hn::Mul(hn::LoadU(d, into + i), wi));
    hn::StoreU(sum, d, into + i);
  }
}

inline void fold(const PartialRows& into, const PartialRows& part, std::int32_t rows,
                 std::int64_t padded_v) {
  for (std::int32_t r = 0; r < rows; ++r) {
    const auto merged = semantics::merge(semantics::SoftmaxState<float>{into.max[r], into.sum[r]},
                                         semantics::SoftmaxState<float>{part.max[r], part.sum[r]});
    const std::int64_t row = static_cast<std::int64_t>(r) * padded_v;
    weighted_sum(into.o + row, merged.weight_a, part.o + row, merged.weight_b, padded_v);
    into.max[r] = merged.state.max;
    into.sum[r] = merged.state.sum;
  }
}

inline void store_row(const float* from, std::int64_t size, float scale, float divisor, void* to,
                      DType dtype) {
  const Df d;
  const hn::RebindToUnsigned<Df> du;
  const hn::Rebind<std::uint16_t, Df> d16;
  const hn::Rebind<hwy::float16_t, Df> df16;
  const Vf factor = hn::Set(d, scale);
  std::int64_t i = 0;
  const std::int64_t whole = size - size % kVec;
  if (dtype == DType::kFloat32) {
    for (; i < whole; i += kVec) {
      hn::StoreU(hn::Mul(hn::LoadU(d, from + i), factor), d, static_cast<float*>(to) + i);
    }
  } else if (dtype == DType::kFloat16 && HWY_TARGET != HWY_SCALAR) {  // see load_widened
    for (; i < whole; i += kVec) {
      hn::StoreU(hn::DemoteTo(df16, hn::Mul(hn::LoadU(d, from + i), factor)), df16,
                 static_cast<hwy::float16_t*>(to) + i);
    }
  } else if (dtype == DType::kBFloat16) {
    for (; i < whole; i += kVec) {
      const Vf x = hn::Mul(hn::LoadU(d, from + i), factor);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
      const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF)));
      const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
      const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
      const auto code = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<Df>(), code)), d16,
                 static_cast<std::uint16_t*>(to) + i);
    }
  }
  for (; i < size; ++i) semantics::store_element(to, dtype, i, from[i] * scale / divisor);
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
