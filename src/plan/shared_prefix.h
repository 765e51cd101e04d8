// Which sequences may share a prefix: the rule of all planners.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "params.h"

namespace quire::planning {

// Automatic detection: prefixes of fewer tokens are not worth a tile of their own.
inline constexpr std::int64_t kMinSharedPrefix = 128;

// What is looked for in the block tables.
struct PrefixRule {
  std::int64_t min_blocks = 0;  // that sequences must have in common; 0: nothing is looked for
  std::int64_t max_blocks = 0;
  std::int64_t max_rows = 0;  // query rows of a sequence that may share
  bool announced = false;     // all sequences have one prefix, by common_prefix_len
};

// Sequences with more rows than the limits take no part. `max_detected_rows`: the keys that a long
// query reads serve many rows already.
inline PrefixRule prefix_rule(const LayerParams& layer, const BatchParams& batch,
                              std::int64_t max_announced_rows, std::int64_t max_detected_rows) {
  PrefixRule rule;
  if (!layer.paged || layer.batch_invariant || batch.table_width == 0 || batch.num_seqs < 2) {
    return rule;
  }
  // A block that two sequences have in common may be at different positions.
  if (batch.has_positions()) return rule;
  if (batch.common_prefix_len > 0) {
    rule.announced = true;
    rule.min_blocks = std::min(batch.common_prefix_len / layer.block_size, batch.table_width);
    rule.max_blocks = rule.min_blocks;
    rule.max_rows = max_announced_rows;
  } else if (layer.auto_cascade) {
    rule.min_blocks = (kMinSharedPrefix + layer.block_size - 1) / layer.block_size;
    rule.max_blocks = std::numeric_limits<std::int64_t>::max();
    rule.max_rows = max_detected_rows;
  }
  return rule;
}

// Whole blocks of context (never this step's own tokens, so every row sees the prefix causally)
// that the sequence could share; 0: too few.
QUIRE_HOST_DEVICE std::int64_t shareable_blocks(const LayerParams& layer, const BatchParams& batch,
                                                const PrefixRule& rule, std::int32_t s) {
  const Sequence seq = sequence_at(layer, batch, 0, s);
  if (seq.query_len == 0 || seq.query_len * layer.group > rule.max_rows) return 0;
  const std::int64_t keys = semantics::min_of(seq.context_len, seq.mask.kv_len);
  const std::int64_t blocks = semantics::max_of(keys, 0) / layer.block_size;
  return blocks < rule.min_blocks ? 0 : semantics::min_of(blocks, rule.max_blocks);
}

}  // namespace quire::planning
