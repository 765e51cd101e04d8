// The rows of a work tile: which token and head each is, and what it sees.
#pragma once

#include <cstdint>

#include "cuda/kernel/work_iterator.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "semantics/quant.h"

namespace quire::cuda {

// The keys of a tile that may be read: those below kv_len, but for [out_of_window_begin,
// out_of_window_end). No row of the tile sees any other. Keys that no row of the sequence sees
// (before every window, between a visible prefix and the windows, behind the last row's window) may
// lie in blocks that have been freed and hold NaN, which a weight of 0 does not hide: they read as
// zeros.
struct LoadableKeys {
  std::int32_t kv_len;
  std::int32_t out_of_window_begin;
  std::int32_t out_of_window_end;
};

// In shared memory.
template <int kRows>
struct RowTable {
  int4 visible[kRows];           // prefix begin, end, main begin, end
  std::int32_t position[kRows];  // counted from key 0's
  std::int32_t token[kRows];
  std::int32_t head[kRows];
  std::int32_t query_index[kRows];
  float slope[kRows];
  float sink[kRows];                   // if there are sinks; see fill_rows
  alignas(16) std::int32_t common[4];  // spans that all rows see
  LoadableKeys keys;
  std::int32_t kv_stride;  // from a key's position to the next one's
  __device__ __forceinline__ bool may_read(std::int32_t key) const {
    return key < keys.kv_len && (key < keys.out_of_window_begin || key >= keys.out_of_window_end);
  }
};

using semantics::value_of;

__device__ __forceinline__ std::int32_t keys_of(const KernelParams& p, const WorkTile& tile) {
  if (p.layer.paged) return tile.kv_len;
  return static_cast<std::int32_t>(
      semantics::max_of(semantics::min_of(tile.kv_len, p.num_kv_tokens - tile.first_kv_row), 0));
}

__device__ __forceinline__ LoadableKeys loadable_keys(const KernelParams& p, const WorkTile& tile) {
  const std::int32_t kv_len = min(keys_of(p, tile), tile.visible_end);
  return {kv_len, tile.out_of_window_begin, min(tile.out_of_window_end, kv_len)};
}

// What becomes of the 16-bit elements of queries, two a word, where the factor of their scores is
// below 0 (kernels multiply by its magnitude) or NaN (which in the factor would also turn the -inf
// of keys that a row does not see into NaN).
struct QueryChange {
  std::uint32_t flip = 0;
  std::uint32_t set = 0;
  __device__ bool any() const { return (flip | set) != 0; }
  __device__ std::uint32_t operator()(std::uint32_t word) const { return (word ^ flip) | set; }
};

__device__ __forceinline__ QueryChange query_change(const KernelParams& p) {
  const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
  return {scale < 0 ? 0x80008000U : 0U, isnan(scale) ? 0x7FFF7FFFU : 0U};
}

// Which token (row of the query; of the tile, from 0) and query head row `r` is.
struct RowPlace {
  std::int64_t token;
  std::int64_t head;
  std::int32_t index;
};

__device__ __forceinline__ RowPlace row_place(const KernelParams& p, const WorkTile& tile,
                                              std::int32_t kv_head, int r) {
  const int packed = tile.first_sub + min(r, tile.rows - 1);
  const int index = packed / p.layer.group;
  return {tile.first_token + index, kv_head * p.layer.group + (packed - index * p.layer.group),
          index};
}

__device__ __forceinline__ int4 visible_keys(const semantics::Spans& spans) {
  return make_int4(static_cast<int>(spans.prefix.begin), static_cast<int>(spans.prefix.end),
                   static_cast<int>(spans.main.begin), static_cast<int>(spans.main.end));
}

// Fills the table for a split; callers wait for this thread's copies (sinks) and synchronise after
// it. Rows of a shared prefix are of several sequences: its keys come before all of their rows and
// there is no window (FamilyPlan::cascade_rule), so every row sees them all.
template <class Team, int kRows>
__device__ __forceinline__ void fill_row_table(const KernelParams& p, const Split& split,
                                               std::int32_t kv_head, RowTable<kRows>& table) {
  const WorkTile& tile = split.tile;
  const SharedRow* shared_rows = p.schedule.shared_rows;
  const std::int32_t kv_len = keys_of(p, tile);
  const int4 common = make_int4(tile.common[0], min(tile.common[1], kv_len), tile.common[2],
                                min(tile.common[3], kv_len));
  const std::int32_t key_0 = p.batch.kv_offset != nullptr ? p.batch.kv_offset[tile.seq] : 0;
  const bool all_alike = shared_rows != nullptr || tile.first_sub + tile.rows <= p.layer.group;
  for (int r = Team::thread(); r < kRows; r += Team::kSize) {
    RowPlace place = row_place(p, tile, kv_head, r);
    std::int32_t position = tile.first_pos + place.index;
    if (shared_rows != nullptr) {
      place.token = shared_rows[tile.prefix_row + place.index].token;
      position = shared_rows[tile.prefix_row + place.index].position;
    }
    int4 visible = common;
    if (!all_alike) {
      const semantics::SequenceMask mask = sequence_mask(p.layer, p.batch, tile.seq, kv_len);
      visible = visible_keys(clip(semantics::row_spans(mask, position), tile.kv_begin, kv_len));
    }
    table.visible[r] = r < tile.rows ? visible : make_int4(0, 0, 0, 0);
    table.position[r] = static_cast<std::int32_t>(static_cast<std::uint32_t>(position) -
                                                  static_cast<std::uint32_t>(key_0));
    table.token[r] = static_cast<std::int32_t>(place.token);
    table.head[r] = static_cast<std::int32_t>(place.head);
    table.query_index[r] = tile.first_index + place.index;
    table.slope[r] = p.layer.alibi_slopes != nullptr ? p.layer.alibi_slopes[place.head] : 0.0F;
    if (p.layer.sinks != nullptr) {
      ptx::copy_async<4>(ptx::shared_address(&table.sink[r]), p.layer.sinks + place.head, 4);
    }
  }
  if (Team::thread() == Team::kSize - 1) {
    *reinterpret_cast<int4*>(table.common) = common;
    table.keys = loadable_keys(p, tile);
    table.kv_stride = p.batch.kv_stride != nullptr ? max(p.batch.kv_stride[tile.seq], 1) : 1;
  }
}

// The same out of line, for kernels where its registers would be taken from others.
template <class Team, int kRows>
__device__ __noinline__ void fill_rows(const KernelParams& p, const Split& split,
                                       std::int32_t kv_head, RowTable<kRows>& table) {
  fill_row_table<Team>(p, split, kv_head, table);
}

__device__ __forceinline__ bool sees(const int4& visible, int j) {
  // Without short circuits: no branches.
  return (static_cast<int>(j >= visible.x) & static_cast<int>(j < visible.y)) |
         (static_cast<int>(j >= visible.z) & static_cast<int>(j < visible.w));
}

}  // namespace quire::cuda
