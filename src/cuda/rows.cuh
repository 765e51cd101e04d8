// The rows of a query tile: which token and head each is, and what it sees.
#pragma once

#include <cstdint>

#include "cuda/walk.cuh"
#include "semantics/host_device.h"

namespace quire::cuda {

// Scores' number type for semantics/score.inc.
struct FloatOps {
  __device__ float mul(float a, float b) const { return a * b; }
  __device__ float add(float a, float b) const { return a + b; }
  // 1 - 2 / (e^2x + 1): absolute error about 1e-7, unlike tanh.approx's 5e-4 of a cap of 50.
  __device__ float tanh(float x) const { return 1.0F - __fdividef(2.0F, __expf(2.0F * x) + 1.0F); }
  __device__ float sqrt(float x) const { return sqrtf(x); }
  __device__ float max(float a, float b) const { return fmaxf(a, b); }
  __device__ float neg(float a) const { return -a; }
  __device__ float zero() const { return 0.0F; }
};

// As FloatOps, to fp32 precision.
struct ExactFloatOps : FloatOps {
  __device__ float tanh(float x) const { return tanhf(x); }
};

namespace score {
#include "semantics/score.inc"
}

// In shared memory.
template <int kRows>
struct RowTable {
  int4 visible[kRows];  // prefix begin, end, main begin, end
  std::int32_t position[kRows];
  std::int32_t token[kRows];
  std::int32_t head[kRows];
  std::int32_t query_index[kRows];
  float slope[kRows];
  float scale[kRows];      // epilogue: what unnormalised outputs are multiplied with
  std::int32_t common[4];  // spans that all rows see
  std::int32_t kv_len;
  // Keys [hidden_begin, hidden_end) lie in front of every row's window: their blocks may have been
  // freed and hold anything, so they count as absent.
  std::int32_t hidden_begin;
  std::int32_t hidden_end;
  __device__ __forceinline__ bool may_read(std::int32_t key) const {
    return key < kv_len && (key < hidden_begin || key >= hidden_end);
  }
};

__device__ __forceinline__ float value_of(const Scale& scale) {
  return scale.data != nullptr ? *scale.data : scale.value;
}

__device__ __forceinline__ std::int32_t keys_of(const KernelParams& p, const Tile& tile) {
  if (p.layer.paged) return tile.kv_len;
  return static_cast<std::int32_t>(semantics::max_of(
      semantics::min_of(tile.kv_len, p.call.num_kv_tokens - tile.first_kv_row), 0));
}

// Rows of several sequences over the keys that they share. Those lie in everybody's past and there
// is no window (CudaPlan::shares): every row sees them all, and query-query bias is about later keys.
template <int kRows, int kThreads>
__device__ __forceinline__ void fill_shared_rows(const KernelParams& p, const Segment& segment,
                                                 std::int32_t kv_head, RowTable<kRows>& table) {
  const Tile& tile = segment.tile;
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += kThreads) {
    const int packed = tile.first_sub + min(r, tile.rows - 1);
    const SharedRow row = p.schedule.shared_rows[tile.seed + packed / p.layer.group];
    table.visible[r] = make_int4(0, 0, 0, r < tile.rows ? tile.kv_len : 0);
    table.position[r] = row.position;
    table.token[r] = row.token;
    table.head[r] = kv_head * p.layer.group + packed % p.layer.group;
    table.query_index[r] = 0;
    table.slope[r] = p.layer.alibi_slopes != nullptr ? p.layer.alibi_slopes[table.head[r]] : 0.0F;
  }
  if (threadIdx.x == kThreads - 1) {
    table.common[0] = table.common[1] = table.common[2] = 0;
    table.common[3] = table.kv_len = tile.kv_len;
    table.hidden_begin = table.hidden_end = 0;
  }
}

