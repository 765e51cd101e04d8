// The plan as data: which query tiles there are, which keys each visits, and how the sum of that
// work is cut into ranges of equal cost. Built on the host from lengths alone.
//
//   batch -> (tiles of shared prefixes) + tiles -> items (tile x kv heads) -> kv chunks -> ranges
//
// A range is a contiguous run of kv chunks in item order, so a thread needs no locks, and only the
// first and the last item of a range can be shared with other ranges (stream-K; FlashMLA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"
#include "plan/kv_chunks.h"

namespace quire::cpu {

// Query rows of one sequence (or of several that share a prefix) times the keys they visit.
struct WorkTile {
  std::int32_t seq = 0;         // whose block table row is read
  std::int32_t num_tokens = 0;  // rows = num_tokens * group
  std::int64_t first_row = 0;   // query row; in tiles of a shared prefix an index into shared_rows
  // Where the first keys of the sequence are a shared prefix, which tiles of their own attend to:
  // the index of first_row in shared_rows. Else -1.
  std::int64_t first_shared_row = -1;
  std::int64_t kv_begin = 0;  // keys outside [kv_begin, kv_end) are another tile's
  std::int64_t kv_end = 0;
  std::int32_t kv_tile = 0;  // keys of a step
  bool decode = false;
  std::int32_t kv_heads = 1;  // of an item; the last item may have fewer
  std::int32_t kv_tiles_per_chunk = 1;
  std::int32_t num_kv_chunks = 1;
  planning::KvTiles kv_tiles;
  std::int32_t num_items(const LayerParams& layer) const {
    return (layer.num_kv_heads + kv_heads - 1) / kv_heads;
  }
};

// A query row that takes part in a shared prefix.
struct SharedRow {
  std::int64_t row = 0;
  std::int32_t seq = 0;
};

// A kv chunk of an item. Points are ordered by tile, item, chunk. Item i of a tile has the kv heads
// from i * kv_heads on.
struct WorkPoint {
  std::int32_t tile = 0;
  std::int32_t item = 0;
  std::int32_t kv_chunk = 0;
  friend bool operator==(const WorkPoint&, const WorkPoint&) = default;
};

// [begin, end): what one thread takes at a time. An item that is cut has one partial for each of
// its chunks; of those, the chunks before the first cut are combined at once, into its partial 0.
struct WorkRange {
  WorkPoint begin;
  WorkPoint end;
  std::int64_t first_item_partial = -1;  // begin.kv_chunk > 0: index of that item's partial 0
  std::int64_t last_item_partial = -1;   // end.kv_chunk > 0: likewise
};

// An item that is cut: its partials are combined in chunk order when all ranges are done.
struct SplitItem {
  std::int32_t tile = 0;
  std::int32_t item = 0;
  std::int32_t first_cut = 0;  // partial 0 holds chunks [0, first_cut)
  std::int64_t partial = 0;    // index of its partial 0
};

// Tiles that may run in any order, and their ranges.
struct Schedule {
  std::vector<WorkTile> tiles;
  std::vector<WorkRange> ranges;
  std::vector<SplitItem> splits;
  std::int64_t num_partials = 0;
  std::int32_t partial_rows = 0;  // rows of the largest split item, see item_rows()
  void clear();
};

struct WorkPlan {
  std::vector<SharedRow> shared_rows;
  Schedule shared;  // shared prefixes; runs first, since rows of `main` start from its results
  Schedule main;
  std::int32_t max_rows = 0;       // rows of the largest tile
  std::int32_t max_item_rows = 0;  // the same with all kv heads of an item, see item_rows()
  std::int32_t max_item_keys = 0;  // keys of a kv tile times kv heads of an item

  // Scratch of shared-prefix detection, kept to avoid allocation.
  std::vector<std::int32_t> order;
  std::vector<std::int64_t> prefix_len;        // [num_seqs] shared prefix, 0: none
  std::vector<std::int64_t> first_shared_row;  // [num_seqs]
};

// Rows of one kv head of an item in partials: whole vectors, so that heads do not overlap.
inline std::int32_t head_rows(const LayerParams& layer, const WorkTile& tile) {
  return (tile.num_tokens * layer.group + 15) / 16 * 16;
}
inline std::int32_t item_rows(const LayerParams& layer, const WorkTile& tile) {
  return head_rows(layer, tile) * tile.kv_heads;
}

// Builds the plan for `num_threads` threads. Allocates only to grow.
void build_plan(const LayerParams& layer, const BatchParams& batch, int num_threads,
                WorkPlan* plan);

// Finds sequences whose block tables start with the same blocks; appends their rows and tiles.
// Fills prefix_len and first_shared_row.
void find_shared_prefixes(const LayerParams& layer, const BatchParams& batch, WorkPlan* plan);

std::string to_string(const LayerParams& layer, const WorkPlan& plan);

}  // namespace quire::cpu
