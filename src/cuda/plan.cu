// The plan kernel: one CTA, once a step, everything read on the device.
//
//   lengths -> tiles per request -> (scan) -> tile records with their cost -> (scan) -> where each
//   CTA of the attention grid starts
//
// One thread a request, then one thread a tile. Nothing leaves the device, and launch shapes depend
// on padded sizes only, so a captured graph serves every batch up to its size.
#include "cuda/check.h"
#include "cuda/kernels.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 1024;
// Fewer units than this a CTA are not worth a partial result.
constexpr std::int64_t kMinCost = 4 + kOverhead;
// Items up to this long are not cut: a partial result costs more than the imbalance.
constexpr std::int32_t kMaxWholeUnits = 8;
// Batch-invariant mode: chunks of at least 512 keys.
constexpr std::int32_t kMinChunkUnits = 8;
// Direct attention bounds its keys by the key tensor's rows, which the plan does not know; the
// attention kernel clamps again.
constexpr std::int64_t kAnyKvTokens = 0x7FFFFFFF;

// Exclusive sum over the CTA; `*total` is the sum of all.
__device__ std::int64_t block_scan(std::int64_t value, std::int64_t* warp_sums,
                                   std::int64_t* total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  std::int64_t sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const std::int64_t other = __shfl_up_sync(~0U, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    std::int64_t warp_sum = warp_sums[lane];
    for (int d = 1; d < 32; d *= 2) {
      const std::int64_t other = __shfl_up_sync(~0U, warp_sum, d);
      if (lane >= d) warp_sum += other;
    }
    warp_sums[lane] = warp_sum;
  }
  __syncthreads();
  const std::int64_t before = warp == 0 ? 0 : warp_sums[warp - 1];
  *total = warp_sums[31];
  __syncthreads();
  return before + sum - value;
}

// Index of the last entry that is <= value; entries do not decrease and the first is <= value.
template <class Get>
__device__ std::int32_t last_at_most(std::int32_t count, std::int64_t value, const Get& get) {
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

__device__ std::int64_t tiles_of(const PlanArgs& args, const TileRule& rule, bool is_few,
                                 std::int32_t s) {
  const Sequence seq = sequence_at(args.layer, args.batch, kAnyKvTokens, s);
  const std::int64_t rows = seq.query_len * args.layer.group;
  const bool few = args.many.tile_rows == 0 || rows <= args.few.tile_rows;
  if (few != is_few) return 0;
  return (rows + rule.tile_rows - 1) / rule.tile_rows;
}

__device__ Tile make_tile(const PlanArgs& args, const TileRule& rule, std::int32_t s,
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
  const semantics::Spans visible =
      clip(semantics::union_spans(seq.mask, tile.first_pos, seq.context_len + last_token), 0,
           tile.kv_len);
  const semantics::KvUnits units = semantics::make_units(visible, kUnitKeys);
  tile.prefix_first = units.prefix_first;
  tile.prefix_count = units.prefix_count;
  tile.main_first = units.main_first;
  tile.main_count = units.main_count;
  const std::int32_t count = units.count();
  if (!layer.batch_invariant) {
    tile.chunk_units = count > kMaxWholeUnits || count == 0 ? 1 : count;
  } else if (rule.chunks) {
    tile.chunk_units = semantics::chunk_units(count, kMinChunkUnits);
  } else {
    tile.chunk_units = count > 0 ? count : 1;
  }
  tile.cost = count + kOverhead;
  return tile;
}

__device__ void schedule(const PlanArgs& args, const TileRule& rule, bool is_few,
                         std::int64_t* warp_sums) {
  const std::int32_t num_seqs = args.batch.num_seqs;
  std::int64_t num_tiles = 0;
  for (std::int32_t base = 0; base < num_seqs; base += kThreads) {
    const std::int32_t s = base + static_cast<std::int32_t>(threadIdx.x);
    std::int64_t total = 0;
    const std::int64_t count = s < num_seqs ? tiles_of(args, rule, is_few, s) : 0;
    const std::int64_t before = num_tiles + block_scan(count, warp_sums, &total);
    // Sequences that overlap (a wild query_start_loc) may ask for more tiles than there is room
    // for: what does not fit is not computed.
    if (s < num_seqs) {
      rule.seq_tiles[s] = static_cast<std::int32_t>(semantics::min_of(before, rule.max_tiles));
    }
    num_tiles += total;
  }
  num_tiles = semantics::min_of(num_tiles, rule.max_tiles);
  __syncthreads();

  std::int64_t cost = 0;
  for (std::int64_t base = 0; base < num_tiles; base += kThreads) {
    const std::int64_t t = base + threadIdx.x;
    Tile tile{};
    if (t < num_tiles) {
      const std::int32_t s =
          last_at_most(num_seqs, t, [&](std::int32_t i) { return rule.seq_tiles[i]; });
      tile = make_tile(args, rule, s, t - rule.seq_tiles[s]);
    }
    std::int64_t total = 0;
    const std::int64_t item_cost = std::int64_t{tile.cost} * rule.heads;
    tile.cost_begin = cost + block_scan(item_cost, warp_sums, &total);
    if (t < num_tiles) rule.tiles[t] = tile;
    cost += total;
  }
  __syncthreads();

  const std::int64_t wanted = (cost + kMinCost - 1) / kMinCost;
  const auto num_ctas = static_cast<std::int32_t>(semantics::min_of(wanted, rule.grid));
  if (threadIdx.x == 0) {
    *rule.header = {static_cast<std::int32_t>(num_tiles), num_ctas, cost};
  }
  for (std::int32_t c = static_cast<std::int32_t>(threadIdx.x); c < num_ctas; c += kThreads) {
    const std::int64_t begin = c * cost / num_ctas;
    const std::int32_t t = last_at_most(static_cast<std::int32_t>(num_tiles), begin,
                                        [&](std::int32_t i) { return rule.tiles[i].cost_begin; });
    const Tile& tile = rule.tiles[t];
    rule.starts[c] = {t, static_cast<std::int32_t>((begin - tile.cost_begin) / tile.cost)};
  }
}

__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanArgs args) {
  __shared__ std::int64_t warp_sums[32];
  if (args.few.tile_rows > 0) schedule(args, args.few, true, warp_sums);
  __syncthreads();
  if (args.many.tile_rows > 0) schedule(args, args.many, false, warp_sums);
}

}  // namespace

void launch_plan(const PlanArgs& args, cudaStream_t stream) {
  plan<<<1, kThreads, 0, stream>>>(args);
  check_launch("plan", dim3(1), kThreads, 0);
}

}  // namespace quire::cuda
