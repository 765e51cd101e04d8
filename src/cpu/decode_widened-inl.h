// Decode with head sizes that are not a whole number of vectors, and over int4 caches: K and V of
// all heads of the item are first copied as fp32, padded with zeros. S by dot products, P V by
// panels as in prefill.
#if defined(QUIRE_CPU_DECODE_WIDENED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_DECODE_WIDENED_INL_H_
#undef QUIRE_CPU_DECODE_WIDENED_INL_H_
#else
#define QUIRE_CPU_DECODE_WIDENED_INL_H_
#endif

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/prefill-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// K as fp32 rows, [kv_heads][kv_tile][padded_k]. Reads in memory order: all heads of a key, then
// the next key. Keys up to a whole vector are zeros.
HWY_INLINE void load_k_rows(const WorkItem& item, const KvTileRows& rows, std::int32_t count) {
  const Widener widen(item.params->k);
  const std::int64_t head_stride = std::int64_t{item.tile->kv_tile} * item.padded_k;
  const auto padded_count = static_cast<std::int32_t>(round_up(count, kVec));
  for (std::int32_t t = 0; t < padded_count; ++t) {
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      float* to = item.scratch->k + h * head_stride + std::int64_t{t} * item.padded_k;
      if (t < count) {
        widen(rows, t, h, 0, item.params->layer.head_size, to, item.padded_k);
      } else {
        std::fill(to, to + item.padded_k, 0.0F);
      }
    }
  }
}

// S: kLanes dot products at a time, whose lanes are added up together.
HWY_INLINE void scores_by_dots(const WorkItem& item, std::int32_t h, std::int32_t count) {
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

// One step of an item: all its kv heads over one kv tile.
inline void attend_decode_widened(const WorkItem& item, const KvTile& kv_tile, const KvTile& next,
                                  const Partial& out) {
  prefetch_kv_tile(item, next);
  load_k_rows(item, kv_tile.k, kv_tile.count);
  load_v_panels(item, kv_tile.v, kv_tile.count);
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    const Partial state = head_of(item, out, h);
    scores_by_dots(item, h, kv_tile.count);
    softmax(item, kv_tile, h, state);
    values_by_panels(item, kv_tile, h, state);
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
