// P V of a unit in which some row does not see some key.
//
// A key that a row does not see has weight 0 there, and 0 * NaN is NaN: a value, or its scale, that
// is not finite must be left out, not multiplied. Units that every row sees whole cannot have this;
// in the others V is looked through once, and only if something was found each row takes its own
// keys alone, which is slow and gives every row the bits that the fast way gives it otherwise.
#if defined(QUIRE_CPU_MASKED_VALUES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_MASKED_VALUES_INL_H_
#undef QUIRE_CPU_MASKED_VALUES_INL_H_
#else
#define QUIRE_CPU_MASKED_VALUES_INL_H_
#endif

#include <limits>

#include "cpu/few_rows-inl.h"
#include "cpu/kernels.h"
#include "cpu/product-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/unit-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

HWY_INLINE bool seen_by_all(const Item& item, const Unit& unit) {
  const std::int64_t end = unit.first + unit.count;
  const auto holds_unit = [&](const semantics::Span& span) {
    return span.begin <= unit.first && end <= span.end;
  };
  return holds_unit(item.common.main) || holds_unit(item.common.prefix);
}

// By the mask, and by a query-query bias of -inf.
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

// One head's V of a unit in panels (load_v_panels).
struct ValuePanels {
  const float* data;
  std::int64_t stride;  // of panels
  std::int32_t count;
};

HWY_INLINE ValuePanels value_panels(const Item& item, std::int32_t h) {
  const std::int64_t kv_tile = item.tile->kv_tile;
  return {item.scratch->v + h * kv_tile * item.padded_v, kv_tile * kPanel,
          static_cast<std::int32_t>((item.params->layer.head_size_v + kPanel - 1) / kPanel)};
}

inline bool is_finite(const ValuePanels& panels, std::int32_t keys) {
  const Df d;
  MagnitudeBits greatest = hn::Zero(hn::RebindToUnsigned<Df>());
  for (std::int32_t p = 0; p < panels.count; ++p) {
    const float* panel = panels.data + p * panels.stride;
    for (std::int64_t i = 0; i < keys * kPanel; i += kVec) {
      greatest = greater_magnitude(greatest, hn::Load(d, panel + i));
    }
  }
  return is_finite(greatest);
}

// Every row over each run of keys that it sees.
HWY_NOINLINE inline void seen_values_by_panels(const Item& item, const Unit& unit,
                                               const ValuePanels& panels,
                                               const PartialRows& state) {
  const Scratch& scratch = *item.scratch;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = scratch.tokens[r / item.params->layer.group];
    const float* s = scratch.s + r * kMaxKvTile;
    const auto add = [&](std::int32_t begin, std::int32_t end, float alpha) {
      rows_times_panels<Meet::kRescale>(s + begin, kMaxKvTile, panels.data + begin * kPanel,
                                        panels.stride, panels.count, end - begin,
                                        state.o + r * item.padded_v, item.padded_v, 1, &alpha);
    };
    add(0, 0, scratch.alpha[r]);
    for (std::int32_t t = 0; t < unit.count; ++t) {
      const std::int32_t begin = t;
      while (t < unit.count && sees(item.params->batch, token, unit.first + t)) ++t;
      if (t > begin) add(begin, t, 1.0F);
    }
  }
}

// Every row over V straight from the cache, with zeros for the keys that it does not see.
HWY_NOINLINE inline void seen_values(const Item& item, const Unit& unit, const DirectRows& values,
                                     const PartialRows& state) {
  const AttentionParams& p = *item.params;
  const Scratch& scratch = *item.scratch;
  const DirectKernels kernels = direct_kernels(p.v.dtype);
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = scratch.tokens[r / p.layer.group];
    DirectRows seen = values;
    for (std::int32_t t = 0; t < unit.count; ++t) {
      if (sees(p.batch, token, unit.first + t)) continue;
      seen.row[t] = kZeroRow;
      seen.scale[t] = 1.0F;
    }
    float* s = scratch.s + r * kMaxKvTile;
    if (p.v.token_scales != nullptr) scale_columns(seen.scale, unit.count, 1, s);
    kernels.values(seen, unit.count, p.layer.head_size_v, 1, s, scratch.alpha + r,
                   state.o + r * item.padded_v, item.padded_v);
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
