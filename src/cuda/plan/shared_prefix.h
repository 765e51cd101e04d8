// Cascade, the planning part: which sequences share a prefix, and the list of their query rows.
//
//   a warp a sequence: leader (the first sequence whose table starts alike), blocks in common
//   the plan's CTA:    the list of prefixes, the keys of each, rows prefix by prefix
//
// `Lanes` and `Team` are the threads that work together; tests run all this on the host with one.
// Integers only, in fixed order: a batch always gets the same plan.
#pragma once

#include <cstdint>

#include "cuda/plan/schedule.h"
#include "plan/shared_prefix.h"

namespace quire::cuda {

QUIRE_HOST_DEVICE bool prefix_pays(const planning::PrefixRule& rule, std::int64_t num_seqs,
                                   std::int64_t keys) {
  return num_seqs >= 2 && (rule.announced || (num_seqs - 1) * keys >= kMinSavedKeys);
}

namespace cascade {

// Table entries that a lane asks for together: one after the other, latency would add up.
inline constexpr int kAhead = 8;

QUIRE_DEVICE const std::int32_t* table_row(const BatchParams& batch, std::int32_t s) {
  return batch.block_table + s * batch.table_stride;
}

// How many of the first `most` blocks of two sequences are the same.
template <class Lanes>
QUIRE_DEVICE std::int64_t equal_blocks(const Lanes& lanes, const std::int32_t* a,
                                       const std::int32_t* b, std::int64_t most) {
  const std::int32_t step = kAhead * lanes.size();
  for (std::int64_t base = 0; base < most; base += step) {
    std::int32_t blocks_a[kAhead];
    std::int32_t blocks_b[kAhead];
    QUIRE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const std::int64_t i = base + u * lanes.size() + lanes.lane();
      blocks_a[u] = i < most ? a[i] : 0;
      blocks_b[u] = i < most ? b[i] : 0;
    }
    std::int32_t first = step;
    QUIRE_UNROLL
    for (int u = kAhead - 1; u >= 0; --u) {
      if (blocks_a[u] != blocks_b[u]) first = u * lanes.size() + lanes.lane();
    }
    first = lanes.least(first);
    if (first < step) return base + first;
  }
  return most;
}

// The first sequence that `s` may share with, maybe itself. `s` itself may share.
template <class Lanes>
QUIRE_DEVICE std::int32_t find_leader(const Lanes& lanes, const PlanArgs& args, std::int32_t s) {
  const planning::PrefixRule& rule = args.prefixes.rule;
  const std::int32_t own_block = *table_row(args.batch, s);
  for (std::int32_t base = 0; base <= s; base += kAhead * lanes.size()) {
    bool alike[kAhead];
    QUIRE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const std::int32_t i = base + u * lanes.size() + lanes.lane();
      alike[u] = i <= s && (rule.announced || *table_row(args.batch, i) == own_block);
    }
    QUIRE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const std::int32_t first = base + u * lanes.size();
      const std::int32_t i = first + lanes.lane();
      const bool may = alike[u] && shareable_blocks(args.layer, args.batch, rule, i) > 0;
      const std::int32_t found = lanes.least(may ? i : s);
      if (found < s) return found;
    }
  }
  return s;
}

template <class Lanes>
QUIRE_DEVICE void find_partner(const Lanes& lanes, const PlanArgs& args, std::int32_t s) {
  const SharedPrefixes& prefixes = args.prefixes;
  const planning::PrefixRule& rule = prefixes.rule;
  std::int64_t blocks = shareable_blocks(args.layer, args.batch, rule, s);
  std::int32_t leader = -1;
  if (blocks > 0) {
    leader = find_leader(lanes, args, s);
    const std::int64_t most =
        semantics::min_of(blocks, shareable_blocks(args.layer, args.batch, rule, leader));
    blocks = leader == s ? most
                         : equal_blocks(lanes, table_row(args.batch, leader),
                                        table_row(args.batch, s), most);
    if (blocks < rule.min_blocks) leader = -1;
  }
  if (lanes.lane() != 0) return;
  prefixes.leader[s] = leader;
  prefixes.blocks[s] = static_cast<std::int32_t>(blocks);
  prefixes.members[s] = 0;
  prefixes.least[s] = 0x7FFFFFFF;
  prefixes.keys[s] = 0;
  prefixes.first_row[s] = 0;
}

