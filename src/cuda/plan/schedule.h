// The plan in device memory: query tiles, and how their work is laid out in one line that equal
// ranges are cut from. Written by plan.cu, walked by every attention kernel (walk.cuh).
//
//   tile t, head h occupies cost positions [cost_begin + h * cost, + cost): item_overhead positions
//   for queries and output, then one for each kv tile. CTA c of G takes [c T / G, (c+1) T / G).
//
// Cuts inside an item are rounded to whole kv_chunks: any kv_tile in the free mode; in batch-invariant
// mode multiples that depend on the request alone, so that its num_partials never change.
#pragma once

#include <cstdint>

#include "cuda/plan/tuning.h"
#include "params.h"
#include "plan/kv_chunks.h"
#include "plan/shared_prefix.h"

namespace quire::cuda {

// What the plan needs to know of a kernel. Costs are in kv tiles.
struct TilePolicy {
  std::int32_t rows = 0;       // query rows of a work tile
  std::int32_t kv_tile = 0;    // keys of one step
  std::int32_t v_columns = 0;  // of V and the output in one pass over the keys
  // Of an item's queries and output.
  std::int32_t item_overhead = 0;
  // Shorter ranges are not worth a partial result.
  std::int32_t min_range_cost = 0;
  // What a CTA spends on the items that are cut at its ends: another tile's queries and output,
  // partial results, combining them.
  std::int32_t cut_cost = 0;
  // Items up to this long are not cut: a partial result costs more than the imbalance.
  std::int32_t max_uncut = 0;
  std::int32_t min_chunk = 0;  // batch-invariant mode: kv tiles of a chunk, at least

  friend bool operator==(const TilePolicy&, const TilePolicy&) = default;
};

// Query rows are packed: row q of a request and kv head is token q / group, head q % group.
// No initialisers: tiles live in shared memory too.
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
  // Key tiles visited: [prefix_first, + prefix_count), then [main_first, + main_count).
  std::int32_t prefix_first;
  std::int32_t prefix_count;
  std::int32_t main_first;
  std::int32_t main_count;
  std::int32_t kv_begin;  // keys outside [kv_begin, kv_len) are not this tile's
  std::int32_t kv_len;
  // Of a shared prefix: the first row's token in SharedPrefixes::rows and in PrefixPartials; -1: none. In a
  // tile of the prefix itself the other fields of the first row are not used, but first_sub.
  std::int32_t prefix_row;
  std::int32_t kv_chunk;
  std::int32_t cost;  // of one head
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

// Where a CTA's range work_ranges: at kv_tile `kv_tile` of an item (tile, head). The next CTA's start ends it.
struct alignas(16) WorkRange {
  std::int32_t tile = 0;
  std::int32_t head = 0;
  std::int32_t kv_tile = 0;
  // Of an item that began in another CTA (kv_tile > 0): the num_partials that this CTA leaves of it, the first
  // and last CTA that work on it, and how many of them leave anything.
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
  std::int32_t* leader = nullptr;     // of its group; -1: it shares nothing
  std::int32_t* blocks = nullptr;     // that it has in common with its leader
  std::int32_t* members = nullptr;    // leaders: sequences of the group
  std::int32_t* least = nullptr;      // leaders: blocks that they all have in common
  std::int32_t* keys = nullptr;       // of its shared prefix; 0: none
  std::int32_t* first_row = nullptr;  // of its query, in `rows`
  SharedPrefix* groups = nullptr;     // [kMaxSharedPrefixes]
  SharedRow* rows = nullptr;          // [max_rows], group by group
  std::int32_t max_rows = 0;
};

// What the queries of SharedPrefixes::rows saw in their prefixes, unnormalised: [rows, num_heads]
// times `pitch` floats, and for each of `passes` passes of `columns` of them a maximum and a sum.
// Items of the same queries start from it.
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
  // Items are not cut: CTAs take them one by one, and tiles lie in order of their cost, dearest
  // first. cost_begin and work_ranges mean nothing then.
  bool whole = false;
};

// For the plan kernel: tiles by cost, dearest first.
struct CostBuckets {
  std::int32_t next[kCostBuckets];  // tiles in the bucket; then where its next tile goes
  std::int32_t dearest;
  std::int32_t makespan;
};

// What one attention kernel sees of the plan.
struct ScheduleView {
  const ScheduleHeader* header = nullptr;
  const WorkTile* tiles = nullptr;
  const WorkRange* work_ranges = nullptr;  // [grid + 1]
  std::int32_t* arrivals = nullptr;        // [ctas], all 0 between launches
  std::int32_t* taken = nullptr;  // whole items that CTAs took beyond their first, likewise
  float* partials = nullptr;
  std::int64_t partial_floats = 0;
  // Slot 0 of a CTA holds an item's beginning, the others what follows someone else's beginning.
  std::int32_t partials_per_cta = 2;
  std::int32_t heads = 0;  // kv heads times column passes
  PrefixPartials prefix_partials;
  // Not null: these are tiles of shared prefixes, of these rows. Results become prefix_partials.
  const SharedRow* shared_rows = nullptr;
};

// How the plan kernel cuts requests for one attention kernel.
struct TileRule {
  TilePolicy policy;          // no rows: this rule is not used
  std::int32_t max_rows = 0;  // KernelKey::max_rows
  std::int32_t heads = 0;
  std::int32_t grid = 0;
  std::int32_t max_tiles = 0;
  // Of which requests: with more query rows than this, up to that.
  std::int32_t above_rows = 0;
  std::int32_t up_to_rows = 0x7FFFFFFF;
  // Batch-invariant mode: keys may be cut at kv_chunks of the request's own; else not at all.
  bool kv_chunks = false;
  CostBuckets* buckets = nullptr;  // null: the kernel does not know ScheduleHeader::whole
  ScheduleHeader* header = nullptr;
  WorkTile* tiles = nullptr;
  WorkRange* work_ranges = nullptr;
  std::int32_t* seq_tiles = nullptr;  // [num_seqs + 1]
};

inline constexpr int kNumRules = 3;  // for requests of few rows, of some, of many

struct PlanArgs {
  LayerParams layer;
  BatchParams batch;
  TileRule rules[kNumRules];
  TileRule shared;  // shared prefixes, for the kernel of many; no rows: no room for them
  SharedPrefixes prefixes;
};

// Shares requests out by their rows among the first `num_used` rules, as far as these are used.
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
