// The plan in device memory: work tiles, and how their cost is laid out in one line that work
// ranges of equal length are cut from. Written by plan.cu, read by every attention kernel
// (work_iterator.cuh).
//
//   tile t, head h occupies cost positions [cost_begin + h * cost, + cost): item_overhead positions
//   for queries and output, then one for each kv tile. CTA c of G takes [c T / G, (c+1) T / G).
//
// A cut inside an item is rounded to a multiple of its kv_chunk. In the free mode that is one kv
// tile. In batch-invariant mode it depends on the sequence alone, so that its splits never change.
#pragma once

#include <cstdint>

#include "cuda/plan/tuning.h"
#include "params.h"
#include "plan/kv_chunks.h"
#include "plan/shared_prefix.h"

namespace quire::cuda {

inline constexpr std::int32_t kNeverCut = 0x7FFFFFFF;

// What the plan needs to know of a kernel. Costs are in kv tiles.
struct TilePolicy {
  // Query rows of a work tile; where a tile is so many tokens, whatever the group, at most.
  std::int32_t rows = 0;
  std::int32_t tokens = 0;
  std::int32_t kv_tile = 0;    // keys of one step
  std::int32_t v_columns = 0;  // of V and the output in one pass over the keys
  // Of an item's queries and output.
  std::int32_t item_overhead = 0;
  // Shorter ranges are not worth a partial result.
  std::int32_t min_range_cost = 0;
  // What a CTA spends on the items that are cut at its ends: another tile's queries and output,
  // partial results, combining them.
  std::int32_t cut_cost = 0;
  // Items up to this long are not cut: a partial result costs more than the imbalance. kNeverCut:
  // the kernel knows whole items only.
  std::int32_t max_uncut = 0;
  // Not 0: the kernel is limited by memory, whose rate CTAs share: a few CTAs draw all of it, so
  // that ranges need not be equal. If the costliest item is at most this part of an equal share, in
  // hundredths, none is cut; and if there is little work, CTAs far apart do it.
  std::int32_t uncut_percent = 0;
  std::int32_t min_chunk = 0;  // batch-invariant mode: kv tiles of a chunk, at least
  // Of a multiprocessor's time, what a unit of cost takes and what an item takes besides, in kernels
  // that run beside others in one launch.
  std::int32_t cost_ns = 0;
  std::int32_t item_ns = 0;

  friend bool operator==(const TilePolicy&, const TilePolicy&) = default;
};

// Some query rows of one sequence and kv head, and the keys that they visit. Rows are packed: row q
// is token q / group of the sequence, head q % group of the kv head. No initialisers: tiles live in
// shared memory too.
struct alignas(16) WorkTile {
  std::int32_t seq;
  std::int32_t rows;
  std::int32_t first_index;   // query index (in its sequence) of the first row's token
  std::int32_t first_sub;     // and its head within the group
  std::int64_t first_token;   // row of that token in query and output
  std::int32_t first_pos;     // and its position
  std::int32_t context_len;   // index of the sequence's first key that is this step's own
  std::int64_t first_kv_row;  // direct attention: row of key 0
  std::int64_t cost_begin;
  // Kv tiles visited: [prefix_first, + prefix_count), then [main_first, + main_count).
  std::int32_t prefix_first;
  std::int32_t prefix_count;
  std::int32_t main_first;
  std::int32_t main_count;
  std::int32_t kv_begin;  // keys outside [kv_begin, kv_len) are not this tile's
  std::int32_t kv_len;
  // Shared prefixes: where the first row's token is in SharedPrefixes::rows and in PrefixPartials;
  // -1: its sequence shares none. In a tile of the prefix itself first_sub is set, the other fields
  // about the first row are not used.
  std::int32_t prefix_row;
  std::int32_t kv_chunk;  // kv tiles; cuts are at multiples of it
  std::int32_t cost;      // of one head
  // Keys that every row sees, as two spans; exact where all rows are of one token.
  std::int32_t common[4];
  // Keys between the rows' visible prefixes and their windows: no row sees them.
  std::int32_t out_of_window_begin;
  std::int32_t out_of_window_end;
  std::int32_t visible_end;  // no row sees keys from here on

