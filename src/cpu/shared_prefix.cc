// Cascade: sequences whose block tables start with the same blocks read these once, together.
#include <algorithm>
#include <limits>

#include "cpu/plan.h"
#include "cpu/tuning.h"
#include "plan/shared_prefix.h"

namespace quire::cpu {
namespace {

using planning::PrefixRule;
using planning::shareable_blocks;

const std::int32_t* table_row(const BatchParams& batch, std::int32_t s) {
  return batch.block_table + s * batch.table_stride;
}

std::int64_t equal_blocks(const BatchParams& batch, std::int32_t a, std::int32_t b,
                          std::int64_t most) {
  const std::int32_t* row_a = table_row(batch, a);
  const std::int32_t* row_b = table_row(batch, b);
  return std::mismatch(row_a, row_a + most, row_b).first - row_a;
}

void add_shared_prefix(const LayerParams& layer, const BatchParams& batch,
                       std::int64_t prefix_blocks, const std::int32_t* begin,
                       const std::int32_t* end, WorkPlan* plan) {
  const std::int64_t prefix = prefix_blocks * layer.block_size;
  const auto first_row = static_cast<std::int64_t>(plan->shared_rows.size());
  for (const std::int32_t* s = begin; s != end; ++s) {
    const Sequence seq = sequence_at(layer, batch, 0, *s);
    plan->prefix_len[*s] = prefix;
    plan->first_shared_row[*s] = static_cast<std::int64_t>(plan->shared_rows.size());
    for (std::int64_t i = 0; i < seq.query_len; ++i) {
      plan->shared_rows.push_back({seq.first_row + i, *s});
    }
  }
  const std::int64_t tokens = shared_prefix_policy(layer).tokens;
  const auto num_rows = static_cast<std::int64_t>(plan->shared_rows.size());
  for (std::int64_t row = first_row; row < num_rows; row += tokens) {
    WorkTile tile;
    tile.seq = *begin;
    tile.first_row = row;
    tile.num_tokens = static_cast<std::int32_t>(std::min(tokens, num_rows - row));
    tile.kv_end = prefix;
    plan->shared.tiles.push_back(tile);
  }
}

// The prefix that the caller announced. A sequence whose table does not begin with it shares
// nothing.
void add_announced(const LayerParams& layer, const BatchParams& batch, const PrefixRule& rule,
                   WorkPlan* plan) {
  const std::int64_t blocks = rule.min_blocks;
  std::vector<std::int32_t>& order = plan->order;
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    if (shareable_blocks(layer, batch, rule, s) == 0) continue;
    if (!order.empty() && equal_blocks(batch, order.front(), s, blocks) < blocks) continue;
    order.push_back(s);
  }
  if (order.size() < 2) return;
  add_shared_prefix(layer, batch, blocks, order.data(), order.data() + order.size(), plan);
}

// Sequences with the same first block are compared with the first of them.
void add_detected(const LayerParams& layer, const BatchParams& batch, const PrefixRule& rule,
                  WorkPlan* plan) {
  std::vector<std::int32_t>& order = plan->order;
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    if (shareable_blocks(layer, batch, rule, s) > 0) order.push_back(s);
  }
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    const std::int32_t block_a = *table_row(batch, a);
    const std::int32_t block_b = *table_row(batch, b);
    return block_a != block_b ? block_a < block_b : a < b;
  });
  auto* const all_end = order.data() + order.size();
  for (std::int32_t* begin = order.data(); begin != all_end;) {
    std::int32_t* end = begin + 1;
    std::int64_t shared = shareable_blocks(layer, batch, rule, *begin);
    // [begin, kept) share the prefix. Sequences that have too little of it share nothing.
    std::int32_t* kept = end;
    while (end != all_end && *table_row(batch, *end) == *table_row(batch, *begin)) {
      const std::int64_t most = std::min(shared, shareable_blocks(layer, batch, rule, *end));
      const std::int64_t equal = equal_blocks(batch, *begin, *end, most);
      if (equal >= rule.min_blocks) {
        shared = equal;
        std::swap(*kept++, *end);
      }
      ++end;
    }
    if (kept - begin >= 2) add_shared_prefix(layer, batch, shared, begin, kept, plan);
    begin = end;
  }
}

}  // namespace

void find_shared_prefixes(const LayerParams& layer, const BatchParams& batch, WorkPlan* plan) {
  plan->order.clear();
  plan->prefix_len.assign(static_cast<std::size_t>(batch.num_seqs), 0);
  plan->first_shared_row.assign(static_cast<std::size_t>(batch.num_seqs), -1);
  const PrefixRule rule =
      planning::prefix_rule(layer, batch, std::numeric_limits<std::int64_t>::max(), kSplitRows);
  if (rule.min_blocks == 0) return;
  if (rule.announced) {
    add_announced(layer, batch, rule, plan);
  } else {
    add_detected(layer, batch, rule, plan);
  }
}

}  // namespace quire::cpu
