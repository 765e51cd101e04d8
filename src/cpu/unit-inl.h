// A unit of keys: its rows found through the block table, widened into scratch tiles, or handed to
// the direct path; and asking memory for the next one.
#if defined(QUIRE_CPU_UNIT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_UNIT_INL_H_
#undef QUIRE_CPU_UNIT_INL_H_
#else
#define QUIRE_CPU_UNIT_INL_H_
#endif

#include <algorithm>

#include "cpu/few_rows-inl.h"
#include "cpu/kernels.h"
#include "cpu/product-inl.h"
#include "cpu/simd/vec-inl.h"
#include "semantics/kv_address.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// The rows of keys [first, first + count) of one side, at the item's first head. A null row reads
// as zeros.
struct UnitRows {
  const char* row[kMaxKvTile];
  const float* scale[kMaxKvTile];  // null: 1
};

// A unit of keys, resolved.
struct Unit {
  std::int64_t first = 0;
  std::int32_t count = 0;
  UnitRows k;
  UnitRows v;
};

HWY_INLINE void resolve_rows(const Item& item, const KvParams& kv, std::int64_t first,
                             std::int32_t count, UnitRows* out) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const std::int64_t element = size_of(kv.dtype);
  const auto set = [&](std::int32_t t, std::int64_t block, std::int64_t slot) {
    const std::int64_t offset = semantics::cache_offset(kv.strides, block, slot, item.kv_head);
    out->row[t] = static_cast<const char*>(kv.data) + offset * element;
    out->scale[t] = kv.token_scales == nullptr
                        ? nullptr
                        : kv.token_scales + semantics::cache_offset(kv.token_scale_strides, block,
                                                                    slot, item.kv_head);
  };
  if (!layer.paged) {
    for (std::int32_t t = 0; t < count; ++t) set(t, 0, item.first_kv_row + first + t);
    return;
  }
  const std::int32_t* table = p.batch.block_table + item.tile->seq * p.batch.table_stride;
  std::int64_t logical = first / layer.block_size;
  std::int64_t slot = first % layer.block_size;
  std::int64_t block = semantics::physical_block(table, p.batch.table_width, logical, p.num_blocks);
  for (std::int32_t t = 0; t < count; ++t) {
    if (block >= 0) {
      set(t, block, slot);
    } else {
      out->row[t] = nullptr;
      out->scale[t] = nullptr;
    }
    if (++slot == layer.block_size) {
      slot = 0;
      block = semantics::physical_block(table, p.batch.table_width, ++logical, p.num_blocks);
    }
  }
}

// One side's way from stored rows to fp32.
class Widener {
 public:
  explicit Widener(const KvParams& kv)
      : widen_(widener(kv.dtype)),
        element_bytes_(size_of(kv.dtype)),
        head_bytes_(kv.strides.head * element_bytes_),
        scale_head_stride_(kv.token_scale_strides.head) {}

  // to[0, padded) = elements [from, from + size) of row t and head h, zeros behind.
  HWY_INLINE void operator()(const UnitRows& rows, std::int32_t t, std::int32_t h,
                             std::int32_t from, std::int32_t size, float* to,
                             std::int32_t padded) const {
    if (rows.row[t] == nullptr) {
      std::fill(to, to + padded, 0.0F);
      return;
    }
    const float scale = rows.scale[t] == nullptr ? 1.0F : rows.scale[t][h * scale_head_stride_];
    widen_(rows.row[t] + h * head_bytes_ + from * element_bytes_, size, scale, to, padded);
  }

 private:
  WidenRow widen_;
  std::int64_t element_bytes_;
  std::int64_t head_bytes_;
  std::int64_t scale_head_stride_;
};