  QUIRE_HOST_DEVICE std::int32_t num_kv_tiles() const { return prefix_count + main_count; }
  QUIRE_HOST_DEVICE std::int32_t kv_tile(std::int32_t i) const {
    return i < prefix_count ? prefix_first + i : main_first + (i - prefix_count);
  }
  // How many of its kv tiles, of `kv_tile` keys each, begin before key `end`.
  QUIRE_HOST_DEVICE std::int32_t kv_tiles_before(std::int32_t end, std::int32_t kv_tile) const {
    const std::int32_t limit = end / kv_tile + (end % kv_tile > 0 ? 1 : 0);
    const auto within = [limit](std::int32_t first, std::int32_t count) {
      return limit <= first ? 0 : (limit - first < count ? limit - first : count);
    };
    return within(prefix_first, prefix_count) + within(main_first, main_count);
  }
};

// Where the work range of a CTA begins: at the item's (tile, head) kv tile number `kv_tile`. It
// ends where the next CTA's begins.
struct alignas(16) WorkRange {
  std::int32_t tile = 0;
  std::int32_t head = 0;
  std::int32_t kv_tile = 0;
  // Where the item began in an earlier CTA (kv_tile > 0): the partials that this CTA leaves of it,
  // the first and the last CTA that work on it, and how many of them do any work.
  std::int32_t num_partials = 0;
  std::int32_t first_cta = 0;
  std::int32_t last_cta = 0;
  std::int32_t num_ctas_at_work = 0;
  std::int32_t rank = 0;  // CTAs before this one that have work

  QUIRE_HOST_DEVICE bool is_in(std::int32_t t, std::int32_t h) const {
    return tile == t && head == h;
  }
  QUIRE_HOST_DEVICE bool comes_before(std::int32_t t, std::int32_t h, std::int32_t u) const {
    return tile != t ? tile < t : (head != h ? head < h : kv_tile < u);
  }
};

// A query token whose sequence shares a prefix.
struct SharedRow {
  std::int32_t token;  // row of query and output
  std::int32_t position;
};

// Sequences whose first `keys` keys lie in the same blocks.
struct SharedPrefix {
  std::int32_t seq;  // whose block table is read
  std::int32_t keys;
  std::int32_t first_row;  // of SharedPrefixes::rows
  std::int32_t end_row;
};

// Cascade: found by the plan kernel, see shared_prefix.h. Arrays of a value a sequence:
struct SharedPrefixes {
  planning::PrefixRule rule;          // min_blocks 0: nothing is shared in this batch
  std::int32_t* leader = nullptr;     // the first sequence that shares its prefix; -1: none does
  std::int32_t* blocks = nullptr;     // that it has in common with its leader
  std::int32_t* members = nullptr;    // leaders: how many sequences share the prefix
  std::int32_t* least = nullptr;      // leaders: blocks that they all have in common
  std::int32_t* keys = nullptr;       // of its shared prefix; 0: none
  std::int32_t* first_row = nullptr;  // of its query, in `rows`
  SharedPrefix* list = nullptr;       // [kMaxSharedPrefixes]
  SharedRow* rows = nullptr;          // [max_rows], prefix by prefix
  std::int32_t max_rows = 0;
};

// What the rows of SharedPrefixes::rows saw in their prefixes, unnormalised: O is [rows, num_heads,
// pitch], and for each of the `passes` passes of `columns` columns there are a maximum and a sum.
// The tiles of the sequences themselves are combined with it.
struct PrefixPartials {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  std::int32_t pitch = 0;
  std::int32_t columns = 0;
  std::int32_t passes = 1;
};

struct ScheduleHeader {
  std::int32_t num_tiles = 0;
  std::int32_t num_ctas = 0;  // among which work is cut
  // One CTA of so many works: neighbours share a multiprocessor, or a part of the GPU whose rate
  // is limited.
  std::int32_t cta_step = 1;
  // Items of the first `whole_tiles` are not cut: CTAs take them one by one, in the order of
  // whole_item(). The work ranges are of the tiles behind them. If all items are whole, tiles lie
  // in order of their cost, the highest first, and cost_begin is not set.
  std::int32_t whole_tiles = 0;
  // CTAs take the items of so many heads first, then those of the next ones: what they read at a
  // time stays in the L2 cache.
  std::int32_t heads_at_once = 1;

