// The steps of the plan kernel, for a team of threads that work on one batch: a CTA on the device,
// host threads in tests.
//
//   lengths -> tiles per sequence -> (scan) -> work tiles with their cost -> (scan) -> where the
//   work range of each CTA of the attention grid begins
#pragma once

#include <cstdint>

#include "cuda/plan/schedule.h"
#include "cuda/plan/shared_prefix.h"

namespace quire::cuda {

// Direct attention bounds its keys by the key tensor's rows, which the plan does not know; the
// attention kernel clamps again (keys_of, existing_end).
inline constexpr std::int64_t kAnyKvTokens = 0x7FFFFFFF;

// Index of the last entry that is <= value; entries do not decrease and the first is <= value.
template <class Get>
QUIRE_DEVICE std::int32_t last_at_most(std::int32_t count, std::int64_t value, const Get& get) {
  std::int32_t low = 0;
  std::int32_t high = count;
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    if (get(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

QUIRE_DEVICE std::int64_t tiles_of(const PlanArgs& args, const TileRule& rule, std::int32_t s) {
  const Sequence seq = sequence_at(args.layer, args.batch, kAnyKvTokens, s);
  const std::int64_t rows = seq.query_len * args.layer.group;
  if (rows <= rule.above_rows || rows > rule.up_to_rows) return 0;
  return (rows + rule.policy.rows - 1) / rule.policy.rows;
}

QUIRE_DEVICE void set_kv_tiles(const LayerParams& layer, const TileRule& rule,
                               const semantics::Spans& visible, WorkTile* tile) {
  const planning::KvTiles kv_tiles = planning::kv_tiles_of(visible, rule.policy.kv_tile);
  tile->prefix_first = kv_tiles.prefix_first;
  tile->prefix_count = kv_tiles.prefix_count;
  tile->main_first = kv_tiles.main_first;
  tile->main_count = kv_tiles.main_count;
  tile->visible_end =
      static_cast<std::int32_t>(semantics::max_of(visible.prefix.end, visible.main.end));
  const std::int32_t count = kv_tiles.count();
  if (!layer.batch_invariant) {
    tile->kv_chunk = count > rule.policy.max_uncut || count == 0 ? 1 : count;
  } else if (rule.kv_chunks) {
    tile->kv_chunk = planning::kv_tiles_per_chunk(count, rule.policy.min_chunk);
  } else {
    tile->kv_chunk = count > 0 ? count : 1;
  }
  tile->cost = count + rule.policy.item_overhead;
}

QUIRE_DEVICE WorkTile make_tile(const PlanArgs& args, const TileRule& rule, std::int32_t s,
                                std::int64_t index) {
  const LayerParams& layer = args.layer;
  const Sequence seq = sequence_at(layer, args.batch, kAnyKvTokens, s);
  const std::int64_t rows = seq.query_len * layer.group;
  const std::int64_t first = index * rule.policy.rows;
  WorkTile tile{};
  tile.seq = s;
  tile.rows = static_cast<std::int32_t>(semantics::min_of(rows - first, rule.policy.rows));
  const std::int64_t first_token = first / layer.group;
  const std::int64_t last_token = (first + tile.rows - 1) / layer.group;
  tile.first_sub = static_cast<std::int32_t>(first - first_token * layer.group);
  tile.first_index = static_cast<std::int32_t>(first_token);
  tile.first_token = seq.first_row + first_token;
  const std::int64_t first_pos = seq.first_pos + first_token;
  const std::int64_t last_pos = seq.first_pos + last_token;
  tile.first_pos = static_cast<std::int32_t>(first_pos);
  tile.context_len = static_cast<std::int32_t>(seq.context_len);
  tile.first_kv_row = seq.first_kv_row;
  tile.kv_len = static_cast<std::int32_t>(seq.mask.kv_len);
  tile.prefix_row = -1;
  if (args.prefixes.rule.min_blocks > 0 && args.prefixes.keys[s] > 0) {
    tile.kv_begin = args.prefixes.keys[s];
    tile.prefix_row = args.prefixes.first_row[s] + tile.first_index;
  }
  const semantics::Spans visible =
      clip(semantics::union_spans(seq.mask, first_pos, last_pos), tile.kv_begin, tile.kv_len);
  set_kv_tiles(layer, rule, visible, &tile);
  const semantics::Spans common = first_token == last_token
                                      ? visible  // exactly what its rows see
                                      : clip(semantics::common_spans(seq.mask, first_pos, last_pos),
                                             tile.kv_begin, tile.kv_len);
  tile.common[0] = static_cast<std::int32_t>(common.prefix.begin);
  tile.common[1] = static_cast<std::int32_t>(common.prefix.end);
  tile.common[2] = static_cast<std::int32_t>(common.main.begin);
  tile.common[3] = static_cast<std::int32_t>(common.main.end);
  tile.out_of_window_begin = static_cast<std::int32_t>(visible.prefix.end);
  tile.out_of_window_end =
      static_cast<std::int32_t>(semantics::max_of(visible.main.begin, visible.prefix.end));
  return tile;
}

// The `index`-th tile over a shared prefix.
QUIRE_DEVICE WorkTile make_shared_tile(const PlanArgs& args, const SharedPrefix& prefix,
                                       std::int64_t index) {
  const TileRule& rule = args.shared;
  const std::int64_t rows = std::int64_t{prefix.end_row - prefix.first_row} * args.layer.group;
  const std::int64_t first = index * rule.policy.rows;
  const std::int64_t first_token = first / args.layer.group;
  WorkTile tile{};
  tile.seq = prefix.seq;
  tile.rows = static_cast<std::int32_t>(semantics::min_of(rows - first, rule.policy.rows));
  tile.first_sub = static_cast<std::int32_t>(first - first_token * args.layer.group);
  tile.prefix_row = static_cast<std::int32_t>(prefix.first_row + first_token);
  tile.kv_len = prefix.keys;
  tile.context_len = prefix.keys;  // query-query bias is about keys behind every shared prefix
  tile.common[3] = prefix.keys;
  set_kv_tiles(args.layer, rule, {{0, 0}, {0, prefix.keys}}, &tile);
  return tile;
}

// The cut at a cost position. Cuts inside an item are rounded to multiples of its kv_chunk, or, if
// items are not cut, to its ends.
QUIRE_DEVICE WorkRange start_at(const TileRule& rule, std::int32_t num_tiles, std::int64_t position,
                                bool uncut) {
  if (num_tiles == 0) return {};
  WorkRange start;
  start.tile =
      last_at_most(num_tiles, position, [&](std::int32_t i) { return rule.tiles[i].cost_begin; });
  const WorkTile& tile = rule.tiles[start.tile];
  const std::int64_t inside = position - tile.cost_begin;
  start.head = static_cast<std::int32_t>(inside / tile.cost);
  const auto kv_tile = static_cast<std::int32_t>(inside - std::int64_t{start.head} * tile.cost);
  const std::int32_t overhead = rule.policy.item_overhead;
  if (start.head < rule.heads && kv_tile > overhead) {
    const std::int32_t chunk = uncut ? tile.num_kv_tiles() : tile.kv_chunk;
    start.kv_tile = (kv_tile - overhead + chunk / 2) / chunk * chunk;
    if (start.kv_tile >= tile.num_kv_tiles()) {
      start.kv_tile = 0;
      ++start.head;
    }
  }
  if (start.head >= rule.heads) {
    start.head = 0;
    ++start.tile;
  }
  return start;
}

// For CTAs that start inside an item: which others work on it. In batch-invariant mode a CTA leaves
// a partial for each kv chunk, else one.
template <class Team>
QUIRE_DEVICE void link_starts(const Team& team, const TileRule& rule, std::int32_t num_ctas,
                              bool one_partial) {
  const WorkRange* work_ranges = rule.work_ranges;
  std::int64_t rank = 0;
  for (std::int32_t base = 0; base <= num_ctas; base += team.size()) {
    const std::int32_t c = base + team.thread();
    const bool works = c < num_ctas &&
                       work_ranges[c].comes_before(work_ranges[c + 1].tile, work_ranges[c + 1].head,
                                                   work_ranges[c + 1].kv_tile);
    std::int64_t total = 0;
    const std::int64_t before = rank + team.scan(works ? 1 : 0, &total);
    if (c <= num_ctas) rule.work_ranges[c].rank = static_cast<std::int32_t>(before);
    rank += total;
  }
  team.sync();
  for (std::int32_t c = team.thread(); c < num_ctas; c += team.size()) {
    WorkRange& start = rule.work_ranges[c];
    if (start.kv_tile == 0) continue;
    std::int32_t last = c;
    while (work_ranges[last + 1].is_in(start.tile, start.head)) ++last;
    std::int32_t first = c;
    while (!work_ranges[first].comes_before(start.tile, start.head, 1)) --first;
    start.first_cta = first;
    start.last_cta = last;
    start.num_ctas_at_work = work_ranges[last + 1].rank - work_ranges[first].rank;
    const WorkTile& tile = rule.tiles[start.tile];
    const std::int32_t end = work_ranges[c + 1].is_in(start.tile, start.head)
                                 ? work_ranges[c + 1].kv_tile
                                 : tile.num_kv_tiles();
    const std::int32_t kv_tiles = end - start.kv_tile;
    start.num_partials =
        one_partial ? (kv_tiles > 0 ? 1 : 0) : (kv_tiles + tile.kv_chunk - 1) / tile.kv_chunk;
  }
}

QUIRE_DEVICE std::int32_t bucket_of(const CostBuckets& buckets, std::int32_t cost) {
  return kCostBuckets - 1 -
         static_cast<std::int32_t>(std::int64_t{cost} * (kCostBuckets - 1) / buckets.highest);
}

// Whether CTAs that take whole items, the costliest first, are about as soon done as with equal
// ranges, where each pays for the items that are cut at its ends, and where no two CTAs are at the
// same keys at the same time, which the L2 cache feels. Leaves where each bucket's tiles begin.
template <class Team>
QUIRE_DEVICE bool whole_items_balance(const Team& team, const TileRule& rule,
                                      std::int64_t num_tiles, std::int64_t total_cost) {
  CostBuckets& buckets = *rule.buckets;
  for (std::int32_t b = team.thread(); b < kCostBuckets; b += team.size()) buckets.next[b] = 0;
  if (team.thread() == 0) {
    buckets.highest = buckets.makespan = 1;
    buckets.lowest = 0x7FFFFFFF;
    buckets.kv_tiles = 0;
  }
  team.sync();
  for (std::int64_t t = team.thread(); t < num_tiles; t += team.size()) {
    const WorkTile& tile = rule.tiles[t];
    team.raise(&buckets.highest, tile.cost);
    team.lower(&buckets.lowest, tile.cost);
    if (tile.first_index == 0 && tile.first_sub == 0) {
      team.add(&buckets.kv_tiles, tile.kv_len / rule.policy.kv_tile);
    }
  }
  team.sync();
  for (std::int64_t t = team.thread(); t < num_tiles; t += team.size()) {
    team.add(&buckets.next[bucket_of(buckets, rule.tiles[t].cost)], 1);
  }
  team.sync();
  std::int64_t before_bucket = 0;
  for (std::int32_t base = 0; base < kCostBuckets; base += team.size()) {
    const std::int32_t b = base + team.thread();
    const std::int32_t count = b < kCostBuckets ? buckets.next[b] : 0;
    std::int64_t total = 0;
    const std::int64_t before = before_bucket + team.scan(count, &total);
    if (b < kCostBuckets) buckets.next[b] = static_cast<std::int32_t>(before);
    if (count > 0) {
      // Some CTA gets as many of the items so far as an equal share of them, rounded up.
      const std::int64_t rounds = ((before + count) * rule.heads + rule.grid - 1) / rule.grid;
      const std::int64_t cost =
          std::int64_t{kCostBuckets - 1 - b} * buckets.highest / (kCostBuckets - 1);
      team.raise(&buckets.makespan,
                 static_cast<std::int32_t>(semantics::min_of(rounds * cost, kAnyKvTokens)));
    }
    before_bucket += total;
  }
  team.sync();
  const std::int64_t share = total_cost / rule.grid;
  return buckets.makespan <= share + share / 32 + rule.policy.cut_cost;
}

// As many ranges as `cost` is worth, at most the grid. Only small costs are divided, in 32 bits:
// all threads wait for this number, and a division of 64 bits takes a hundred instructions.
QUIRE_DEVICE std::int32_t num_ranges(const TileRule& rule, std::int64_t cost) {
  const std::int32_t least = rule.policy.min_range_cost;
  if (cost >= std::int64_t{rule.grid} * least) return rule.grid;
  return (static_cast<std::int32_t>(cost) + least - 1) / least;
}

// How many heads' keys fit the L2 cache together; the CTAs at work at a time read all sequences.
QUIRE_DEVICE std::int32_t heads_at_once(const TileRule& rule) {
  const std::int32_t kv_tiles = rule.buckets->kv_tiles;
  if (kv_tiles <= 0 || rule.l2_kv_tiles / kv_tiles >= rule.heads) return rule.heads;
  return static_cast<std::int32_t>(semantics::max_of(rule.l2_kv_tiles / kv_tiles, 1));
}

// Where whole items do not balance because they are few and of about equal cost: the tiles that
// keep every CTA busy for the same number of items. Only what is left is cut: CTAs that work
// through the keys of a head in step share what they read in the L2 cache, and cut ranges are
// nowhere in step.
QUIRE_DEVICE std::int32_t tiles_of_full_waves(const TileRule& rule, std::int32_t num_tiles) {
  if (rule.buckets->lowest < rule.buckets->highest - rule.buckets->highest / 8) return 0;
  const std::int64_t items = std::int64_t{num_tiles} * rule.heads;
  return static_cast<std::int32_t>(items / rule.grid * rule.grid / rule.heads);
}

// Whether no item is longer than TilePolicy::uncut_percent allows.
template <class Team>
QUIRE_DEVICE bool none_is_long(const Team& team, const TileRule& rule, std::int64_t num_tiles,
                               std::int64_t cost) {
  const std::int64_t most = cost / rule.grid * rule.policy.uncut_percent / 100;
  std::int64_t num_long = 0;
  for (std::int64_t base = 0; base < num_tiles; base += team.size()) {
    const std::int64_t t = base + team.thread();
    std::int64_t total = 0;
    team.scan(t < num_tiles && rule.tiles[t].cost > most ? 1 : 0, &total);
    num_long += total;
  }
  return num_long == 0;
}

// The tile that each work range begins in, beside it. Threads that are next to each other copy pieces
// that are: a tile a thread took 3 us.
template <class Team>
QUIRE_DEVICE void copy_first_tiles(const Team& team, const TileRule& rule, std::int32_t num_tiles) {
  struct alignas(16) Piece {
    std::int32_t words[4];
  };
  constexpr auto kPieces = static_cast<std::int32_t>(sizeof(WorkTile) / sizeof(Piece));
  static_assert(sizeof(WorkTile) % sizeof(Piece) == 0);
  auto* const to = reinterpret_cast<Piece*>(rule.first_tiles);
  const auto* const from = reinterpret_cast<const Piece*>(rule.tiles);
  for (std::int32_t i = team.thread(); i < rule.grid * kPieces; i += team.size()) {
    const std::int32_t c = i / kPieces;
    const std::int32_t tile = rule.work_ranges[c].tile;
    if (tile < num_tiles) to[i] = from[tile * kPieces + (i - c * kPieces)];
  }
}

// How many of the grid's CTAs begin with the work of `rule`, of which there is `cost`, where that of
// `other` is done beside it: so many that both are done together, if memory gives as much as the
// other's CTAs ask for; if not, as few as are done as soon as that.
QUIRE_DEVICE std::int32_t ctas_beside(const TileRule& rule, std::int64_t cost, std::int64_t items,
                                      const TileRule& other) {
  // Wild lengths must not pass 64 bits.
  const auto bounded = [](std::int64_t x) { return semantics::min_of(x, std::int64_t{1} << 40); };
  const std::int64_t other_cost = bounded(other.buckets->cost);
  const std::int64_t own_ns =
      bounded(cost) * rule.policy.cost_ns + bounded(items) * rule.policy.item_ns;
  const std::int64_t all_ns = own_ns + other_cost * other.policy.cost_ns;
  const std::int64_t time_ns =
      semantics::max_of(all_ns / rule.grid, other_cost * other.least_cost_ps / 1000);
  return static_cast<std::int32_t>(
      semantics::min_of(own_ns / semantics::max_of(time_ns, 1) + 1, rule.grid));
}

// Work tiles, and where each CTA's work range begins. make(t) is tile t without its place in the
// line. `beside`: see TileRule; null: none.
template <class Team, class Make>
QUIRE_DEVICE void lay_out(const Team& team, TileRule rule, const TileRule* beside, bool one_partial,
                          std::int64_t num_tiles, const Make& make) {
  const std::int32_t grid = rule.grid;
  std::int64_t cost = 0;
  for (std::int64_t base = 0; base < num_tiles; base += team.size()) {
    const std::int64_t t = base + team.thread();
    WorkTile tile{};
    if (t < num_tiles) tile = make(t);
    std::int64_t total = 0;
    tile.cost_begin = cost + team.scan(std::int64_t{tile.cost} * rule.heads, &total);
    if (t < num_tiles) rule.tiles[t] = tile;
    cost += total;
  }
  team.sync();
  if (beside != nullptr) rule.grid = ctas_beside(rule, cost, num_tiles * rule.heads, *beside);
  ScheduleHeader header;
  header.num_tiles = static_cast<std::int32_t>(num_tiles);
  header.num_ctas = rule.grid;
  if (rule.buckets != nullptr && team.thread() == 0) rule.buckets->cost = cost;
  const bool by_memory = rule.policy.uncut_percent > 0;
  const bool uncut = by_memory && none_is_long(team, rule, num_tiles, cost);
  if (rule.buckets != nullptr && num_tiles > 0) {
    const bool balanced = whole_items_balance(team, rule, num_tiles, cost);
    header.heads_at_once = by_memory ? rule.heads : heads_at_once(rule);
    const bool never_cut = rule.policy.max_uncut == kNeverCut;
    if (by_memory ? uncut : balanced || !one_partial || never_cut) {
      header.whole_tiles = header.num_tiles;
      for (std::int64_t t = team.thread(); t < num_tiles; t += team.size()) {
        const WorkTile tile = make(t);
        rule.tiles[team.take(&rule.buckets->next[bucket_of(*rule.buckets, tile.cost)])] = tile;
      }
    } else if (!by_memory) {
      header.whole_tiles = tiles_of_full_waves(rule, header.num_tiles);
    }
  }
  const std::int64_t first_cost =
      header.whole_tiles < header.num_tiles ? rule.tiles[header.whole_tiles].cost_begin : cost;
  if (header.whole_tiles == 0) {
    // As many CTAs as there are items, if that is more: short ones side by side.
    const std::int64_t wanted = semantics::max_of(num_ranges(rule, cost), num_tiles * rule.heads);
    header.num_ctas = static_cast<std::int32_t>(semantics::min_of(wanted, rule.grid));
  }
  if (by_memory && header.num_ctas > 0) {
    header.cta_step = rule.grid / header.num_ctas;
  }
  if (team.thread() == 0) *rule.header = header;
  if (header.whole_tiles == header.num_tiles) {
    WorkRange none;
    none.tile = header.num_tiles;
    for (std::int32_t c = team.thread(); c <= grid; c += team.size()) rule.work_ranges[c] = none;
    return;
  }
  const std::int64_t left = cost - first_cost;
  for (std::int32_t c = team.thread(); c <= grid; c += team.size()) {
    // A CTA without a range of its own begins where the next one does.
    const std::int32_t range = (c + header.cta_step - 1) / header.cta_step;
    const std::int64_t position =
        first_cost + (range < header.num_ctas ? range * left / header.num_ctas : left);
    rule.work_ranges[c] = start_at(rule, header.num_tiles, position, uncut);
  }
  team.sync();
  if (rule.first_tiles != nullptr) copy_first_tiles(team, rule, header.num_tiles);
  link_starts(team, rule, header.num_ctas * header.cta_step, one_partial);
}

// The tiles of a rule's sequences. Also where it has none: a graph may read the result.
template <class Team>
QUIRE_DEVICE void schedule(const Team& team, const PlanArgs& args, const TileRule& rule) {
  if (rule.up_to_rows <= rule.above_rows) {
    if (team.thread() == 0) *rule.header = {};
    for (std::int32_t c = team.thread(); c <= rule.grid; c += team.size()) rule.work_ranges[c] = {};
    return;
  }
  const std::int32_t num_seqs = args.batch.num_seqs;
  std::int64_t num_tiles = 0;
  for (std::int32_t base = 0; base < num_seqs; base += team.size()) {
    const std::int32_t s = base + team.thread();
    std::int64_t total = 0;
    const std::int64_t count = s < num_seqs ? tiles_of(args, rule, s) : 0;
    const std::int64_t before = num_tiles + team.scan(count, &total);
    // Sequences that overlap (a wild query_start_loc) may ask for more tiles than there is room
    // for: what does not fit is not computed.
    if (s < num_seqs) {
      rule.seq_tiles[s] = static_cast<std::int32_t>(semantics::min_of(before, rule.max_tiles));
    }
    num_tiles += total;
  }
  num_tiles = semantics::min_of(num_tiles, rule.max_tiles);
  team.sync();
  const TileRule* beside = rule.beside >= 0 ? &args.rules[rule.beside] : nullptr;
  lay_out(team, rule, beside, !args.layer.batch_invariant, num_tiles, [&](std::int64_t t) {
    const std::int32_t s =
        last_at_most(num_seqs, t, [&](std::int32_t i) { return rule.seq_tiles[i]; });
    return make_tile(args, rule, s, t - rule.seq_tiles[s]);
  });
}

// The tiles of shared prefixes. Also where nothing is shared: a graph may read the result.
template <class Team>
QUIRE_DEVICE void schedule_shared(const Team& team, const PlanArgs& args) {
  const bool shares = args.prefixes.rule.min_blocks > 0;
  const std::int32_t num_shared = shares ? cascade::form_shared_prefixes(team, args) : 0;
  const SharedPrefix* list = args.prefixes.list;
  std::int64_t num_tiles = 0;
  for (std::int32_t g = 0; g < num_shared; ++g) num_tiles += cascade::tiles_of(args, list[g]);
  lay_out(team, args.shared, nullptr, true, num_tiles, [&](std::int64_t t) {
    const SharedPrefix* prefix = list;
    for (; t >= cascade::tiles_of(args, *prefix); ++prefix) t -= cascade::tiles_of(args, *prefix);
    return make_shared_tile(args, *prefix, t);
  });
}

// Everything, after cascade::find_partner() of each sequence.
template <class Team>
QUIRE_DEVICE void make_plan(const Team& team, const PlanArgs& args) {
  if (args.shared.policy.rows > 0) schedule_shared(team, args);
  team.sync();
  for (const TileRule& rule : args.rules) {
    if (rule.policy.rows > 0) schedule(team, args, rule);
    team.sync();
  }
}

}  // namespace quire::cuda
