#include "cpu/layer_plan.h"

#include <algorithm>

#include "cpu/tuning.h"

namespace quire::cpu {

void CpuPlan::update(const BatchParams& batch, const Context& ctx) {
  const int num_threads = pool_of(ctx).num_threads();
  build_plan(layer_, batch, num_threads, &work_);
  partials_.grow(std::max(work_.shared.num_partials * partial_floats(work_.shared),
                          work_.main.num_partials * partial_floats(work_.main)));
  prefix_partials_.grow(static_cast<std::int64_t>(work_.shared_rows.size()) * layer_.num_heads *
                        (padded_v() + 2));
  reserve_workers(num_threads);
}

void CpuPlan::reserve_workers(int num_threads) {
  if (scratch_.size() < static_cast<std::size_t>(num_threads)) {
    scratch_.resize(static_cast<std::size_t>(num_threads));
  }
  for (Scratch& scratch : scratch_) size_scratch(&scratch);
}

float* CpuPlan::reserve_block_output(std::int64_t count) {
  block_output_.grow(count);
  return block_output_.data();
}

void CpuPlan::size_scratch(Scratch* scratch) const {
  const std::int64_t rows = round_up(std::max(work_.max_rows, 1), kPadK);
  const std::int64_t item_rows = std::max<std::int64_t>(work_.max_item_rows, kPadK);
  const std::int64_t keys = std::max<std::int64_t>(work_.max_item_keys, kMaxKvTile);
  const std::int64_t k = padded_k();
  const std::int64_t v = padded_v();
  const bool has_tiles = uses_tiles(layer_);
  const auto tile_words = [&](std::int64_t count) { return has_tiles ? count / 2 : 0; };
  const std::int64_t counts[] = {
      item_rows * k,                                             // q
      keys * k,                                                  // k
      keys * v,                                                  // v
      kPadK * std::max(round_up(k, kTileDepth), v),              // staging
      rows * kMaxKvTile,                                         // s
      rows,                                                      // alpha
      rows,                                                      // new_max
      tile_words(item_rows * round_up(k, kTileDepth)),           // tiles.q
      tile_words(kMaxKvTile * round_up(k, kTileDepth)),          // tiles.k
      tile_words(kMaxKvTile * v),                                // tiles.v
      tile_words(2 * kMaxKvTile * kTileRows),                    // tiles.p
      tile_words(kPadK * std::max(round_up(k, kTileDepth), v)),  // tiles.rows
      item_rows * (v + 2),                                       // item_partial
      item_rows * (v + 2),                                       // chunk_partial
  };
  std::int64_t total = 0;
  for (const std::int64_t count : counts) total += round_up(count, kPadK);
  scratch->memory.grow(total);
  float* next = scratch->memory.data();
  std::size_t i = 0;
  const auto take = [&] {
    float* block = next;
    next += round_up(counts[i++], kPadK);
    return block;
  };
  scratch->q = take();
  scratch->k = take();
  scratch->v = take();
  scratch->staging = take();
  scratch->s = take();
  scratch->alpha = take();
  scratch->new_max = take();
  std::fill(scratch->new_max, scratch->new_max + rows, 0.0F);
  TileScratch& tiles = scratch->tiles;
  for (std::uint16_t** part : {&tiles.q, &tiles.k, &tiles.v, &tiles.p, &tiles.rows}) {
    *part = reinterpret_cast<std::uint16_t*>(take());
  }
  for (Partial* partial : {&scratch->item_partial, &scratch->chunk_partial}) {
    partial->o = take();
    partial->max = partial->o + item_rows * v;
    partial->sum = partial->max + item_rows;
  }
  const auto tokens = static_cast<std::size_t>(std::max(work_.max_rows / layer_.group, 1));
  if (scratch->tokens.size() < tokens) scratch->tokens.resize(tokens);
}

std::int64_t CpuPlan::partial_floats(const Schedule& schedule) const {
  return std::int64_t{schedule.partial_rows} * (padded_v() + 2);
}

Partial CpuPlan::partial(const Schedule& schedule, std::int64_t index) const {
  const std::int64_t rows = std::int64_t{schedule.partial_rows};
  float* o = partials_.data() + index * partial_floats(schedule);
  return {o, o + rows * padded_v(), o + rows * (padded_v() + 1)};
}

Partial CpuPlan::prefix_partial(std::int64_t shared_row, std::int32_t head) const {
  float* o = prefix_partials_.data() + (shared_row * layer_.num_heads + head) * (padded_v() + 2);
  return {o, o + padded_v(), o + padded_v() + 1};
}

std::int64_t CpuPlan::workspace_bytes() const {
  std::int64_t bytes = partials_.bytes() + prefix_partials_.bytes() + block_output_.bytes();
  for (const Scratch& scratch : scratch_) bytes += scratch.memory.bytes();
  return bytes;
}

}  // namespace quire::cpu
