// The CUDA plan on the host: batches at random, a team of host threads in the place of a CTA, and a
// plan made by its steps in buffers of just the size that it may use.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "conformance/random.h"
#include "cuda/kernel/work_iterator.cuh"
#include "cuda/plan/steps.h"

namespace quire::cuda {

using conformance::Rng;

inline constexpr std::int32_t kKvTile = 64;

// What the threads of a team exchange.
struct Meeting {
  explicit Meeting(std::int32_t count) : size(count), values(count), barrier(count) {}
  std::int32_t size;
  std::vector<std::int64_t> values;
  std::barrier<> barrier;
};

// A CTA or a warp of host threads.
class HostTeam {
 public:
  HostTeam(Meeting* meeting, std::int32_t thread) : meeting_(meeting), thread_(thread) {}
  std::int32_t thread() const { return thread_; }
  std::int32_t lane() const { return thread_; }
  std::int32_t size() const { return meeting_->size; }
  void sync() const { meeting_->barrier.arrive_and_wait(); }
  void add(std::int32_t* at, std::int32_t value) const { std::atomic_ref(*at) += value; }
  std::int32_t take(std::int32_t* at) const { return std::atomic_ref(*at).fetch_add(1); }
  void lower(std::int32_t* at, std::int32_t value) const {
    std::atomic_ref<std::int32_t> here(*at);
    for (std::int32_t old = here; value < old && !here.compare_exchange_weak(old, value);) {
    }
  }
  void raise(std::int32_t* at, std::int32_t value) const {
    std::atomic_ref<std::int32_t> here(*at);
    for (std::int32_t old = here; value > old && !here.compare_exchange_weak(old, value);) {
    }
  }
  std::int64_t scan(std::int64_t value, std::int64_t* total) const {
    exchange(value);
    std::int64_t before = *total = 0;
    for (std::int32_t i = 0; i < size(); ++i) {
      if (i < thread_) before += meeting_->values[i];
      *total += meeting_->values[i];
    }
    sync();
    return before;
  }
  std::int32_t least(std::int32_t value) const {
    exchange(value);
    const auto smallest = static_cast<std::int32_t>(
        *std::min_element(meeting_->values.begin(), meeting_->values.end()));
    sync();
    return smallest;
  }

 private:
  void exchange(std::int64_t value) const {
    meeting_->values[thread_] = value;
    sync();
  }
  Meeting* meeting_;
  std::int32_t thread_;
};

// The index tensors of a batch.
struct Batch {
  LayerParams layer;
  BatchParams params;
  std::vector<std::int32_t> work_ranges{0};
  std::vector<std::int32_t> lens;
  std::vector<std::int32_t> table;
  std::int64_t width = 0;
  // Masks and positions of sequences.
  std::vector<std::uint8_t> causal;
  std::vector<std::int32_t> ranges, prefixes, kv_offset, kv_stride, q_offset;

