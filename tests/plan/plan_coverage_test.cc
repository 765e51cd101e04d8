// The plan as data: every (row, key) pair is visited exactly once, whatever the batch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <tuple>
#include <vector>

#include "api/lower.h"
#include "conformance/runner.h"
#include "cpu/plan.h"

namespace quire::cpu {
namespace {

using conformance::Case;
using conformance::CaseSpec;

// How often each key of each row is visited, by sequence and kv head.
class Visits {
 public:
  explicit Visits(const Case& c) : num_kv_heads_(c.spec.config.num_kv_heads) {
    for (std::int64_t s = 0; s < c.num_seqs(); ++s) {
      first_row_.push_back(static_cast<std::int64_t>(c.query_start_loc.get({s})));
      const auto end = static_cast<std::int64_t>(c.query_start_loc.get({s + 1}));
      query_len_.push_back(end - first_row_.back());
      kv_len_.push_back(kv_len_of(c, s));
      counts_.emplace_back(query_len_.back() * num_kv_heads_ * kv_len_.back(), 0);
      rows_.emplace_back(query_len_.back() * num_kv_heads_, 0);
    }
  }

  static std::int64_t kv_len_of(const Case& c, std::int64_t s) {
    if (c.spec.has_cache()) return static_cast<std::int64_t>(c.seq_lens.get({s}));
    const conformance::Tensor& starts = c.kv_start_loc ? c.kv_start_loc : c.query_start_loc;
    return static_cast<std::int64_t>(starts.get({s + 1}) - starts.get({s}));
  }

  void add_row(std::int64_t s, std::int64_t row, std::int64_t head) {
    ++rows_[s][(row - first_row_[s]) * num_kv_heads_ + head];
  }
  void add_keys(std::int64_t s, std::int64_t row, std::int64_t head, std::int64_t begin,
                std::int64_t end) {
    const std::int64_t at = ((row - first_row_[s]) * num_kv_heads_ + head) * kv_len_[s];
    for (std::int64_t j = begin; j < std::min(end, kv_len_[s]); ++j) ++counts_[s][at + j];
  }

  // "" or the first pair that is not visited as it should be.
  std::string problem(const Case& c) const {
    for (std::int64_t s = 0; s < c.num_seqs(); ++s) {
      for (std::int64_t i = 0; i < query_len_[s]; ++i) {
        const bool written = first_row_[s] + i < c.spec.num_actual_tokens();
        for (std::int64_t h = 0; h < num_kv_heads_; ++h) {
          const std::int64_t at = i * num_kv_heads_ + h;
          const std::string where = "sequence " + std::to_string(s) + ", row " + std::to_string(i) +
                                    ", kv head " + std::to_string(h);
          if (rows_[s][at] != (written ? 1 : 0)) {
            return where + " is in " + std::to_string(rows_[s][at]) + " tiles";
          }
          for (std::int64_t j = 0; written && j < kv_len_[s]; ++j) {
            const int count = counts_[s][at * kv_len_[s] + j];
            if (count == 1 || (count == 0 && !conformance::is_visible(c, s, i, j))) continue;
            return where + " visits key " + std::to_string(j) + " " + std::to_string(count) +
                   " times";
          }
        }
      }
    }
    return {};
  }