  // The tile and the head of the i-th whole item.
  QUIRE_HOST_DEVICE void whole_item(std::int32_t i, std::int32_t heads, std::int32_t* tile,
                                    std::int32_t* head) const {
    const std::int32_t group = i / (whole_tiles * heads_at_once);
    const std::int32_t first = group * heads_at_once;
    const std::int32_t count = heads - first < heads_at_once ? heads - first : heads_at_once;
    const std::int32_t inside = i - whole_tiles * first;
    *tile = inside / count;
    *head = first + inside - *tile * count;
  }
};

// For the plan kernel: tiles by cost, the highest first.
struct CostBuckets {
  std::int32_t next[kCostBuckets];  // tiles in the bucket; then where its next tile goes
  std::int32_t highest;             // cost of a tile
  std::int32_t lowest;
  std::int32_t makespan;
  std::int32_t kv_tiles;  // of all sequences
  std::int64_t cost;      // of all items
};

// A word of a partial that is not there yet: a NaN that no arithmetic gives.
inline constexpr std::uint32_t kMissing = 0xFFFFFFFF;

// What one attention kernel sees of the plan.
struct ScheduleView {
  const ScheduleHeader* header = nullptr;
  const WorkTile* tiles = nullptr;
  const WorkRange* work_ranges = nullptr;  // [grid + 1]
  const WorkTile* first_tiles = nullptr;   // [grid]: that each work range begins in, beside it
  std::int32_t* arrivals = nullptr;        // [ctas], all 0 between launches
  std::int32_t* taken = nullptr;           // whole items taken beyond each CTA's first, likewise
  float* partials = nullptr;
  // Two of a CTA, as in `partials` without batch-invariant mode; each word is kMissing between
  // launches, see sm90/decode/fold.cuh. Null: no kernel of the layer waits for partials.
  float* awaited_partials = nullptr;
  std::int64_t partial_floats = 0;
  // A CTA's partial 0 is of the item that it begins, the others are of the one that it found begun.
  std::int32_t partials_per_cta = 2;
  std::int32_t heads = 0;  // kv heads times column passes
  PrefixPartials prefix_partials;
  // Not null: these are tiles of shared prefixes, of these rows. Results go to prefix_partials.
  const SharedRow* shared_rows = nullptr;
};

// How the plan kernel cuts sequences into tiles for one family of attention kernels.
struct TileRule {
  TilePolicy policy;          // no rows: this rule is not used
  std::int32_t max_rows = 0;  // KernelKey::max_rows
  std::int32_t heads = 0;     // items of a tile: kv heads times column passes
  std::int32_t grid = 0;
  std::int32_t max_tiles = 0;
  // Of which sequences: with more query rows than this, up to that.
  std::int32_t above_rows = 0;
  std::int32_t up_to_rows = 0x7FFFFFFF;
  // Batch-invariant mode: items may be cut, at kv_chunks of the sequence's own; else not at all.
  bool kv_chunks = false;
  CostBuckets* buckets = nullptr;  // null: the kernel does not know ScheduleHeader::whole_tiles
  // The rule whose kernel runs beside this one's in one launch, planned earlier; -1: none. Then
  // this one's work is cut for fewer CTAs than the grid has, which the plan finds.
  std::int32_t beside = -1;
  std::int32_t least_cost_ps = 0;         // what a unit of cost takes of the memory's time
  std::int32_t l2_kv_tiles = 0x7FFFFFFF;  // of one head, that half of the L2 cache holds
  ScheduleHeader* header = nullptr;
  WorkTile* tiles = nullptr;
  WorkRange* work_ranges = nullptr;
  WorkTile* first_tiles = nullptr;    // null: no kernel asks for them
  std::int32_t* seq_tiles = nullptr;  // [num_seqs + 1]
};

inline constexpr int kNumRules = 4;  // most families of a layer, from few rows to any number

struct PlanArgs {
  LayerParams layer;
  BatchParams batch;
  TileRule rules[kNumRules];
  TileRule
      shared;  // of shared prefixes, for the last family; no rows: nothing is allocated for them
  SharedPrefixes prefixes;
};

// Gives each sequence, by its rows, to one of the first `num_used` rules.
inline void share_out(TileRule (&rules)[kNumRules], int num_used) {
  std::int32_t above = 0;
  TileRule* last = nullptr;
  for (int i = 0; i < kNumRules; ++i) {
    TileRule& rule = rules[i];
    rule.above_rows = above;
    rule.up_to_rows = i < num_used ? rule.max_rows : 0;
    if (rule.up_to_rows == 0) continue;
    above = rule.max_rows;
    last = &rule;
  }
  if (last != nullptr) last->up_to_rows = 0x7FFFFFFF;
}

}  // namespace quire::cuda
