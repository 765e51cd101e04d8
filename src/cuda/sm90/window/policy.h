// What the plan and prepare() are told of the window kernel.
#pragma once

#include "cuda/plan/schedule.h"

namespace quire::cuda::sm90 {

inline constexpr int kWindowTokens = 112;  // of an item
// Keys that an item's rows may see, and those that are multiplied by the rows of a step.
inline constexpr int kSpanKeys = 256;
inline constexpr int kStepKeys = 144;
inline constexpr int kPageKeys = 16;  // keys of a box
inline constexpr int kStepRows = 64;  // a warpgroup's
inline constexpr int kMostStepTokens = 16;
static_assert(kWindowTokens % kMostStepTokens == 0);

// Tokens of a step: a power of two, so that steps fill items. Keys from the first that one of them
// sees, down to a multiple of 8, to the last are at most kStepKeys. 0: not even one token's are.
// Plain loops and comparisons: this runs in kernels too, where std::min of a constant and
// std::bit_floor compiled to a trap.
QUIRE_HOST_DEVICE constexpr int step_tokens(const LayerParams& layer) {
  const std::int64_t by_keys = kStepKeys - 7 + 1 - layer.mask.window_size;
  const std::int64_t by_rows = kStepRows / layer.group;
  int tokens = kMostStepTokens;
  while (tokens > 0 && (tokens > by_keys || tokens > by_rows)) tokens /= 2;
  return tokens;
}

// Layers whose windows fit, and whose steps fill half of the rows that they are multiplied as: with
// fewer the prefill kernel is faster.
constexpr bool takes_window(const LayerParams& layer) {
  const Mask& mask = layer.mask;
  return mask.causal && mask.window == WindowKind::kLeft &&
         mask.window_size <= kSpanKeys - kWindowTokens - (kPageKeys - 1) + 1 &&
         step_tokens(layer) * layer.group >= kStepRows / 2;
}

// Items are never cut: their cost is only for their order.
template <class C>
constexpr TilePolicy window_policy() {
  TilePolicy policy;
  policy.rows = kWindowTokens * kStepRows;
  policy.tokens = kWindowTokens;
  policy.kv_tile = kPageKeys;
  policy.v_columns = C::kHeadSize;
  policy.item_overhead = 4;
  policy.min_range_cost = 8;
  policy.cut_cost = 4;
  policy.max_uncut = kNeverCut;
  policy.min_chunk = 1;
  return policy;
}

}  // namespace quire::cuda::sm90
