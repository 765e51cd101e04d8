// A kv tile: the keys of one step. Finds its rows through the block table, widens them to fp32 or
// hands them to decode as they are stored, and prefetches the next kv tile.
#if defined(QUIRE_CPU_KV_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_KV_TILE_INL_H_
#undef QUIRE_CPU_KV_TILE_INL_H_
#else
#define QUIRE_CPU_KV_TILE_INL_H_
#endif

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd/vec-inl.h"
#include "semantics/kv_address.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// K or V of a kv tile: where the rows of its keys lie, at the item's first kv head.
struct KvTileRows {
  const char* row[kMaxKvTile];     // null: in an unmapped block, reads as zeros
  const float* scale[kMaxKvTile];  // null: 1
};

// The keys [first, first + count).
struct KvTile {
  std::int64_t first = 0;
  std::int32_t count = 0;
  KvTileRows k;
  KvTileRows v;
};

HWY_INLINE void resolve_rows(const WorkItem& item, const KvParams& kv, std::int64_t first,
                             std::int32_t count, KvTileRows* out) {
  const AttentionParams& p = *item.params;
  const LayerParams& layer = p.layer;
  const std::int64_t element = size_of(kv.dtype);
  const auto set = [&](std::int32_t t, std::int64_t block, std::int64_t slot) {
    const std::int64_t offset =
        semantics::cache_offset(kv.strides, block, slot, item.first_kv_head);
    out->row[t] = static_cast<const char*>(kv.data) + offset * element;
    out->scale[t] = kv.token_scales == nullptr
                        ? nullptr
                        : kv.token_scales + semantics::cache_offset(kv.token_scale_strides, block,
                                                                    slot, item.first_kv_head);
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

// The bytes of so many elements of a row.
HWY_INLINE std::int64_t row_bytes(DType dtype, std::int64_t elements) {
  return dtype == semantics::kInt4 ? elements / 2 : elements * size_of(dtype);
}

// Stored rows of K or V to fp32.
class Widener {
 public:
  explicit Widener(const KvParams& kv)
      : widen_(widener(kv.dtype)),
        dtype_(kv.dtype),
        head_bytes_(kv.strides.head * size_of(kv.dtype)),
        scale_head_stride_(kv.token_scale_strides.head) {}

  // to[0, padded) = elements [from, from + size) of row t and kv head h of the item, then zeros.
  // `from` is even.
  HWY_INLINE void operator()(const KvTileRows& rows, std::int32_t t, std::int32_t h,
                             std::int32_t from, std::int32_t size, float* to,
                             std::int32_t padded) const {
    if (rows.row[t] == nullptr) {
      std::fill(to, to + padded, 0.0F);
      return;
    }
    const float scale = rows.scale[t] == nullptr ? 1.0F : rows.scale[t][h * scale_head_stride_];
    widen_(rows.row[t] + h * head_bytes_ + row_bytes(dtype_, from), size, scale, to, padded);
  }

 private:
  WidenRow widen_;
  DType dtype_;
  std::int64_t head_bytes_;
  std::int64_t scale_head_stride_;
};

// Read in place of rows in unmapped blocks: zeros, as long as the longest row.
inline constexpr char kZeroRow[576 * sizeof(float)] = {};

// K or V of a kv tile and one kv head as they are stored.
struct StoredRows {
  const void* row[kMaxKvTile];  // kZeroRow in unmapped blocks
  alignas(64) float scale[kMaxKvTile];
  const char* prefetch[kMaxKvTile];  // a row of the next kv tile, to prefetch while row t is used
};

// The rows of the item's kv head h. This kv tile is used head by head, but `next` lies in memory
// key by key, so the n-th row used prefetches the n-th of `next` in memory order. Rows behind the
// last, up to a whole vector, are zeros; next_count 0: nothing to prefetch.
HWY_INLINE void stored_rows(const WorkItem& item, const KvParams& kv, const KvTileRows& rows,
                            std::int32_t count, const KvTileRows& next, std::int32_t next_count,
                            std::int32_t h, StoredRows* out) {
  const std::int64_t head_bytes = kv.strides.head * size_of(kv.dtype);
  const auto padded = static_cast<std::int32_t>(round_up(count, kVec));
  std::int32_t next_key = h * count / item.kv_heads;
  std::int32_t next_head = h * count % item.kv_heads;
  for (std::int32_t t = 0; t < padded; ++t) {
    const bool mapped = t < count && rows.row[t] != nullptr;
    out->row[t] = mapped ? rows.row[t] + h * head_bytes : kZeroRow;
    out->scale[t] =
        mapped && rows.scale[t] != nullptr ? rows.scale[t][h * kv.token_scale_strides.head] : 1.0F;
    const bool has_next = next_key < next_count && next.row[next_key] != nullptr;
    out->prefetch[t] = has_next ? next.row[next_key] + next_head * head_bytes : kZeroRow;
    if (++next_head == item.kv_heads) {
      next_head = 0;
      ++next_key;
    }
  }
}

// Prefetches all rows at once, in memory order: for prefill, where computing takes much longer than
// loading, and for an item's first kv tile, since no step before it could prefetch it.
HWY_INLINE void prefetch_rows(const WorkItem& item, const KvParams& kv, std::int32_t size,
                              const KvTileRows& rows, std::int32_t count) {
  const std::int64_t head_bytes = kv.strides.head * size_of(kv.dtype);
  const std::int64_t bytes = row_bytes(kv.dtype, size);
  for (std::int32_t t = 0; t < count; ++t) {
    if (rows.row[t] == nullptr) continue;
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      const char* row = rows.row[t] + h * head_bytes;
      for (std::int64_t byte = 0; byte < bytes; byte += 64) {
        __builtin_prefetch(row + byte, 0, 2);
      }
    }
  }
}

HWY_INLINE void prefetch_kv_tile(const WorkItem& item, const KvTile& kv_tile) {
  const AttentionParams& p = *item.params;
  prefetch_rows(item, p.k, p.layer.head_size, kv_tile.k, kv_tile.count);
  prefetch_rows(item, p.v, p.layer.head_size_v, kv_tile.v, kv_tile.count);
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