 private:
  std::int64_t num_kv_heads_;
  std::vector<std::int64_t> first_row_, query_len_, kv_len_;
  std::vector<std::vector<int>> counts_;  // [seq][row, head, key]
  std::vector<std::vector<int>> rows_;    // [seq][row, head]
};

using Chunk = std::tuple<std::int32_t, std::int32_t, std::int32_t>;  // tile, item, kv chunk

// The kv chunks of a schedule as its ranges visit them.
std::vector<Chunk> chunks_visited(const LayerParams& layer, const Schedule& schedule) {
  std::vector<Chunk> visited;
  const auto num_tiles = static_cast<std::int32_t>(schedule.tiles.size());
  for (const WorkRange& range : schedule.ranges) {
    WorkPoint at = range.begin;
    while (at != range.end) {
      if (at.tile >= num_tiles) {
        ADD_FAILURE() << "a range runs past the last tile";
        return visited;
      }
      const WorkTile& tile = schedule.tiles[at.tile];
      visited.emplace_back(at.tile, at.item, at.kv_chunk);
      ++at.kv_chunk;
      const bool stops_here = at == range.end;
      if (stops_here || at.kv_chunk < tile.num_kv_chunks) continue;
      at = at.item + 1 < tile.num_items(layer) ? WorkPoint{at.tile, at.item + 1, 0}
                                               : WorkPoint{at.tile + 1, 0, 0};
    }
  }
  return visited;
}

std::vector<Chunk> all_chunks(const LayerParams& layer, const Schedule& schedule) {
  std::vector<Chunk> all;
  for (std::size_t t = 0; t < schedule.tiles.size(); ++t) {
    const WorkTile& tile = schedule.tiles[t];
    for (std::int32_t i = 0; i < tile.num_items(layer); ++i) {
      for (std::int32_t chunk = 0; chunk < tile.num_kv_chunks; ++chunk) {
        all.emplace_back(static_cast<std::int32_t>(t), i, chunk);
      }
    }
  }
  return all;
}

// Cut items have partials of their own, and say where they were first cut.
void check_splits(const Schedule& schedule) {
  std::map<std::pair<std::int32_t, std::int32_t>, std::int32_t> cuts;
  for (const WorkRange& range : schedule.ranges) {
    if (range.begin.kv_chunk == 0) continue;
    const auto [entry, is_first] =
        cuts.try_emplace({range.begin.tile, range.begin.item}, range.begin.kv_chunk);
    if (!is_first) entry->second = std::min(entry->second, range.begin.kv_chunk);
  }
  EXPECT_EQ(schedule.splits.size(), cuts.size());
  std::vector<int> used(schedule.num_partials, 0);
  for (const SplitItem& split : schedule.splits) {
    const auto cut = cuts.find({split.tile, split.item});
    ASSERT_NE(cut, cuts.end());
    EXPECT_EQ(split.first_cut, cut->second);
    const std::int32_t num_chunks = schedule.tiles[split.tile].num_kv_chunks;
    ASSERT_LE(split.partial + num_chunks, schedule.num_partials);
    for (std::int32_t i = 0; i < num_chunks; ++i) EXPECT_EQ(used[split.partial + i]++, 0);
    for (const WorkRange& range : schedule.ranges) {
      const bool starts_inside = range.begin.kv_chunk > 0 && range.begin.tile == split.tile &&
                                 range.begin.item == split.item;
      const bool ends_inside =
          range.end.kv_chunk > 0 && range.end.tile == split.tile && range.end.item == split.item;
      if (starts_inside) {
        EXPECT_EQ(range.first_item_partial, split.partial);
      } else if (ends_inside) {
        EXPECT_EQ(range.last_item_partial, split.partial);
      }
    }
  }
}

void visit_chunk(const LayerParams& layer, const WorkPlan& plan, bool shared, const Chunk& chunk,
                 Visits* visits) {
  const auto [t, item, number] = chunk;
  const WorkTile& tile = (shared ? plan.shared : plan.main).tiles[t];
  const std::int32_t kv_tile_end =
      std::min((number + 1) * tile.kv_tiles_per_chunk, tile.kv_tiles.count());
  const std::int32_t head_end = std::min((item + 1) * tile.kv_heads, layer.num_kv_heads);
  for (std::int32_t i = 0; i < tile.num_tokens; ++i) {
    const SharedRow row =
        shared ? plan.shared_rows[tile.first_row + i] : SharedRow{tile.first_row + i, tile.seq};
    for (std::int32_t head = item * tile.kv_heads; head < head_end; ++head) {
      if (!shared && number == 0) visits->add_row(row.seq, row.row, head);
      for (std::int32_t u = number * tile.kv_tiles_per_chunk; u < kv_tile_end; ++u) {
        const std::int64_t begin = std::int64_t{tile.kv_tiles.at(u)} * tile.kv_tile;
        visits->add_keys(row.seq, row.row, head, std::max(begin, tile.kv_begin),
                         std::min(begin + tile.kv_tile, tile.kv_end));
      }
    }
  }
}

void check_plan(const Case& c, int num_threads, WorkPlan* plan) {
  conformance::DeviceCase on_device(c, attention_backend("cpu"));
  const AttentionConfig config = on_device.config();
  const BackendCapabilities caps = full_capabilities();
  const LayerParams layer = api::lower_layer(config, caps);
  const BatchParams batch =
      api::lower_batch(config, caps, on_device.batch(), c.spec.announced_prefix_len);
  build_plan(layer, batch, num_threads, plan);
  Visits visits(c);
  for (const bool shared : {true, false}) {
    const Schedule& schedule = shared ? plan->shared : plan->main;
    const std::vector<Chunk> visited = chunks_visited(layer, schedule);
    EXPECT_EQ(visited, all_chunks(layer, schedule));  // each once, in order
    check_splits(schedule);
    if (testing::Test::HasFailure()) return;
    for (const Chunk& chunk : visited) visit_chunk(layer, *plan, shared, chunk, &visits);
  }
  EXPECT_EQ(visits.problem(c), "");
}

TEST(PlanCoverage, EveryPairOnce) {
  const char* text = std::getenv("QUIRE_TEST_CASES");
  const std::int64_t count = text != nullptr ? std::strtoll(text, nullptr, 10) : 1500;
  WorkPlan plan;  // reused: a plan must not depend on the batches before it
  std::int64_t shared = 0;
  std::int64_t split = 0;
  for (std::int64_t index = 0; index < count; ++index) {
    const CaseSpec spec = conformance::random_spec(11, index);
    const Case c = conformance::build_case(spec);
    for (const int num_threads : {1, 2, 7}) {
      check_plan(c, num_threads, &plan);
      shared += plan.shared.tiles.empty() ? 0 : 1;
      split += plan.main.splits.empty() ? 0 : 1;
      if (testing::Test::HasFailure()) {
        FAIL() << "seed 11, case " << index << ", " << num_threads
               << " threads: " << describe(spec);
      }
    }
  }
  if (count < 1000) return;
  EXPECT_GT(shared, 20) << "the cases do not reach shared prefixes";
  EXPECT_GT(split, 20) << "the cases do not reach split keys";
}

TEST(PlanCoverage, LongSequencesOverManyThreads) {
  for (const std::int64_t seq_len : {1, 255, 256, 257, 5000, 40'000}) {
    for (const std::int64_t query_len : {1, 4, 70}) {
      CaseSpec spec;
      spec.config.dtype = DType::kFloat32;
      spec.config.num_heads = 6;
      spec.config.num_kv_heads = 2;
      spec.config.head_size = 8;
      spec.config.block_size = 64;
      spec.write = false;
      spec.sequences = {{query_len, std::max(query_len, seq_len)}, {1, 3}, {0, 0}, {2, 900}};
      const Case c = conformance::build_case(spec);
      for (const int num_threads : {1, 3, 16, 64}) {
        WorkPlan plan;
        check_plan(c, num_threads, &plan);
      }
    }
  }
}

}  // namespace
}  // namespace quire::cpu
