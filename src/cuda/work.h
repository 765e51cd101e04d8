// The plan in device memory: query tiles, and how their work is laid out in one line that equal
// ranges are cut from. Written by plan.cu, walked by every attention kernel (walk.cuh).
//
//   tile t, head h occupies cost positions [cost_begin + h * cost, + cost): kOverhead positions for
//   queries and output, then one for each unit of 64 keys. CTA c of G takes [c T / G, (c+1) T / G).
//
// Cuts inside an item are rounded to whole chunks: any unit in the free mode; in batch-invariant
// mode multiples that depend on the request alone, so that its parts never change.
#pragma once

#include <cstdint>

#include "params.h"
#include "semantics/work_split.h"

namespace quire::cuda {

inline constexpr std::int32_t kUnitKeys = 64;
inline constexpr std::int32_t kOverhead = 2;  // cost of a tile's queries and output, in units

// Query rows are packed: row q of a request and kv head is token q / group, head q % group.
// No initialisers: tiles live in shared memory too.
struct alignas(16) Tile {
  std::int32_t seq;
  std::int32_t rows;
  std::int32_t first_index;   // query index (in its sequence) of the first row's token
  std::int32_t first_sub;     // and its head within the group
  std::int64_t first_token;   // row of that token in query and output
  std::int64_t first_pos;     // and its position
  std::int64_t first_kv_row;  // direct attention: row of key 0
  std::int64_t cost_begin;
  // Key tiles visited: [prefix_first, + prefix_count), then [main_first, + main_count).
  std::int32_t prefix_first;
  std::int32_t prefix_count;
  std::int32_t main_first;
  std::int32_t main_count;
  std::int32_t kv_len;
  std::int32_t chunk_units;
  std::int32_t cost;  // of one head

  QUIRE_HOST_DEVICE std::int32_t num_units() const { return prefix_count + main_count; }
  QUIRE_HOST_DEVICE std::int32_t unit(std::int32_t i) const {
    return i < prefix_count ? prefix_first + i : main_first + (i - prefix_count);
  }
};

struct CtaStart {
  std::int32_t tile = 0;
  std::int32_t head = 0;
};

struct ScheduleHeader {
  std::int32_t num_tiles = 0;
  std::int32_t num_ctas = 0;  // that have work
  std::int64_t total_cost = 0;
};

// What one attention kernel sees of the plan.
struct ScheduleView {
  const ScheduleHeader* header = nullptr;
  const Tile* tiles = nullptr;
  const CtaStart* starts = nullptr;
  std::int32_t* arrivals = nullptr;  // [ctas], all 0 between launches
  float* slots = nullptr;
  std::int64_t slot_floats = 0;
  // Slot 0 of a CTA holds an item's beginning, the others what follows someone else's beginning.
  std::int32_t slots_per_cta = 2;
  std::int32_t heads = 0;  // kv heads times column passes
};

// How the plan kernel cuts requests for one attention kernel.
struct TileRule {
  std::int32_t tile_rows = 0;  // 0: this kernel is not used
  std::int32_t heads = 0;
  std::int32_t grid = 0;
  std::int32_t max_tiles = 0;
  // Batch-invariant mode: keys may be cut at chunks of the request's own; else not at all.
  bool chunks = false;
  ScheduleHeader* header = nullptr;
  Tile* tiles = nullptr;
  CtaStart* starts = nullptr;
  std::int32_t* seq_tiles = nullptr;  // [num_seqs + 1]
};

struct PlanArgs {
  LayerParams layer;
  BatchParams batch;
  TileRule few;   // requests of up to few.tile_rows rows
  TileRule many;  // all others; if few is unused, all
};

// What an attention kernel gets. The pointers `call.layer` and `call.batch` are host pointers and
// not for its eyes.
struct KernelParams {
  LayerParams layer;
  BatchParams batch;
  AttentionParams call;
  ScheduleView schedule;
  float* block_output = nullptr;  // [num_tokens, num_heads, head_size_v] if block scales are wanted
  std::int32_t k_copy_bytes = 16;  // alignment of every row: 16, 8, 4, or less
  std::int32_t v_copy_bytes = 16;
  bool query_aligned = false;   // 16-byte aligned rows
  bool output_aligned = false;  // rows of 8 elements can be stored whole
  std::int32_t stages = 2;
  std::int32_t block_shift = -1;  // log2 of the block size, -1: not a power of two
  std::int32_t columns = 0;       // output columns of a pass; passes = heads / num_kv_heads
  std::int32_t passes = 1;
};

}  // namespace quire::cuda
