// The steps of the plan kernel, for a team of threads that work on one batch: a CTA on the device;
// tests run them on the host with a team of one.
//
//   lengths -> tiles per request -> (scan) -> tile records with their cost -> (scan) -> where each
//   CTA of the attention grid starts
#pragma once

#include <cstdint>

#include "cuda/shared_prefix.h"
#include "cuda/work.h"

namespace quire::cuda {

// Fewer units than this a CTA are not worth a partial result.
inline constexpr std::int64_t kMinCost = 4 + kOverhead;
// Items up to this long are not cut: a partial result costs more than the imbalance.
inline constexpr std::int32_t kMaxWholeUnits = 8;
// Batch-invariant mode: chunks of at least 512 keys.
inline constexpr std::int32_t kMinChunkUnits = 8;
// Direct attention bounds its keys by the key tensor's rows, which the plan does not know; the
// attention kernel clamps again.
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

QUIRE_DEVICE std::int64_t tiles_of(const PlanArgs& args, const TileRule& rule, bool is_few,
                                   std::int32_t s) {
  const Sequence seq = sequence_at(args.layer, args.batch, kAnyKvTokens, s);
  const std::int64_t rows = seq.query_len * args.layer.group;
  const bool few = args.many.tile_rows == 0 || rows <= args.few.tile_rows;
  if (few != is_few) return 0;
  return (rows + rule.tile_rows - 1) / rule.tile_rows;
}

QUIRE_DEVICE void set_units(const LayerParams& layer, const TileRule& rule,
                            const semantics::Spans& visible, Tile* tile) {
  const semantics::KvUnits units = semantics::make_units(visible, kUnitKeys);
  tile->prefix_first = units.prefix_first;
  tile->prefix_count = units.prefix_count;
  tile->main_first = units.main_first;
  tile->main_count = units.main_count;
  const std::int32_t count = units.count();
  if (!layer.batch_invariant) {
    tile->chunk_units = count > kMaxWholeUnits || count == 0 ? 1 : count;
  } else if (rule.chunks) {
    tile->chunk_units = semantics::chunk_units(count, kMinChunkUnits);
  } else {
    tile->chunk_units = count > 0 ? count : 1;
  }
  tile->cost = count + kOverhead;
}

QUIRE_DEVICE Tile make_tile(const PlanArgs& args, const TileRule& rule, std::int32_t s,
                            std::int64_t index) {
  const LayerParams& layer = args.layer;
  const Sequence seq = sequence_at(layer, args.batch, kAnyKvTokens, s);
  const std::int64_t rows = seq.query_len * layer.group;
  const std::int64_t first = index * rule.tile_rows;
  Tile tile{};
  tile.seq = s;
  tile.rows = static_cast<std::int32_t>(semantics::min_of(rows - first, rule.tile_rows));
  const std::int64_t first_token = first / layer.group;
  const std::int64_t last_token = (first + tile.rows - 1) / layer.group;
  tile.first_sub = static_cast<std::int32_t>(first - first_token * layer.group);
  tile.first_index = static_cast<std::int32_t>(first_token);
  tile.first_token = seq.first_row + first_token;
  tile.first_pos = seq.context_len + first_token;
  tile.first_kv_row = seq.first_kv_row;
  tile.kv_len = static_cast<std::int32_t>(semantics::max_of(seq.mask.kv_len, 0));
  tile.seed = -1;
  if (args.prefixes.rule.min_blocks > 0 && args.prefixes.keys[s] > 0) {
    tile.kv_begin = args.prefixes.keys[s];
    tile.seed = args.prefixes.first_row[s] + tile.first_index;
  }
  const semantics::Spans visible =
      clip(semantics::union_spans(seq.mask, tile.first_pos, seq.context_len + last_token),
           tile.kv_begin, tile.kv_len);
  set_units(layer, rule, visible, &tile);
  return tile;
}

// The `index`-th tile over the prefix of a group.
QUIRE_DEVICE Tile make_shared_tile(const PlanArgs& args, const PrefixGroup& group,
                                   std::int64_t index) {
  const TileRule& rule = args.shared;
  const std::int64_t rows = std::int64_t{group.end_row - group.first_row} * args.layer.group;
  const std::int64_t first = index * rule.tile_rows;
  const std::int64_t first_token = first / args.layer.group;
  Tile tile{};
  tile.seq = group.seq;
  tile.rows = static_cast<std::int32_t>(semantics::min_of(rows - first, rule.tile_rows));
  tile.first_sub = static_cast<std::int32_t>(first - first_token * args.layer.group);
  tile.seed = static_cast<std::int32_t>(group.first_row + first_token);
  tile.kv_len = group.keys;
  set_units(args.layer, rule, {{0, 0}, {0, group.keys}}, &tile);
  return tile;
}

// Tile records, and where each CTA starts. make(t) is tile t without its place in the line.
template <class Team, class Make>
QUIRE_DEVICE void lay_out(const Team& team, const TileRule& rule, std::int64_t num_tiles,
                          const Make& make) {
  std::int64_t cost = 0;
  for (std::int64_t base = 0; base < num_tiles; base += team.size()) {
    const std::int64_t t = base + team.thread();
    Tile tile{};
    if (t < num_tiles) tile = make(t);
    std::int64_t total = 0;
    tile.cost_begin = cost + team.scan(std::int64_t{tile.cost} * rule.heads, &total);
    if (t < num_tiles) rule.tiles[t] = tile;
    cost += total;
  }
  team.sync();
  const std::int64_t wanted = (cost + kMinCost - 1) / kMinCost;
  const auto num_ctas = static_cast<std::int32_t>(semantics::min_of(wanted, rule.grid));
  if (team.thread() == 0) {
    *rule.header = {static_cast<std::int32_t>(num_tiles), num_ctas, cost};
  }
  for (std::int32_t c = team.thread(); c < num_ctas; c += team.size()) {
    const std::int64_t begin = c * cost / num_ctas;
    const std::int32_t t = last_at_most(static_cast<std::int32_t>(num_tiles), begin,
                                        [&](std::int32_t i) { return rule.tiles[i].cost_begin; });
    const Tile& tile = rule.tiles[t];
    rule.starts[c] = {t, static_cast<std::int32_t>((begin - tile.cost_begin) / tile.cost)};
  }
}

// The tiles of requests of few rows, or of all others.
template <class Team>
QUIRE_DEVICE void schedule(const Team& team, const PlanArgs& args, const TileRule& rule,
                           bool is_few) {
  const std::int32_t num_seqs = args.batch.num_seqs;
  std::int64_t num_tiles = 0;
  for (std::int32_t base = 0; base < num_seqs; base += team.size()) {
    const std::int32_t s = base + team.thread();
    std::int64_t total = 0;
    const std::int64_t count = s < num_seqs ? tiles_of(args, rule, is_few, s) : 0;
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
  lay_out(team, rule, num_tiles, [&](std::int64_t t) {
    const std::int32_t s =
        last_at_most(num_seqs, t, [&](std::int32_t i) { return rule.seq_tiles[i]; });
    return make_tile(args, rule, s, t - rule.seq_tiles[s]);
  });
}

// The tiles of shared prefixes. Also where nothing is shared: a graph may read the result.
template <class Team>
QUIRE_DEVICE void schedule_shared(const Team& team, const PlanArgs& args) {
  const bool shares = args.prefixes.rule.min_blocks > 0;
  const std::int32_t num_groups = shares ? prefix::form_groups(team, args) : 0;
  const PrefixGroup* groups = args.prefixes.groups;
  std::int64_t num_tiles = 0;
  for (std::int32_t g = 0; g < num_groups; ++g) num_tiles += prefix::tiles_of(args, groups[g]);
  lay_out(team, args.shared, num_tiles, [&](std::int64_t t) {
    const PrefixGroup* group = groups;
    for (; t >= prefix::tiles_of(args, *group); ++group) t -= prefix::tiles_of(args, *group);
    return make_shared_tile(args, *group, t);
  });
}

// Everything, after prefix::find_partner() of each sequence.
template <class Team>
QUIRE_DEVICE void make_plan(const Team& team, const PlanArgs& args) {
  if (args.shared.tile_rows > 0) schedule_shared(team, args);
  team.sync();
  if (args.few.tile_rows > 0) schedule(team, args, args.few, true);
  team.sync();
  if (args.many.tile_rows > 0) schedule(team, args, args.many, false);
}

}  // namespace quire::cuda
