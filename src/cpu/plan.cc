#include "cpu/plan.h"

#include <algorithm>
#include <limits>

#include "cpu/tuning.h"

namespace quire::cpu {

using semantics::Spans;

void Schedule::clear() {
  tiles.clear();
  ranges.clear();
  splits.clear();
  num_partials = 0;
  partial_rows = 0;
}

namespace {

// Direct attention has the keys that the key tensor has, which the plan does not know; the call
// clamps again (WorkItem::visible_end).
constexpr std::int64_t kAnyKvTokens = std::numeric_limits<std::int32_t>::max();

void set_kv_tiles(const TilePolicy& policy, const Spans& visible, WorkTile* tile) {
  tile->kv_tile = policy.kv_tile;
  tile->decode = policy.decode;
  tile->kv_tiles = planning::kv_tiles_of(visible, policy.kv_tile);
  const std::int32_t num_kv_tiles = tile->kv_tiles.count();
  tile->kv_tiles_per_chunk =
      policy.splittable ? planning::kv_tiles_per_chunk(num_kv_tiles, policy.min_kv_tiles_per_chunk)
                        : std::max(num_kv_tiles, 1);
  tile->num_kv_chunks = planning::num_kv_chunks(num_kv_tiles, tile->kv_tiles_per_chunk);
}

// What the rows of a shared prefix's tile see of it together, as one span.
Spans shared_tile_spans(const LayerParams& layer, const BatchParams& batch, const WorkPlan& plan,
                        const WorkTile& tile) {
  Spans all;
  for (std::int32_t i = 0; i < tile.num_tokens; ++i) {
    const SharedRow& shared = plan.shared_rows[tile.first_row + i];
    const Sequence seq = sequence_at(layer, batch, kAnyKvTokens, shared.seq);
    const Spans row =
        clip(semantics::row_spans(seq.mask, seq.position(shared.row)), tile.kv_begin, tile.kv_end);
    for (const semantics::Span part : {row.prefix, row.main}) {
      if (part.empty()) continue;
      all.main = all.main.empty() ? part
                                  : semantics::Span{std::min(all.main.begin, part.begin),
                                                    std::max(all.main.end, part.end)};
    }
  }
  return all;
}

// Rows before `*next_row` are taken: where wild row offsets overlap, a row belongs to the first
// sequence that claims it, so that no two threads write it.
void add_sequence(const LayerParams& layer, const BatchParams& batch, std::int32_t s,
                  std::int64_t* next_row, WorkPlan* plan) {
  const Sequence seq = sequence_at(layer, batch, kAnyKvTokens, s);
  if (seq.query_len == 0) return;
  const TilePolicy policy = tile_policy(layer, seq.query_len);
  const std::int64_t shared_prefix = plan->prefix_len[s];
  const std::int64_t taken = std::max<std::int64_t>(*next_row - seq.first_row, 0);
  *next_row = std::max(*next_row, seq.first_row + seq.query_len);
  for (std::int64_t i = taken; i < seq.query_len; i += policy.tokens) {
    WorkTile tile;
    tile.seq = s;
    tile.first_row = seq.first_row + i;
    tile.num_tokens =
        static_cast<std::int32_t>(std::min<std::int64_t>(policy.tokens, seq.query_len - i));
    tile.first_shared_row = shared_prefix > 0 ? plan->first_shared_row[s] + i : -1;
    tile.kv_begin = shared_prefix;
    tile.kv_end = seq.mask.kv_len;
    const std::int64_t first_pos = seq.first_pos + i;
    const Spans visible =
        clip(semantics::union_spans(seq.mask, first_pos, first_pos + tile.num_tokens - 1),
             tile.kv_begin, tile.kv_end);
    set_kv_tiles(policy, visible, &tile);
    plan->main.tiles.push_back(tile);
  }
}

// Decode items take several kv heads as long as every thread still finds enough items. Which heads
// go together changes no result.
void set_kv_heads(const LayerParams& layer, int num_threads, Schedule* schedule) {
  std::int64_t num_chunks = 0;
  for (const WorkTile& tile : schedule->tiles) num_chunks += tile.num_kv_chunks;
  const std::int64_t wanted = std::int64_t{num_threads} * kItemsPerThread;
  const std::int64_t most =
      num_threads == 1 ? layer.num_kv_heads
                       : std::max<std::int64_t>(num_chunks * layer.num_kv_heads / wanted, 1);
  for (WorkTile& tile : schedule->tiles) {
    if (!tile.decode) continue;
    tile.kv_heads =
        static_cast<std::int32_t>(std::min<std::int64_t>(most_kv_heads(layer, tile.kv_tile), most));
  }
}

void note_sizes(const LayerParams& layer, const Schedule& schedule, WorkPlan* plan) {
  for (const WorkTile& tile : schedule.tiles) {
    plan->max_rows = std::max(plan->max_rows, tile.num_tokens * layer.group);
    plan->max_item_rows = std::max(plan->max_item_rows, item_rows(layer, tile));
    plan->max_item_keys = std::max(plan->max_item_keys, tile.kv_heads * tile.kv_tile);
  }
}

// Of `num_kv_tiles` kv tiles of an item, with its overhead or without.
std::int64_t work_cost(const LayerParams& layer, const WorkTile& tile, std::int32_t num_kv_tiles,
                       bool with_overhead) {
  const std::int64_t rows = std::int64_t{tile.num_tokens} * layer.group;
  const std::int64_t overhead = with_overhead ? item_overhead(layer, rows) : 0;
  return tile.kv_heads * (kv_tile_cost(layer, rows, tile.kv_tile) * num_kv_tiles + overhead);
}

// The overhead counts with the first chunk.
std::int64_t chunk_cost(const LayerParams& layer, const WorkTile& tile, std::int32_t kv_chunk) {
  const std::int32_t left = tile.kv_tiles.count() - kv_chunk * tile.kv_tiles_per_chunk;
  return work_cost(layer, tile, std::clamp(left, 0, tile.kv_tiles_per_chunk), kv_chunk == 0);
}

std::int64_t item_cost(const LayerParams& layer, const WorkTile& tile) {
  return work_cost(layer, tile, tile.kv_tiles.count(), true);
}

// Cuts the items of a schedule into ranges. Cuts fall between items, which costs nothing, unless
// that would leave ranges uneven by more than an eighth.
class RangeCutter {
 public:
  RangeCutter(const LayerParams& layer, std::int32_t num_ranges, Schedule* schedule)
      : layer_(layer), schedule_(schedule) {
    for (const WorkTile& tile : schedule->tiles) {
      total_ += item_cost(layer, tile) * tile.num_items(layer);
    }
    target_ = std::max<std::int64_t>(total_ / num_ranges, 1);
  }

