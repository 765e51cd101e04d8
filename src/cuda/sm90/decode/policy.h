// What the plan and prepare() are told of the decode kernel.
#pragma once

#include <algorithm>

#include "cuda/plan/schedule.h"

namespace quire::cuda::sm90 {

inline constexpr int kKvTile = 64;  // keys: what a product of a warpgroup takes

// CTAs of a multiprocessor: while an item ends in one, the others' loads go on. Four where a kv
// tile is 16 KiB: more short spans are at work at once then.
constexpr int decode_ctas(int head_size, int rows, bool kv8) {
  if (head_size == 64 && rows == 8) return kv8 ? 3 : 4;
  return 2;
}

inline constexpr int kMostRows = 40;

// Which numbers of rows a layer gets kernels for: one token of a sequence, and five (speculative
// decoding), as products come in steps of eight.
constexpr bool decode_rows_fit(int rows, int group) {
  const int tokens_1 = (group + 7) / 8 * 8;
  const int tokens_5 = std::min(kMostRows, (5 * group + 7) / 8 * 8);
  return rows == tokens_1 || (rows == tokens_5 && tokens_5 > tokens_1);
}

template <class C>
constexpr TilePolicy decode_policy() {
  TilePolicy policy;
  policy.rows = C::kRows;
  policy.kv_tile = kKvTile;
  policy.v_columns = C::kHeadSize;
  policy.item_overhead = 2;
  policy.min_range_cost = 12;
  policy.cut_cost = 6;
  policy.max_uncut = 8;
  policy.min_chunk = 8;
  policy.uncut_percent = 225;
  policy.cost_ns = 550;  // at head size 128 and 8 rows
  return policy;
}

}  // namespace quire::cuda::sm90