  const std::int32_t* row(std::int32_t s) const { return table.data() + s * width; }
  void finish(std::int64_t num_tokens) {
    params.num_seqs = static_cast<std::int32_t>(lens.size());
    params.num_tokens = num_tokens;
    params.query_start_loc = work_ranges.data();
    params.seq_lens = lens.data();
    params.block_table = table.data();
    params.table_stride = params.table_width = width;
  }
};

// Sequences in a few families; those of a family start with the same blocks.
inline Batch random_batch(Rng* rng, bool wild) {
  Batch b;
  b.layer.group = static_cast<std::int32_t>(rng->pick<std::int64_t>({1, 4, 4, 7, 71}));
  b.layer.num_kv_heads = 2;
  b.layer.num_heads = b.layer.group * 2;
  b.layer.head_size = b.layer.head_size_v = 64;
  b.layer.block_size = static_cast<std::int32_t>(rng->pick<std::int64_t>({1, 16, 16, 48, 64}));
  b.layer.auto_cascade = true;
  b.layer.mask.causal = !rng->chance(0.1);
  const std::int64_t num_seqs = rng->uniform(1, rng->chance(0.2) ? 90 : 12);
  const std::int64_t families = rng->pick<std::int64_t>({1, 2, 3, 20});
  const std::int64_t most_blocks = rng->uniform(1, 16'000 / b.layer.block_size + 4);
  b.width = most_blocks + rng->uniform(0, 3);
  std::int32_t next_block = 1000;
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t family = rng->uniform(0, families - 1);
    const std::int64_t same = rng->chance(0.1) ? 0 : rng->uniform(most_blocks / 2, most_blocks);
    for (std::int64_t i = 0; i < b.width; ++i) {
      b.table.push_back(static_cast<std::int32_t>(i < same ? family : next_block++));
    }
    const std::int64_t longest = b.width * b.layer.block_size + (wild ? 99 : 0);
    const std::int64_t seq_len = rng->uniform(rng->chance(0.05) ? 0 : longest * 2 / 3, longest);
    std::int64_t query_len = rng->pick<std::int64_t>({0, 1, 1, 1, 1, 2, 5, 40});
    query_len = std::min(query_len, seq_len);
    b.lens.push_back(static_cast<std::int32_t>(seq_len));
    b.work_ranges.push_back(b.work_ranges.back() + static_cast<std::int32_t>(query_len));
  }
  std::int64_t num_tokens = b.work_ranges.back();
  if (wild) {
    for (std::int32_t& value : b.work_ranges) {
      if (rng->chance(0.2)) value = static_cast<std::int32_t>(rng->uniform(-9, num_tokens + 9));
    }
    for (std::int32_t& value : b.lens) {
      if (rng->chance(0.1)) value = rng->pick({-1, INT32_MIN, INT32_MAX, 1 << 20});
    }
    num_tokens = rng->uniform(0, num_tokens);
  } else if (rng->chance(0.5)) {
    b.params.common_prefix_len = rng->uniform(1, most_blocks * b.layer.block_size);
  }
  b.finish(num_tokens);
  return b;
}

inline std::int32_t wild_int32(Rng* rng) {
  return rng->chance(0.5)
             ? rng->pick({INT32_MIN, INT32_MIN + 1, -1, 0, 1, INT32_MAX - 1, INT32_MAX})
             : static_cast<std::int32_t>(rng->uniform(-20, 400));
}

// Adds windows, ranges, prefixes, positions; wild: whatever the tensors can hold, and batches whose
// keys are no cache's.
inline void draw_masks(bool wild, Rng* rng, Batch* b) {
  Mask& mask = b->layer.mask;
  mask.window =
      rng->pick({WindowKind::kNone, WindowKind::kLeft, WindowKind::kBoth, WindowKind::kChunked});
  mask.window_size = rng->uniform(1, 3000);
  if (wild && rng->chance(0.2)) mask.window_size = INT32_MAX;
  mask.chunk_lookback = wild ? rng->pick<std::int64_t>({0, 2, INT32_MAX}) : rng->uniform(0, 2);
  mask.clamp_ranges = mask.window != WindowKind::kChunked && rng->chance(0.5);
  if (wild) b->layer.paged = rng->chance(0.6);
  const auto num_seqs = static_cast<std::int64_t>(b->lens.size());
  const auto fill = [&](std::int64_t count, std::int64_t most, std::vector<std::int32_t>* values) {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto value = static_cast<std::int32_t>(rng->uniform(0, most));
      values->push_back(wild && rng->chance(0.5) ? wild_int32(rng) : value);
    }
    return values->data();
  };
  BatchParams& p = b->params;
  if (rng->chance(0.3)) {
    for (std::int64_t s = 0; s < num_seqs; ++s) b->causal.push_back(rng->chance(0.5) ? 1 : 0);
    p.causal = b->causal.data();
  }
  if (rng->chance(0.3)) {
    p.num_ranges = 2;
    p.ranges = fill(num_seqs * 4, 20'000, &b->ranges);
  }
  if (rng->chance(0.3)) p.visible_prefix_lens = fill(num_seqs, 4000, &b->prefixes);
  if (rng->chance(0.4)) p.kv_offset = fill(num_seqs, 9000, &b->kv_offset);
  if (rng->chance(0.4)) p.kv_stride = fill(num_seqs, 5, &b->kv_stride);
  if (rng->chance(0.4)) p.q_offset = fill(num_seqs, 60'000, &b->q_offset);
}

// A plan with buffers of just the size that it may use.
class HostPlan {
 public:
  // `kMixed`: the last rule's kernel runs beside the second's, as in a mixed batch; `kNeverCut`: it
  // knows whole items only.
  enum Kind { kPlain, kMixed, kNeverCut };
  HostPlan(const Batch& b, std::int32_t max_rows, int num_threads, Kind kind = kPlain) : batch_(b) {
    const auto seqs = static_cast<std::size_t>(b.params.num_seqs);
    args_.layer = b.layer;
    args_.batch = b.params;
    for (int i = 0; i < kNumRules; ++i) {
      constexpr int kRows[] = {16, 32, 64, 128};
      static_assert(sizeof kRows / sizeof *kRows == kNumRules);
      set_rule(kRows[i], b.params.num_tokens, b.params.num_seqs, i, &args_.rules[i]);
    }
    if (kind == kNeverCut) args_.rules[kNumRules - 1].policy.max_uncut = cuda::kNeverCut;
    if (kind == kMixed) {
      args_.rules[1].buckets = &buckets_[1];
      args_.rules[1].policy.uncut_percent = 900;
      args_.rules[kNumRules - 1].beside = 1;
    }
    share_out(args_.rules, kNumRules);
    set_rule(128, max_rows, kMaxSharedPrefixes, kNumRules, &args_.shared);
    SharedPrefixes& prefixes = args_.prefixes;
    prefixes.rule = planning::prefix_rule(b.layer, b.params, 64, 64);
    std::int32_t** const lists[] = {&prefixes.leader, &prefixes.blocks, &prefixes.members,
                                    &prefixes.least,  &prefixes.keys,   &prefixes.first_row};
    for (int i = 0; i < 6; ++i) {
      lists_[i].assign(seqs, -7);
      *lists[i] = lists_[i].data();
    }
    groups_.resize(kMaxSharedPrefixes);
    rows_.resize(static_cast<std::size_t>(max_rows));
    prefixes.list = groups_.data();
    prefixes.rows = rows_.data();
    prefixes.max_rows = max_rows;
    run(num_threads);
  }

  const PlanArgs& args() const { return args_; }

  // "" or what is wrong with where the plan points to.
  std::string out_of_bounds() const {
    for (int i = 0; i <= kNumRules; ++i) {
      const TileRule* rule = i < kNumRules ? &args_.rules[i] : &args_.shared;
      const ScheduleHeader& header = *rule->header;
      if (header.num_tiles > rule->max_tiles || header.num_ctas > rule->grid) return "counts";
      if (rule->policy.max_uncut == cuda::kNeverCut && header.whole_tiles != header.num_tiles) {
        return "an item that may be cut";
      }
      std::int64_t cost = 0;
      for (std::int32_t t = 0; t < header.num_tiles; ++t) {
        const WorkTile& tile = rule->tiles[t];
        const bool sorted = header.num_tiles == header.whole_tiles;
        if (!sorted && tile.cost_begin != cost) return "cost";
        cost += std::int64_t{tile.cost} * rule->heads;
        const std::string problem = out_of_bounds(tile, rule == &args_.shared);
        if (!problem.empty()) return problem + " of tile " + std::to_string(t);
      }
      const std::string problem = badly_walked(*rule);
      if (!problem.empty()) return problem;
    }
    return {};
  }

  // "" or what is wrong with how CTAs find their work: each kv_tile once, in order, and every CTA
  // that works on part of an item knows the others.
  std::string badly_walked(const TileRule& rule) const {
    ScheduleView view;
    view.header = rule.header;
    view.tiles = rule.tiles;
    view.work_ranges = rule.work_ranges;
    view.first_tiles = rule.first_tiles;
    view.heads = rule.heads;
    const ScheduleHeader& header = *rule.header;
    if (header.whole_tiles < 0 || header.whole_tiles > header.num_tiles) return "whole tiles";
    std::set<std::pair<std::int32_t, std::int32_t>> whole;
    for (std::int32_t i = 0; i < header.whole_tiles * rule.heads; ++i) {
      std::int32_t t = -1;
      std::int32_t h = -1;
      header.whole_item(i, rule.heads, &t, &h);
      if (t < 0 || t >= header.whole_tiles || h < 0 || h >= rule.heads) return "a whole item";
      whole.emplace(t, h);
    }
    if (whole.size() != static_cast<std::size_t>(header.whole_tiles * rule.heads)) {
      return "a whole item comes twice";
    }
    std::int32_t tile = header.whole_tiles;
    std::int32_t head = 0;
    std::int32_t kv_tile = 0;
    std::vector<std::int32_t> at_work;  // CTAs that share the item
    std::vector<ItemCtas> claims;
    for (std::int32_t cta = 0; cta < rule.grid; ++cta) {
      WorkIterator iterator(view, cta);
      Split split;
      for (bool is_first = true; iterator.next(view, &split); is_first = false) {
        if (is_first && view.first_tiles != nullptr &&
            std::memcmp(view.first_tiles + cta, &split.tile, sizeof split.tile) != 0) {
          return "CTA " + std::to_string(cta) + " has another first tile";
        }
        if (tile == rule.header->num_tiles) return "more items than there are";
        if (cta % header.cta_step != 0) return "a CTA works out of step";
        if (cta >= header.num_ctas * header.cta_step) return "a CTA works that should not";
        const WorkTile& expected = rule.tiles[tile];
        if (split.tile.cost_begin != expected.cost_begin || split.head != head ||
            split.kv_tile_begin != kv_tile || split.kv_tile_end > expected.num_kv_tiles()) {
          return "CTA " + std::to_string(cta) + " is out of line";
        }
        if (!split.whole()) {
          if (split.kv_tile_begin == split.kv_tile_end) return "an empty part";
          if (split.kv_tile_begin % expected.kv_chunk != 0) return "a cut inside a chunk";
          at_work.push_back(cta);
          claims.push_back(iterator.item_ctas(split));
        }
        kv_tile = split.kv_tile_end;
        if (kv_tile < expected.num_kv_tiles()) continue;
        for (const ItemCtas& claim : claims) {
          if (claim.first != at_work.front() || claim.last < at_work.back() ||
              claim.count != static_cast<std::int32_t>(at_work.size())) {
            return "CTA " + std::to_string(cta) + " miscounts its item's num_partials";
          }
        }
        std::int32_t num_partials = 0;
        for (std::size_t i = 1; i < at_work.size(); ++i)
          num_partials += rule.work_ranges[at_work[i]].num_partials;
        if (num_partials < static_cast<std::int32_t>(at_work.size()) - 1)
          return "a part is missing";
        // Whoever waits for partials waits for all of these CTAs', and for no other's.
        for (const ItemCtas& claim : claims) {
          for (std::int32_t c = claim.first + 1; c <= claim.last; ++c) {
            const bool works = std::count(at_work.begin(), at_work.end(), c) > 0;
            if (works != (rule.work_ranges[c].num_partials > 0)) return "a part that is not there";
          }
        }
        at_work.clear();
        claims.clear();
        kv_tile = 0;
        head = head + 1 == rule.heads ? 0 : head + 1;
        if (head == 0) ++tile;
      }
    }
    return tile == rule.header->num_tiles ? "" : "items are left over";
  }

 private:
  void set_rule(std::int32_t tile_rows, std::int64_t tokens, std::int64_t more, int index,
                TileRule* rule) {
    rule->policy.rows = rule->max_rows = tile_rows;
    rule->policy.kv_tile = kKvTile;
    rule->policy.item_overhead = 2;
    rule->policy.min_range_cost = rule->policy.cut_cost = 6;
    rule->policy.max_uncut = rule->policy.min_chunk = 8;
    rule->heads = args_.layer.num_kv_heads;
    const bool last = index == kNumRules - 1;
    rule->grid = last ? 7 : 40;
    // The last rule's kernel knows whole items.
    rule->buckets = last ? &buckets_[index] : nullptr;
    rule->l2_kv_tiles = 40;
    // The second's is limited by memory.
    rule->policy.uncut_percent = index == 1 ? 225 : 0;
    rule->policy.cost_ns = index == 1 ? 500 : 2700;
    rule->least_cost_ps = 12'000;
    rule->max_tiles =
        static_cast<std::int32_t>(more + (tokens * args_.layer.group + tile_rows - 1) / tile_rows);
    tiles_[index].resize(static_cast<std::size_t>(rule->max_tiles));
    starts_[index].resize(41);
    seq_tiles_[index].resize(static_cast<std::size_t>(args_.batch.num_seqs));
    rule->header = &headers_[index];
    rule->tiles = tiles_[index].data();
    rule->work_ranges = starts_[index].data();
    if (index == 1) {
      first_tiles_.resize(40);
      rule->first_tiles = first_tiles_.data();
    }
    rule->seq_tiles = seq_tiles_[index].data();
  }

  void run(int num_threads) {
    Meeting meeting(num_threads);
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
      threads.emplace_back([&, i] {
        const HostTeam team(&meeting, i);
        const bool looks = args_.prefixes.rule.min_blocks > 0;
        for (std::int32_t s = 0; looks && s < args_.batch.num_seqs; ++s) {
          cascade::find_partner(team, args_, s);
        }
        team.sync();
        make_plan(team, args_);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  std::string out_of_bounds(const WorkTile& tile, bool shared) const {
    const BatchParams& batch = batch_.params;
    if (tile.seq < 0 || tile.seq >= batch.num_seqs) return "sequence";
    const std::int64_t most_keys = batch_.layer.paged ? batch.table_width * batch_.layer.block_size
                                                      : kAnyKvTokens - tile.first_kv_row;
    if (tile.first_kv_row < 0 || tile.kv_begin < 0 || tile.kv_len < 0 || tile.kv_len > most_keys) {
      return "keys";
    }
    const auto is_inside = [&](std::int32_t key) { return 0 <= key && key <= tile.kv_len; };
    for (const std::int32_t key : tile.common) {
      if (!is_inside(key)) return "common keys";
    }
    if (!is_inside(tile.out_of_window_begin) || !is_inside(tile.out_of_window_end))
      return "hidden keys";
    const std::int64_t num_kv_tiles = (std::int64_t{tile.kv_len} + kKvTile - 1) / kKvTile;
    if (tile.prefix_first < 0 || tile.prefix_count < 0 || tile.main_first < 0 ||
        tile.main_count < 0 || std::int64_t{tile.prefix_first} + tile.prefix_count > num_kv_tiles ||
        std::int64_t{tile.main_first} + tile.main_count > num_kv_tiles) {
      return "kv_tiles";
    }
    if (tile.rows < 1 || tile.first_sub < 0 || tile.first_sub >= batch_.layer.group) return "rows";
    const std::int64_t tokens = (tile.first_sub + tile.rows - 1) / batch_.layer.group + 1;
    if (tile.prefix_row >= 0 && tile.prefix_row + tokens > args_.prefixes.max_rows)
      return "prefix_partials";
    if (!shared) {
      return tile.first_token < 0 || tile.first_token + tokens > batch.num_tokens ? "tokens" : "";
    }
    if (tile.prefix_row < 0) return "no prefix_partials";
    for (std::int64_t i = 0; i < tokens; ++i) {
      const SharedRow& row = args_.prefixes.rows[tile.prefix_row + i];
      if (row.token < 0 || row.token >= batch.num_tokens) return "shared token";
      if (row.position < tile.kv_len) return "position";
    }
    return {};
  }

  const Batch& batch_;
  PlanArgs args_;
  ScheduleHeader headers_[kNumRules + 1];
  CostBuckets buckets_[kNumRules + 1];
  std::vector<WorkTile> tiles_[kNumRules + 1];
  std::vector<WorkRange> starts_[kNumRules + 1];
  std::vector<WorkTile> first_tiles_;
  std::vector<std::int32_t> seq_tiles_[kNumRules + 1];
  std::vector<std::int32_t> lists_[6];
  std::vector<SharedPrefix> groups_;
  std::vector<SharedRow> rows_;
};

}  // namespace quire::cuda