  void run() {
    const auto num_tiles = static_cast<std::int32_t>(schedule_->tiles.size());
    for (std::int32_t t = 0; t < num_tiles; ++t) {
      const WorkTile& tile = schedule_->tiles[t];
      const std::int64_t cost = item_cost(layer_, tile);
      const bool worth_splitting = tile.num_kv_chunks > 1 && cost > target_ / 8;
      for (std::int32_t i = 0; i < tile.num_items(layer_); ++i) {
        if (worth_splitting && filled_ + cost > target_ + target_ / 8) {
          split_item(tile, t, i);
        } else {
          // Stop before an item that would overfill the range by more than it underfills it.
          if (filled_ > 0 && filled_ + cost / 2 > target_) cut({t, i, 0});
          filled_ += cost;
        }
      }
    }
    if (num_tiles > 0) cut({num_tiles, 0, 0});
  }

 private:
  void split_item(const WorkTile& tile, std::int32_t t, std::int32_t i) {
    SplitItem item{t, i, 0, schedule_->num_partials};
    for (std::int32_t chunk = 0; chunk < tile.num_kv_chunks; ++chunk) {
      const std::int64_t cost = chunk_cost(layer_, tile, chunk);
      if (filled_ > 0 && filled_ + cost / 2 > target_) {
        if (chunk > 0 && item.first_cut == 0) item.first_cut = chunk;
        if (chunk > 0) last_partial_ = item.partial;
        cut({t, i, chunk});
        if (chunk > 0) first_partial_ = item.partial;
      }
      filled_ += cost;
    }
    if (item.first_cut == 0) return;
    schedule_->splits.push_back(item);
    schedule_->num_partials += tile.num_kv_chunks;
    schedule_->partial_rows = std::max(schedule_->partial_rows, item_rows(layer_, tile));
  }

