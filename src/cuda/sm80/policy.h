// What the plan is told of the kernels of this folder.
#pragma once

#include "cuda/plan/schedule.h"

namespace quire::cuda::sm80 {

inline constexpr int kKvTile = 64;

// Fewer output columns have too few roundings of weights to average out: such layers go to fp32.
inline constexpr int kMinHeadSizeV = 16;

// The costs of both kernels, in kv tiles of 64 keys: measured on an H100 (docs/experiments.md). An
// item's queries and output take about as long as two tiles; a range of fewer than four tiles is
// not worth its partial result; kv chunks of batch-invariant mode have at least 512 keys.
template <class C>
constexpr TilePolicy policy_of() {
  TilePolicy policy;
  policy.rows = C::kRows;
  policy.kv_tile = kKvTile;
  policy.v_columns = C::kHeadSizeV;
  policy.item_overhead = 2;
  policy.min_range_cost = 6;
  policy.cut_cost = 6;
  policy.max_uncut = 8;
  policy.min_chunk = 8;
  return policy;
}

}  // namespace quire::cuda::sm80
