// The CUDA plan's steps, run on the host: every (row, key) pair is visited exactly once, whatever
// the batch; and wild index tensors lead nowhere outside the buffers.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/plan/host_plan.h"

namespace quire::cuda {
namespace {

// What each packed query row visits, as ranges of keys.
class Visits {
 public:
  explicit Visits(const Batch& b) : batch_(b) {
    const std::int64_t rows = b.params.num_tokens * b.layer.group;
    keys_.resize(static_cast<std::size_t>(rows));
    tiles_.resize(static_cast<std::size_t>(rows));
  }

  void add(const WorkTile& tile, std::int64_t first_token, bool shared) {
    const std::int64_t first = first_token * batch_.layer.group + tile.first_sub;
    for (std::int64_t r = first; r < first + tile.rows; ++r) {
      if (!shared) ++tiles_[r];
      add_units(tile, tile.prefix_first, tile.prefix_count, r);
      add_units(tile, tile.main_first, tile.main_count, r);
    }
  }

  // "" or the first row that is not visited as it should be.
  std::string problem() {
    for (std::int32_t s = 0; s < batch_.params.num_seqs; ++s) {
      const Sequence seq = sequence_at(batch_.layer, batch_.params, 0, s);
      for (std::int64_t i = 0; i < seq.query_len * batch_.layer.group; ++i) {
        const std::int64_t r = seq.first_row * batch_.layer.group + i;
        const std::int64_t position = seq.context_len + i / batch_.layer.group;
        const std::int64_t seen =
            batch_.layer.mask.causal ? std::min(position + 1, seq.mask.kv_len) : seq.mask.kv_len;
        const std::string where = "sequence " + std::to_string(s) + ", row " + std::to_string(i);
        if (tiles_[r] != 1) return where + " is in " + std::to_string(tiles_[r]) + " tiles";
        std::sort(keys_[r].begin(), keys_[r].end());
        std::int64_t next = 0;
        for (const auto& [begin, end] : keys_[r]) {
          if (begin != next) return where + " visits " + std::to_string(begin) + " next";
          next = end;
        }
        if (next < seen) return where + " visits up to " + std::to_string(next);
      }
    }
    return {};
  }

 private:
  void add_units(const WorkTile& tile, std::int32_t first, std::int32_t count, std::int64_t row) {
    const std::int64_t begin = std::max<std::int64_t>(std::int64_t{first} * kKvTile, tile.kv_begin);
    const std::int64_t end = std::min<std::int64_t>(std::int64_t{first + count} * kKvTile,
                                                    std::min(tile.kv_len, tile.visible_end));
    if (begin < end) keys_[row].emplace_back(begin, end);
  }

