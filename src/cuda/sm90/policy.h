// What the plan is told of the kernels of this folder.
#pragma once

#include "cuda/plan/schedule.h"

namespace quire::cuda::sm90 {

// Costs in kv tiles of 128 keys. An item's queries and output take about 1,400 clocks of 3,600 that
// a tile takes, mostly beside other work; a partial of 192 rows is 100 KB to write and to read.
template <class C>
constexpr TilePolicy prefill_policy() {
  TilePolicy policy;
  policy.rows = C::kRows;
  policy.kv_tile = C::kKeys;
  policy.v_columns = C::kHeadSize;
  policy.item_overhead = 1;
  policy.min_range_cost = 4;
  policy.cut_cost = 4;
  policy.max_uncut = 8;
  policy.min_chunk = 4;
  // Beside decode, at head size 128, on an H100: 2.6 to 3.2 us a unit are alike, less and more slower.
  policy.cost_ns = 3000;
  policy.item_ns = 8000;
  return policy;
}

}  // namespace quire::cuda::sm90