// The rows of the sequences that share a prefix, in their order. Sequences that find no more room
// stay without a shared prefix. Returns the number of rows that are taken afterwards.
template <class Team>
QUIRE_DEVICE std::int64_t list_rows(const Team& team, const PlanArgs& args, SharedPrefix* prefix,
                                    std::int64_t first_row) {
  const SharedPrefixes& prefixes = args.prefixes;
  const std::int32_t leader = prefix->seq;
  const std::int32_t keys = prefix->keys;
  std::int64_t next = first_row;
  for (std::int32_t base = 0; base < args.batch.num_seqs; base += team.size()) {
    const std::int32_t s = base + team.thread();
    const bool member = s < args.batch.num_seqs && prefixes.leader[s] == leader;
    Sequence seq;
    if (member) seq = sequence_at(args.layer, args.batch, 0, s);
    std::int64_t total = 0;
    const std::int64_t row = next + team.scan(seq.query_len, &total);
    next += total;
    if (!member || row + seq.query_len > prefixes.max_rows) continue;
    prefixes.keys[s] = keys;
    prefixes.first_row[s] = static_cast<std::int32_t>(row);
    for (std::int64_t i = 0; i < seq.query_len; ++i) {
      prefixes.rows[row + i] = {static_cast<std::int32_t>(seq.first_row + i),
                                static_cast<std::int32_t>(seq.first_pos + i)};
    }
    team.raise(&prefix->end_row, static_cast<std::int32_t>(row + seq.query_len));
  }
  return semantics::min_of(next, prefixes.max_rows);
}

// After find_partner() of all sequences. Returns how many shared prefixes there are.
template <class Team>
QUIRE_DEVICE std::int32_t form_shared_prefixes(const Team& team, const PlanArgs& args) {
  const SharedPrefixes& prefixes = args.prefixes;
  const std::int32_t num_seqs = args.batch.num_seqs;
  for (std::int32_t s = team.thread(); s < num_seqs; s += team.size()) {
    const std::int32_t leader = prefixes.leader[s];
    if (leader < 0) continue;
    team.add(&prefixes.members[leader], 1);
    team.lower(&prefixes.least[leader], prefixes.blocks[s]);
  }
  team.sync();
  std::int64_t num_shared = 0;
  for (std::int32_t base = 0; base < num_seqs; base += team.size()) {
    const std::int32_t s = base + team.thread();
    const bool leads = s < num_seqs && prefixes.leader[s] == s;
    const std::int64_t keys = leads ? std::int64_t{prefixes.least[s]} * args.layer.block_size : 0;
    const bool pays = leads && prefix_pays(prefixes.rule, prefixes.members[s], keys);
    std::int64_t total = 0;
    const std::int64_t at = num_shared + team.scan(pays ? 1 : 0, &total);
    if (pays && at < kMaxSharedPrefixes) {
      prefixes.list[at] = {s, static_cast<std::int32_t>(keys), 0, 0};
    }
    num_shared += total;
  }
  num_shared = semantics::min_of(num_shared, kMaxSharedPrefixes);
  team.sync();
  std::int64_t row = 0;
  for (std::int64_t g = 0; g < num_shared; ++g) {
    SharedPrefix* prefix = prefixes.list + g;
    const std::int64_t first_row = row;
    row = list_rows(team, args, prefix, first_row);
    if (team.thread() == 0) prefix->first_row = static_cast<std::int32_t>(first_row);
  }
  team.sync();
  return static_cast<std::int32_t>(num_shared);
}

QUIRE_DEVICE std::int64_t tiles_of(const PlanArgs& args, const SharedPrefix& prefix) {
  const std::int64_t rows =
      semantics::max_of(prefix.end_row - prefix.first_row, 0) * args.layer.group;
  return (rows + args.shared.policy.rows - 1) / args.shared.policy.rows;
}

}  // namespace cascade
}  // namespace quire::cuda
