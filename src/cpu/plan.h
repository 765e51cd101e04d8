// The plan as data: which query tiles there are, which keys each visits, and how the sum of that
// work is cut into ranges of equal cost. Built on the host from lengths alone.
//
//   batch -> (shared prefix tiles) + tiles -> items (tile, kv heads) -> chunks of units -> ranges
//
// A range is a contiguous run of chunks in item order, so a worker needs no locks and at most the
// first and last item of a range are shared with other ranges (stream-K; FlashMLA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"
#include "semantics/work_split.h"

namespace quire::cpu {

// Query rows of one sequence (or of several that share a prefix) times the keys they visit.
struct WorkTile {
  std::int32_t seq = 0;            // whose block table row is read
  std::int32_t num_tokens = 0;     // rows = num_tokens * group
  std::int64_t first = 0;          // first query row; in shared tiles an index into shared_rows
  std::int64_t shared_first = -1;  // of a tile whose prefix is shared: its first index there
  std::int64_t kv_begin = 0;       // keys outside [kv_begin, kv_end) are another tile's
  std::int64_t kv_end = 0;
  std::int32_t kv_tile = 0;
  bool few_rows = false;
  std::int32_t heads = 1;  // kv heads of an item; the last item may have fewer
  std::int32_t units_per_chunk = 1;
  std::int32_t num_chunks = 1;
  semantics::KvUnits units;
  std::int32_t num_items(const LayerParams& layer) const {
    return (layer.num_kv_heads + heads - 1) / heads;
  }
};

// A query row that takes part in a shared prefix.
struct SharedRow {
  std::int64_t row = 0;
  std::int32_t seq = 0;
};

// A chunk of an item, in item order. Item i of a tile has the kv heads from i * heads on.
struct WorkPoint {
  std::int32_t tile = 0;
  std::int32_t item = 0;
  std::int32_t chunk = 0;
  friend bool operator==(const WorkPoint&, const WorkPoint&) = default;
};

// [begin, end). A range that starts or stops inside an item leaves its chunks in partial slots
// [slot of the item + chunk]; the chunks before the first cut are folded into slot 0 of the item.
struct WorkRange {
  WorkPoint begin;
  WorkPoint end;
  std::int64_t first_item_slot = -1;  // begin.chunk > 0: where that item's partials start
  std::int64_t last_item_slot = -1;   // end.chunk > 0: likewise
};

// An item that several ranges share, to be folded in chunk order when all are done.
struct SplitItem {
  std::int32_t tile = 0;
  std::int32_t item = 0;
  std::int32_t first_cut = 0;  // chunks [0, first_cut) are in slot 0 together
  std::int64_t slot = 0;
};

// Tiles that may run in any order, and their ranges.
struct Schedule {
  std::vector<WorkTile> tiles;
  std::vector<WorkRange> ranges;
  std::vector<SplitItem> splits;
  std::int64_t num_slots = 0;
  std::int32_t slot_rows = 0;  // rows of the largest split item, see item_rows()
  void clear();
};

struct WorkPlan {
  std::vector<SharedRow> shared_rows;
  Schedule shared;  // runs first; its results seed the tiles of the same rows
  Schedule main;
  std::int32_t max_rows = 0;       // rows of the largest tile
  std::int32_t max_item_rows = 0;  // the same with all heads of an item, see item_rows()
  std::int32_t max_item_keys = 0;  // widened keys of a unit, all heads of an item

  // Scratch of shared-prefix detection, kept to avoid allocation.
  std::vector<std::int32_t> order;
  std::vector<std::int64_t> prefix_len;        // [num_seqs] shared prefix, 0: none
  std::vector<std::int64_t> first_shared_row;  // [num_seqs]
};

// Rows of one head of an item in result buffers: whole vectors, so that heads do not overlap.
inline std::int32_t head_rows(const LayerParams& layer, const WorkTile& tile) {
  return (tile.num_tokens * layer.group + 15) / 16 * 16;
}
inline std::int32_t item_rows(const LayerParams& layer, const WorkTile& tile) {
  return head_rows(layer, tile) * tile.heads;
}

// Builds the plan for `num_threads` workers. Allocates only to grow.
void build_plan(const LayerParams& layer, const BatchParams& batch, int num_threads,
                WorkPlan* plan);

// Finds sequences whose block tables start with the same blocks; appends their rows and tiles.
// Fills prefix_len and first_shared_row.
void find_shared_prefixes(const LayerParams& layer, const BatchParams& batch, WorkPlan* plan);

std::string to_string(const LayerParams& layer, const WorkPlan& plan);

}  // namespace quire::cpu