  const Batch& batch_;
  std::vector<std::vector<std::pair<std::int64_t, std::int64_t>>> keys_;
  std::vector<int> tiles_;
};

// Tiles of shared prefixes read the blocks of each row's sequence, and every prefix_row is used by
// the sequence that it belongs to.
std::string wrong_blocks(const Batch& b, const PlanArgs& args, const WorkTile& tile) {
  const std::int64_t tokens = (tile.first_sub + tile.rows - 1) / b.layer.group + 1;
  for (std::int64_t i = tile.prefix_row; i < tile.prefix_row + tokens; ++i) {
    const std::int32_t token = args.prefixes.rows[i].token;
    const auto above = std::upper_bound(b.work_ranges.begin(), b.work_ranges.end(), token);
    const auto s = static_cast<std::int32_t>(above - b.work_ranges.begin()) - 1;
    if (args.prefixes.keys[s] != tile.kv_len) return "another prefix";
    const std::int64_t index = token - b.work_ranges[s];
    if (args.prefixes.first_row[s] + index != i) return "another prefix_row";
    const std::int64_t context = b.lens[s] - (b.work_ranges[s + 1] - b.work_ranges[s]);
    if (args.prefixes.rows[i].position != context + index) return "another position";
    const std::int64_t blocks = tile.kv_len / b.layer.block_size;
    if (!std::equal(b.row(s), b.row(s) + blocks, b.row(tile.seq))) return "other blocks";
  }
  return {};
}

std::string problem_of(const Batch& b, const HostPlan& plan) {
  const PlanArgs& args = plan.args();
  std::string problem = plan.out_of_bounds();
  if (!problem.empty()) return problem;
  Visits visits(b);
  for (const TileRule& each : args.rules) {
    const TileRule* rule = &each;
    for (std::int32_t t = 0; t < rule->header->num_tiles; ++t) {
      visits.add(rule->tiles[t], rule->tiles[t].first_token, false);
    }
  }
  for (std::int32_t t = 0; t < args.shared.header->num_tiles; ++t) {
    const WorkTile& tile = args.shared.tiles[t];
    problem = wrong_blocks(b, args, tile);
    if (!problem.empty()) return problem;
    // Rows of a tile may be anywhere: one at a time.
    for (std::int32_t r = 0; r < tile.rows; ++r) {
      WorkTile row = tile;
      row.rows = 1;
      row.first_sub = (tile.first_sub + r) % b.layer.group;
      const std::int64_t token = tile.prefix_row + (tile.first_sub + r) / b.layer.group;
      visits.add(row, args.prefixes.rows[token].token, true);
    }
  }
  return visits.problem();
}

bool same_tiles(const TileRule& a, const TileRule& b) {
  if (a.header->num_tiles != b.header->num_tiles || a.header->num_ctas != b.header->num_ctas) {
    return false;
  }
  for (std::int32_t t = 0; t < a.header->num_tiles; ++t) {
    const WorkTile& x = a.tiles[t];
    const WorkTile& y = b.tiles[t];
    if (x.seq != y.seq || x.rows != y.rows || x.prefix_row != y.prefix_row ||
        x.kv_begin != y.kv_begin || x.cost_begin != y.cost_begin) {
      return false;
    }
  }
  return true;
}

TEST(CudaPlan, EveryPairOnce) {
  std::map<std::int32_t, int> by_groups;
  int cut = 0;
  int all_whole = 0;
  int some_whole = 0;
  int by_heads = 0;
  int in_steps = 0;
  int beside_whole = 0;
  int beside_cut = 0;
  for (std::uint64_t index = 0; index < 1500; ++index) {
    Rng rng(21, index);
    const Batch b = random_batch(&rng, false);
    const auto max_rows = static_cast<std::int32_t>(rng.chance(0.2) ? 7 : 2048);
    const bool mixed = index % 2 == 0 && !b.layer.batch_invariant;
    const auto kind = mixed ? HostPlan::kMixed : HostPlan::kPlain;
    const HostPlan plan(b, max_rows, 1, kind);
    ASSERT_EQ(problem_of(b, plan), "") << "case " << index;
    const ScheduleHeader& header = *plan.args().rules[kNumRules - 1].header;
    if (mixed) {
      const ScheduleHeader& beside = *plan.args().rules[1].header;
      beside_whole += beside.whole_tiles > 0 ? 1 : 0;
      beside_cut += beside.whole_tiles < beside.num_tiles ? 1 : 0;
    }
    if (header.whole_tiles > 0) {
      ++(header.whole_tiles == header.num_tiles ? all_whole : some_whole);
      by_heads += header.heads_at_once < b.layer.num_kv_heads ? 1 : 0;
    }
    in_steps += plan.args().rules[1].header->cta_step > 1 ? 1 : 0;
    const SharedPrefixes& prefixes = plan.args().prefixes;
    std::int32_t groups = 0;
    for (std::int32_t s = 0; prefixes.rule.min_blocks > 0 && s < b.params.num_seqs; ++s) {
      if (prefixes.leader[s] >= 0 && prefixes.leader[s] != s && prefixes.keys[s] == 0) ++cut;
    }
    for (; groups < kMaxSharedPrefixes && prefixes.list[groups].keys > 0; ++groups) {
    }
    ++by_groups[groups];
    if (index % 10 != 0) continue;
    const HostPlan uncut(b, max_rows, 1, HostPlan::kNeverCut);
    ASSERT_EQ(problem_of(b, uncut), "") << "case " << index << ", never cut";
    const HostPlan together(b, max_rows, 3, kind);
    ASSERT_EQ(problem_of(b, together), "") << "case " << index << ", 3 threads";
    EXPECT_TRUE(same_tiles(plan.args().shared, together.args().shared)) << "case " << index;
    EXPECT_TRUE(same_tiles(plan.args().rules[0], together.args().rules[0])) << "case " << index;
  }
  EXPECT_GT(all_whole, 100) << "the cases do not reach whole items";
  EXPECT_GT(some_whole, 10) << "the cases do not reach whole items before cut ones";
  EXPECT_GT(in_steps, 10) << "the cases do not reach CTAs far apart";
  EXPECT_GT(beside_whole, 20) << "the cases do not reach whole items beside another kernel's";
  EXPECT_GT(beside_cut, 20) << "the cases do not reach cut items beside another kernel's";
  EXPECT_GT(by_heads, 10) << "the cases do not reach some heads at a time";
  EXPECT_GT(by_groups[1], 100) << "the cases do not reach shared prefixes";
  EXPECT_GT(by_groups[2] + by_groups[3], 50) << "the cases do not reach several groups";
  EXPECT_GT(cut, 50) << "the cases do not run out of room";
}

// CTAs of a mixed batch: as many for the prefill as its part of the time of both, at most all.
TEST(CudaPlan, MixedBatchesShareTheGridByCost) {
  const auto prefill_ctas = [](int decodes, int prompts) {
    Batch b;
    b.layer.num_heads = b.layer.group = 20;  // a token is 20 rows: the second rule's
    b.layer.num_kv_heads = 1;
    b.layer.block_size = 16;
    b.width = 256;
    for (int i = 0; i < decodes + prompts; ++i) {
      b.table.resize(b.table.size() + static_cast<std::size_t>(b.width), 0);
      b.lens.push_back(4096);
      b.work_ranges.push_back(b.work_ranges.back() + (i < decodes ? 1 : 16));
    }
    b.finish(b.work_ranges.back());
    const HostPlan plan(b, 2048, 1, HostPlan::kMixed);
    EXPECT_EQ(plan.out_of_bounds(), "");
    return plan.args().rules[kNumRules - 1].header->num_ctas;
  };
  // A grid of 7. A prompt of 320 rows is three tiles, each of 5.4 times the cost of a decode.
  EXPECT_EQ(prefill_ctas(0, 8), 7);
  EXPECT_EQ(prefill_ctas(8, 0), 0);
  EXPECT_EQ(prefill_ctas(16, 1), 4);
  EXPECT_EQ(prefill_ctas(48, 3), 4);
  EXPECT_LE(prefill_ctas(400, 1), 1);
  EXPECT_EQ(prefill_ctas(1, 100), 7);
}

// Two families that take turns, a sequence of neither, a long query.
TEST(CudaPlan, FindsWhoShares) {
  Batch b;
  b.layer.group = b.layer.num_heads = 4;
  b.layer.num_kv_heads = 1;
  b.layer.block_size = 16;
  b.layer.auto_cascade = true;
  b.width = 700;
  std::int32_t own_block = 1000;
  for (const auto& [family, same, query_len] :
       std::vector<std::array<std::int32_t, 3>>{{1, 640, 1},
                                                {2, 600, 2},
                                                {1, 620, 1},
                                                {3, 700, 1},
                                                {2, 700, 1},
                                                {1, 4, 1},
                                                {1, 700, 17}}) {
    for (std::int64_t i = 0; i < b.width; ++i) b.table.push_back(i < same ? family : own_block++);
    b.lens.push_back(10'900);
    b.work_ranges.push_back(b.work_ranges.back() + query_len);
  }
  const auto keys_of = [&](std::int64_t announced) {
    b.params.common_prefix_len = announced;
    b.finish(b.work_ranges.back());
    const HostPlan plan(b, 2048, 1);
    EXPECT_EQ(problem_of(b, plan), "");
    const std::int32_t* keys = plan.args().prefixes.keys;
    return std::vector<std::int32_t>(keys, keys + b.params.num_seqs);
  };
  EXPECT_EQ(keys_of(0), (std::vector<std::int32_t>{9920, 9600, 9920, 0, 9600, 0, 0}));
  // A promise that some do not keep.
  EXPECT_EQ(keys_of(2000), (std::vector<std::int32_t>{2000, 0, 2000, 0, 0, 0, 0}));
  EXPECT_EQ(keys_of(63), (std::vector<std::int32_t>{48, 0, 48, 0, 0, 48, 0}));
}

// "" or what is wrong with what a tile is told about its rows' masks.
std::string wrong_masks(const Batch& b, const WorkTile& tile) {
  const Sequence seq = sequence_at(b.layer, b.params, 0, tile.seq);
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const std::int32_t token = (tile.first_sub + r) / b.layer.group;
    const std::int64_t position = seq.position(tile.first_token + token);
    if (tile.first_pos + token != position) return "positions";
    const semantics::Spans row = semantics::row_spans(seq.mask, position);
    std::int64_t visited = 0;
    for (std::int32_t u = 0; u < tile.num_kv_tiles(); ++u) {
      const std::int64_t begin = std::int64_t{tile.kv_tile(u)} * kKvTile;
      for (std::int64_t j = begin; j < std::min<std::int64_t>(begin + kKvTile, tile.kv_len); ++j) {
        const bool seen = row.contains(j);
        const bool hidden = j >= tile.out_of_window_begin && j < tile.out_of_window_end;
        const bool common = (j >= tile.common[0] && j < tile.common[1]) ||
                            (j >= tile.common[2] && j < tile.common[3]);
        if (seen && (hidden || j >= tile.visible_end)) return "a key that a row sees is hidden";
        if (common && !seen) return "a key that not every row sees is common";
        visited += seen ? 1 : 0;
      }
    }
    const auto size = [](semantics::Span span) {
      return std::max<std::int64_t>(span.end - span.begin, 0);
    };
    if (visited != size(row.prefix) + size(row.main)) return "a key that a row sees is not visited";
  }
  return {};
}

TEST(CudaPlan, TilesFollowMasksAndPositions) {
  std::int64_t tiles = 0;
  for (std::uint64_t index = 0; index < 300; ++index) {
    Rng rng(23, index);
    Batch b = random_batch(&rng, false);
    b.params.common_prefix_len = 0;
    b.layer.auto_cascade = false;
    draw_masks(false, &rng, &b);
    const HostPlan plan(b, 2048, 1);
    ASSERT_EQ(plan.out_of_bounds(), "") << "case " << index;
    for (const TileRule& rule : plan.args().rules) {
      for (std::int32_t t = 0; t < rule.header->num_tiles && tiles < 3000; ++t, ++tiles) {
        ASSERT_EQ(wrong_masks(b, rule.tiles[t]), "") << "case " << index << ", tile " << t;
      }
    }
  }
}

TEST(CudaPlan, NoSharedPrefixesAtOtherPositions) {
  Rng rng(24, 0);
  Batch b = random_batch(&rng, false);
  b.params.common_prefix_len = b.layer.block_size;
  EXPECT_GT(planning::prefix_rule(b.layer, b.params, 64, 64).min_blocks, 0);
  b.kv_offset.assign(b.lens.size(), 0);
  b.params.kv_offset = b.kv_offset.data();
  EXPECT_EQ(planning::prefix_rule(b.layer, b.params, 64, 64).min_blocks, 0);
}

// What kernels work through of an encoder's keys: those that the call brings, whatever the batch
// claims.
TEST(CudaPlan, KeysThatDoNotExistAreNotWorkedThrough) {
  for (const auto& [num_tokens, work_ranges] :
       std::vector<std::pair<std::int64_t, std::vector<std::int32_t>>>{
           {3, {0, 1 << 30}},
           {84, {INT32_MIN, 2, 19, 84}},
           {300, {0, 100, INT32_MAX}},
           {300, {0, INT32_MAX, INT32_MIN, INT32_MAX}}}) {
    Batch b;
    b.layer.paged = false;
    b.layer.num_heads = 6;
    b.layer.num_kv_heads = 2;
    b.layer.group = 3;
    b.layer.mask.causal = false;
    b.work_ranges = work_ranges;
    b.lens.assign(work_ranges.size() - 1, 0);
    b.finish(num_tokens);
    const HostPlan plan(b, 2048, 1);
    ASSERT_EQ(plan.out_of_bounds(), "");
    for (const TileRule& rule : plan.args().rules) {
      ScheduleView view{
          .header = rule.header, .tiles = rule.tiles, .work_ranges = rule.work_ranges};
      view.heads = rule.heads;
      std::int64_t kv_tiles = 0;
      for (std::int32_t cta = 0; cta < rule.grid; ++cta) {
        WorkIterator iterator(view, cta);
        for (Split split; iterator.next(view, &split);) {
          const std::int64_t keys = num_tokens - split.tile.first_kv_row;
          const std::int32_t end = split.existing_end(
              static_cast<std::int32_t>(std::max<std::int64_t>(keys, 0)), kKvTile);
          ASSERT_GE(end, split.kv_tile_begin);
          ASSERT_LE(end, split.kv_tile_end);
          kv_tiles += end - split.kv_tile_begin;
        }
      }
      const std::int64_t most = (num_tokens + kKvTile - 1) / kKvTile;
      EXPECT_LE(kv_tiles, most * rule.header->num_tiles * rule.heads) << work_ranges[1];
    }
  }
}

TEST(CudaPlan, WildIndicesStayInside) {
  for (std::uint64_t index = 0; index < 3000; ++index) {
    Rng rng(22, index);
    Batch b = random_batch(&rng, true);
    if (index % 2 != 0) draw_masks(true, &rng, &b);
    if (rng.chance(0.3)) {
      for (std::int32_t& value : b.work_ranges) value = wild_int32(&rng);
    }
    const HostPlan plan(b, static_cast<std::int32_t>(rng.pick<std::int64_t>({1, 7, 2048})), 1);
    ASSERT_EQ(plan.out_of_bounds(), "") << "case " << index;
  }
}

}  // namespace
}  // namespace quire::cuda
