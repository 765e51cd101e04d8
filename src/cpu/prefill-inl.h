// Prefill: many rows of one kv head, compute-bound.
//
//   K transposed and V widened into fp32 panels once per kv tile, for all rows;
//   S = Q K^T and O = alpha O + P V by the micro-kernel of gemm-inl.h
#if defined(QUIRE_CPU_PREFILL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_PREFILL_INL_H_
#undef QUIRE_CPU_PREFILL_INL_H_
#else
#define QUIRE_CPU_PREFILL_INL_H_
#endif

#include <algorithm>

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// K of one kv head as fp32, transposed into panels: [panel of keys][padded_k][kPanel]. Keys up to a
// whole panel are zeros.
HWY_INLINE void load_k_panels(const WorkItem& item, const KvTileRows& rows, std::int32_t count) {
  const Df d;
  const Widener widen(item.params->k);
  float* staging = item.scratch->staging;
  const auto padded_count = static_cast<std::int32_t>(round_up(count, kPanel));
  for (std::int32_t first = 0; first < padded_count; first += kVec) {
    for (std::int32_t t = 0; t < kVec; ++t) {
      float* to = staging + t * item.padded_k;
      if (first + t < count) {
        widen(rows, first + t, 0, 0, item.params->layer.head_size, to, item.padded_k);
      } else {
        std::fill(to, to + item.padded_k, 0.0F);
      }
    }
    float* panel = item.scratch->k +
                   static_cast<std::int64_t>(first / kPanel) * item.padded_k * kPanel +
                   first % kPanel;
    for (std::int32_t i = 0; i < item.padded_k; i += kVec) {
      Vf block[kLanes];
      HWY_UNROLL(16)
      for (std::int32_t t = 0; t < kVec; ++t) {
        block[t] = hn::LoadU(d, staging + t * item.padded_k + i);
      }
      transpose(block);
      HWY_UNROLL(16)
      for (std::int32_t r = 0; r < kVec; ++r) hn::StoreU(block[r], d, panel + (i + r) * kPanel);
    }
  }
}

// V as fp32 in panels, [kv_heads][panel of head_size_v][kv_tile][kPanel]. Reads in memory order:
// all heads of a key, then the next key.
HWY_INLINE void load_v_panels(const WorkItem& item, const KvTileRows& rows, std::int32_t count) {
  const Widener widen(item.params->v);
  const std::int32_t size = item.params->layer.head_size_v;
  const std::int64_t panel_stride = std::int64_t{item.tile->kv_tile} * kPanel;
  const std::int64_t head_stride = std::int64_t{item.tile->kv_tile} * item.padded_v;
  for (std::int32_t t = 0; t < count; ++t) {
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      float* to = item.scratch->v + h * head_stride + std::int64_t{t} * kPanel;
      for (std::int32_t i = 0; i < size; i += kPanel, to += panel_stride) {
        widen(rows, t, h, i, std::min(static_cast<std::int32_t>(kPanel), size - i), to, kPanel);
      }
    }
  }
}

// Dot products of long head sizes are summed in parts of at most this many products: rounding
// errors grow with the length of a chain of additions, and what a logit is off by, its weight is
// off by as a part of itself.
constexpr std::int32_t kMostDepth = 128;

HWY_INLINE void scores_by_panels(const WorkItem& item, std::int32_t count) {
  const Scratch& scratch = *item.scratch;
  const std::int32_t size = item.params->layer.head_size;
  const std::int64_t stride = static_cast<std::int64_t>(item.padded_k) * kPanel;
  const std::int32_t num_panels = (count + kPanel - 1) / kPanel;
  const std::int32_t num_parts = (size + kMostDepth - 1) / kMostDepth;
  const std::int32_t part = (size + num_parts - 1) / num_parts;
  for (std::int32_t i = 0; i < size; i += part) {
    const auto run = i == 0 ? gemm<Update::kStore> : gemm<Update::kAdd>;
    run(scratch.q + i, item.padded_k, scratch.k + std::int64_t{i} * kPanel, stride, num_panels,
        std::min(part, size - i), scratch.s, kMaxKvTile, item.rows, nullptr);
  }
}

// V of one kv head in panels (load_v_panels).
struct ValuePanels {
  const float* data;
  std::int64_t stride;  // of panels
  std::int32_t count;
};

HWY_INLINE ValuePanels value_panels(const WorkItem& item, std::int32_t h) {
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

// P V row by row, over each run of keys that the row sees.
HWY_NOINLINE inline void masked_values_by_panels(const WorkItem& item, const KvTile& kv_tile,
                                                 const ValuePanels& panels, const Partial& state) {
  const Scratch& scratch = *item.scratch;
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = scratch.tokens[r / item.params->layer.group];
    const float* s = scratch.s + r * kMaxKvTile;
    const auto add = [&](std::int32_t begin, std::int32_t end, float alpha) {
      gemm<Update::kRescale>(s + begin, kMaxKvTile, panels.data + begin * kPanel, panels.stride,
                             panels.count, end - begin, state.o + r * item.padded_v, item.padded_v,
                             1, &alpha);
    };
    add(0, 0, scratch.alpha[r]);
    for (std::int32_t t = 0; t < kv_tile.count; ++t) {
      const std::int32_t begin = t;
      while (t < kv_tile.count && sees(item.params->batch, token, kv_tile.first + t)) ++t;
      if (t > begin) add(begin, t, 1.0F);
    }
  }
}

HWY_INLINE void values_by_panels(const WorkItem& item, const KvTile& kv_tile, std::int32_t h,
                                 const Partial& state) {
  const ValuePanels panels = value_panels(item, h);
  if (!seen_by_all(item, kv_tile) && !is_finite(panels, kv_tile.count)) {
    return masked_values_by_panels(item, kv_tile, panels, state);
  }
  gemm<Update::kRescale>(item.scratch->s, kMaxKvTile, panels.data, panels.stride, panels.count,
                         kv_tile.count, state.o, item.padded_v, item.rows, item.scratch->alpha);
}

// One step of an item: one kv head over one kv tile.
inline void attend_prefill(const WorkItem& item, const KvTile& kv_tile, const KvTile& next,
                           const Partial& out) {
  prefetch_kv_tile(item, next);
  load_k_panels(item, kv_tile.k, kv_tile.count);
  load_v_panels(item, kv_tile.v, kv_tile.count);
  scores_by_panels(item, kv_tile.count);
  softmax(item, kv_tile, 0, out);
  values_by_panels(item, kv_tile, 0, out);
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