// Fills the table for a segment; callers synchronise after it.
template <int kRows, int kThreads>
__device__ __noinline__ void fill_rows(const KernelParams& p, const Segment& segment,
                                       std::int32_t kv_head, RowTable<kRows>& table) {
  if (p.schedule.shared_rows != nullptr) {
    fill_shared_rows<kRows, kThreads>(p, segment, kv_head, table);
    return;
  }
  const Tile& tile = segment.tile;
  const std::int32_t kv_len = keys_of(p, tile);
  const semantics::SequenceMask mask = sequence_mask(p.layer, p.batch, tile.seq, kv_len);
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += kThreads) {
    const int packed = tile.first_sub + min(r, tile.rows - 1);
    const int token = packed / p.layer.group;
    const std::int64_t position = tile.first_pos + token;
    const semantics::Spans spans =
        clip(semantics::row_spans(mask, position), tile.kv_begin, kv_len);
    table.visible[r] =
        r < tile.rows
            ? make_int4(static_cast<int>(spans.prefix.begin), static_cast<int>(spans.prefix.end),
                        static_cast<int>(spans.main.begin), static_cast<int>(spans.main.end))
            : make_int4(0, 0, 0, 0);
    table.position[r] = static_cast<std::int32_t>(position);
    table.token[r] = static_cast<std::int32_t>(tile.first_token + token);
    table.head[r] = kv_head * p.layer.group + packed % p.layer.group;
    table.query_index[r] = tile.first_index + token;
    table.slope[r] = p.layer.alibi_slopes != nullptr ? p.layer.alibi_slopes[table.head[r]] : 0.0F;
  }
  if (threadIdx.x == kThreads - 1) {
    const int last = (tile.first_sub + tile.rows - 1) / p.layer.group;
    const semantics::Spans spans =
        clip(semantics::common_spans(mask, tile.first_pos, tile.first_pos + last), tile.kv_begin,
             kv_len);
    table.common[0] = static_cast<std::int32_t>(spans.prefix.begin);
    table.common[1] = static_cast<std::int32_t>(spans.prefix.end);
    table.common[2] = static_cast<std::int32_t>(spans.main.begin);
    table.common[3] = static_cast<std::int32_t>(spans.main.end);
    table.kv_len = kv_len;
    const semantics::Spans seen =
        semantics::union_spans(mask, tile.first_pos, tile.first_pos + last);
    table.hidden_begin = static_cast<std::int32_t>(seen.prefix.end);
    table.hidden_end = static_cast<std::int32_t>(
        semantics::min_of(semantics::max_of(seen.main.begin, seen.prefix.end), kv_len));
  }
}

// Soft cap, ALiBi and query-query bias on the natural-unit score of (row, key j). Masks come after.
template <class Ops, int kRows>
__device__ __forceinline__ float modify_score(const KernelParams& p, const RowTable<kRows>& table,
                                              std::int32_t seq, int r, int j, float s) {
  const Ops ops;
  if (p.layer.soft_cap > 0) {
    s = score::soft_cap(ops, s, p.layer.soft_cap, 1.0F / p.layer.soft_cap);
  }
  if (p.layer.alibi_slopes != nullptr) {
    const auto distance = static_cast<float>(j - table.position[r]);
    s = p.layer.alibi_sqrt ? score::alibi_sqrt(ops, s, table.slope[r], distance)
                           : score::alibi(ops, s, table.slope[r], distance);
  }
  if (p.batch.qq_bias != nullptr) {
    const int i = table.query_index[r];
    const int n = j - (table.position[r] - i);
    if (n >= 0 && n < p.batch.qq_size && i < p.batch.qq_size) {
      s += p.batch.qq_bias[seq * p.batch.qq_seq_stride + i * p.batch.qq_row_stride + n];
    }
  }
  return s;
}

__device__ __forceinline__ bool sees(const int4& visible, int j) {
  // Without short circuits: no branches.
  return (static_cast<int>(j >= visible.x) & static_cast<int>(j < visible.y)) |
         (static_cast<int>(j >= visible.z) & static_cast<int>(j < visible.w));
}

}  // namespace quire::cuda