// K rows as they lie, [heads][kv_tile][padded_k], in memory order: all heads of a key, then the
// next key. Keys up to a whole vector are zeros.
HWY_INLINE void load_k_rows(const Item& item, const UnitRows& rows, std::int32_t count) {
  const Widener widen(item.params->k);
  const std::int64_t head_stride = std::int64_t{item.tile->kv_tile} * item.padded_k;
  const auto padded_count = static_cast<std::int32_t>(round_up(count, kVec));
  for (std::int32_t t = 0; t < padded_count; ++t) {
    for (std::int32_t h = 0; h < item.heads; ++h) {
      float* to = item.scratch->k + h * head_stride + std::int64_t{t} * item.padded_k;
      if (t < count) {
        widen(rows, t, h, 0, item.params->layer.head_size, to, item.padded_k);
      } else {
        std::fill(to, to + item.padded_k, 0.0F);
      }
    }
  }
}

// K of one head transposed into panels: [key panel][padded_k][kPanel].
HWY_INLINE void load_k_panels(const Item& item, const UnitRows& rows, std::int32_t count) {
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

// V in panels, in memory order: [heads][output panel][kv_tile][kPanel].
HWY_INLINE void load_v_panels(const Item& item, const UnitRows& rows, std::int32_t count) {
  const Widener widen(item.params->v);
  const std::int32_t size = item.params->layer.head_size_v;
  const std::int64_t panel_stride = std::int64_t{item.tile->kv_tile} * kPanel;
  const std::int64_t head_stride = std::int64_t{item.tile->kv_tile} * item.padded_v;
  for (std::int32_t t = 0; t < count; ++t) {
    for (std::int32_t h = 0; h < item.heads; ++h) {
      float* to = item.scratch->v + h * head_stride + std::int64_t{t} * kPanel;
      for (std::int32_t i = 0; i < size; i += kPanel, to += panel_stride) {
        widen(rows, t, h, i, std::min(static_cast<std::int32_t>(kPanel), size - i), to, kPanel);
      }
    }
  }
}

// One head's rows of a unit for the direct path. While it uses its n-th row (heads outermost), it
// asks for the n-th row of `next` in memory order (keys outermost); next_count 0: for nothing.
HWY_INLINE void direct_rows(const Item& item, const KvParams& kv, const UnitRows& rows,
                            std::int32_t count, const UnitRows& next, std::int32_t next_count,
                            std::int32_t h, DirectRows* out) {
  const std::int64_t head_bytes = kv.strides.head * size_of(kv.dtype);
  const auto padded = static_cast<std::int32_t>(round_up(count, kVec));
  std::int32_t next_key = h * count / item.heads;
  std::int32_t next_head = h * count % item.heads;
  for (std::int32_t t = 0; t < padded; ++t) {
    const bool exists = t < count && rows.row[t] != nullptr;
    out->row[t] = exists ? rows.row[t] + h * head_bytes : kZeroRow;
    out->scale[t] =
        exists && rows.scale[t] != nullptr ? rows.scale[t][h * kv.token_scale_strides.head] : 1.0F;
    const bool ask = next_key < next_count && next.row[next_key] != nullptr;
    out->ahead[t] = ask ? next.row[next_key] + next_head * head_bytes : kZeroRow;
    if (++next_head == item.heads) {
      next_head = 0;
      ++next_key;
    }
  }
}

// Asks for a whole unit at once, in memory order: right where computing takes much longer than
// loading, and for the first unit of an item, which nobody has asked for before.
HWY_INLINE void prefetch_rows(const Item& item, const KvParams& kv, std::int32_t size,
                              const UnitRows& rows, std::int32_t count) {
  const std::int64_t element = size_of(kv.dtype);
  for (std::int32_t t = 0; t < count; ++t) {
    if (rows.row[t] == nullptr) continue;
    for (std::int32_t h = 0; h < item.heads; ++h) {
      const char* row = rows.row[t] + h * kv.strides.head * element;
      for (std::int64_t byte = 0; byte < size * element; byte += 64) {
        __builtin_prefetch(row + byte, 0, 2);
      }
    }
  }
}

HWY_INLINE void prefetch_unit(const Item& item, const Unit& unit) {
  const AttentionParams& p = *item.params;
  prefetch_rows(item, p.k, p.layer.head_size, unit.k, unit.count);
  prefetch_rows(item, p.v, p.layer.head_size_v, unit.v, unit.count);
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