  void cut(WorkPoint end) {
    if (end == begin_) return;
    schedule_->ranges.push_back({begin_, end, first_partial_, last_partial_});
    begin_ = end;
    first_partial_ = last_partial_ = -1;
    filled_ = 0;
  }

  const LayerParams& layer_;
  Schedule* schedule_;
  std::int64_t total_ = 0;
  std::int64_t target_ = 1;
  std::int64_t filled_ = 0;
  WorkPoint begin_;
  std::int64_t first_partial_ = -1;
  std::int64_t last_partial_ = -1;
};

}  // namespace

void build_plan(const LayerParams& layer, const BatchParams& batch, int num_threads,
                WorkPlan* plan) {
  plan->shared.clear();
  plan->main.clear();
  plan->shared_rows.clear();
  plan->max_rows = plan->max_item_rows = plan->max_item_keys = 0;
  find_shared_prefixes(layer, batch, plan);
  const TilePolicy shared_policy = shared_prefix_policy(layer);
  for (WorkTile& tile : plan->shared.tiles) {
    set_kv_tiles(shared_policy, shared_tile_spans(layer, batch, *plan, tile), &tile);
  }
  std::int64_t next_row = 0;
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    add_sequence(layer, batch, s, &next_row, plan);
  }
  for (Schedule* schedule : {&plan->shared, &plan->main}) {
    set_kv_heads(layer, num_threads, schedule);
    note_sizes(layer, *schedule, plan);
  }
  const std::int32_t num_ranges = num_threads == 1 ? 1 : num_threads * kRangesPerThread;
  RangeCutter(layer, num_ranges, &plan->shared).run();
  RangeCutter(layer, num_ranges, &plan->main).run();
}

namespace {

void append(const LayerParams& layer, const char* name, const Schedule& schedule,
            std::string* text) {
  const auto number = [](auto value) { return std::to_string(value); };
  for (const WorkTile& tile : schedule.tiles) {
    *text += std::string(name) + " tile: sequence " + number(tile.seq) + ", rows " +
             number(tile.first_row) + "+" + number(tile.num_tokens) + " x " + number(layer.group) +
             " heads, kv tiles of " + number(tile.kv_tile) +
             " keys: " + number(tile.kv_tiles.prefix_first) + "+" +
             number(tile.kv_tiles.prefix_count) + ", " + number(tile.kv_tiles.main_first) + "+" +
             number(tile.kv_tiles.main_count) + ", kv chunks " + number(tile.num_kv_chunks) +
             ", kv heads together " + number(tile.kv_heads) + "\n";
  }
  for (const WorkRange& range : schedule.ranges) {
    *text += std::string(name) + " range: (" + number(range.begin.tile) + ", " +
             number(range.begin.item) + ", " + number(range.begin.kv_chunk) + ") to (" +
             number(range.end.tile) + ", " + number(range.end.item) + ", " +
             number(range.end.kv_chunk) + ")\n";
  }
}

}  // namespace

std::string to_string(const LayerParams& layer, const WorkPlan& plan) {
  std::string text;
  append(layer, "shared", plan.shared, &text);
  append(layer, "main", plan.main, &text);
  return text;
}

}  // namespace quire::cpu
