// One attention call on the CPU: hands the plan's ranges to threads, combines the partials of cut
// items, normalises rows. Plain C++; the arithmetic is in the kernels of the ISA (attention-inl.h).
//
//   shared prefixes (ranges, then cut items) -> main tiles (the same) -> block-scale quantisation
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/layer_plan.h"
#include "cpu/tuning.h"
#include "semantics/int4.h"
#include "semantics/quant.h"
#include "semantics/softmax_state.h"

namespace quire::cpu {
namespace {

using semantics::value_of;

class Call {
 public:
  Call(CpuPlan& workspace, const AttentionParams& params)
      : workspace_(workspace),
        p_(params),
        layer_(params.layer),
        kernels_(kernels()),
        query_scale_(layer_.softmax_scale * value_of(params.q_scale) * value_of(params.k.scale)),
        value_scale_(value_of(params.v.scale)),
        is_int4_(layer_.kv_dtype == semantics::kInt4) {
    if (p_.block_scales != nullptr) {
      block_output_ = workspace.reserve_block_output(p_.batch.num_tokens * row_size());
    } else if (p_.has_output_scale) {
      output_scale_ = value_of(p_.output_scale);
    }
  }

  void run(ThreadPool& pool) {
    run_schedule(workspace_.work().shared, true, pool);
    run_schedule(workspace_.work().main, false, pool);
    if (p_.block_scales != nullptr) quantize_blocks(pool);
  }

 private:
  void run_schedule(const Schedule& schedule, bool shared, ThreadPool& pool) {
    auto range_task = [&](std::int64_t i, int worker) {
      run_range(schedule, schedule.ranges[static_cast<std::size_t>(i)], shared,
                workspace_.scratch(worker));
    };
    parallel_for(pool, static_cast<std::int64_t>(schedule.ranges.size()), range_task);
    auto combine_task = [&](std::int64_t i, int worker) {
      combine_split(schedule, schedule.splits[static_cast<std::size_t>(i)], shared,
                    workspace_.scratch(worker));
    };
    parallel_for(pool, static_cast<std::int64_t>(schedule.splits.size()), combine_task);
  }

  void run_range(const Schedule& schedule, const WorkRange& range, bool shared, Scratch& scratch) {
    WorkPoint at = range.begin;
    WorkItem item;
    bool tokens_ready = false;
    while (at != range.end) {
      const WorkTile& tile = schedule.tiles[static_cast<std::size_t>(at.tile)];
      const bool last = at.tile == range.end.tile && at.item == range.end.item;
      const std::int32_t chunk_end = last ? range.end.kv_chunk : tile.num_kv_chunks;
      if (!tokens_ready) item = prepare_tile(tile, shared, scratch);
      take_heads(at.item, &item);
      run_item(schedule, item, at.kv_chunk, chunk_end,
               at.kv_chunk > 0 ? range.first_item_partial : range.last_item_partial, shared);
      if (last) return;
      tokens_ready = at.item + 1 < tile.num_items(layer_);
      at = tokens_ready ? WorkPoint{at.tile, at.item + 1, 0} : WorkPoint{at.tile + 1, 0, 0};
    }
  }

  void take_heads(std::int32_t index, WorkItem* item) const {
    item->first_kv_head = index * item->tile->kv_heads;
    item->kv_heads = std::min(item->tile->kv_heads, layer_.num_kv_heads - item->first_kv_head);
  }

  static semantics::Spans common_part(const semantics::Spans& a, const semantics::Spans& b) {
    return {semantics::clip(a.prefix, b.prefix.begin, b.prefix.end),
            semantics::clip(a.main, b.main.begin, b.main.end)};
  }

  // What all items of a tile have in common: its query tokens, and what each sees.
  WorkItem prepare_tile(const WorkTile& tile, bool shared, Scratch& scratch) const {
    const BatchParams& batch = p_.batch;
    WorkItem item;
    item.params = &p_;
    item.tile = &tile;
    item.scratch = &scratch;
    item.rows = tile.num_tokens * layer_.group;
    // Products of bf16 round the weights to it: nothing for outputs that show more.
    if (p_.output_dtype != DType::kFloat32) {
      if (!tile.decode && uses_tiles(layer_)) item.multiply_tiles = kernels_.multiply_tiles;
      if (tile.decode && uses_pairs(layer_, item.rows)) {
        item.multiply_pairs = kernels_.multiply_pairs;
      }
    }
    item.head_rows = head_rows(layer_, tile);
    item.query_scale = query_scale_;
    item.padded_k = workspace_.padded_k();
    item.padded_v = workspace_.padded_v();
    Sequence seq = sequence_at(layer_, batch, p_.num_kv_tokens, tile.seq);
    item.first_kv_row = seq.first_kv_row;
    for (std::int32_t i = 0; i < tile.num_tokens; ++i) {
      TileToken& token = scratch.tokens[static_cast<std::size_t>(i)];
      token.seq = tile.seq;
      token.row = tile.first_row + i;
      if (shared) {
        const SharedRow& row =
            workspace_.work().shared_rows[static_cast<std::size_t>(tile.first_row + i)];
        token.seq = row.seq;
        token.row = row.row;
        seq = sequence_at(layer_, batch, p_.num_kv_tokens, row.seq);
      }
      const std::int64_t position = seq.position(token.row);
      token.distance = seq.mask.kv_offset - position;
      token.kv_stride = seq.mask.kv_stride;
      token.context_len = seq.context_len;
      token.query_index = token.row - seq.first_row;
      token.visible = clip(semantics::row_spans(seq.mask, position), tile.kv_begin, tile.kv_end);
      for (const semantics::Span span : {token.visible.prefix, token.visible.main}) {
        if (span.empty()) continue;
        item.visible_begin =
            item.visible_end == 0 ? span.begin : std::min(item.visible_begin, span.begin);
        item.visible_end = std::max(item.visible_end, span.end);
      }
      // A query-query bias may hide keys too.
      const semantics::Spans certain =
          batch.qq_bias == nullptr ? token.visible : clip(token.visible, 0, token.context_len);
      item.common = i == 0 ? certain : common_part(item.common, certain);
    }
    return item;
  }

  // Chunks [chunk_begin, chunk_end) of an item. A whole item is stored here; of a cut one, partials
  // are left for combine_split(): `first_partial` is the item's partial 0.
  void run_item(const Schedule& schedule, WorkItem& item, std::int32_t chunk_begin,
                std::int32_t chunk_end, std::int64_t first_partial, bool shared) {
    const WorkTile& tile = *item.tile;
    kernels_.load_queries(item);
    if (is_int4_) rotate_queries(item);
    const auto attend_chunk = [&](std::int32_t chunk, const Partial& out) {
      item.cold = chunk == chunk_begin;
      const std::int32_t begin = chunk * tile.kv_tiles_per_chunk;
      const std::int32_t end = std::min(begin + tile.kv_tiles_per_chunk, tile.kv_tiles.count());
      kernels_.attend_chunk(item, begin, end, out);
    };
    if (chunk_begin > 0) {
      for (std::int32_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
        attend_chunk(chunk, workspace_.partial(schedule, first_partial + chunk));
      }
      return;
    }
    const bool whole = chunk_end == tile.num_kv_chunks;
    const Partial partial =
        whole ? item.scratch->item_partial : workspace_.partial(schedule, first_partial);
    attend_chunk(0, partial);
    for (std::int32_t chunk = 1; chunk < chunk_end; ++chunk) {
      attend_chunk(chunk, item.scratch->chunk_partial);
      combine(item, partial, item.scratch->chunk_partial);
    }
    if (whole) store_item(item, partial, shared);
  }

  void rotate_queries(const WorkItem& item) const {
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      for (std::int32_t r = 0; r < item.rows; ++r) {
        const std::int64_t row = std::int64_t{h} * item.head_rows + r;
        semantics::rotate_query<semantics::OneThread>(item.scratch->q + row * item.padded_k,
                                                      layer_.head_size);
      }
    }
  }

  void combine_split(const Schedule& schedule, const SplitItem& split, bool shared,
                     Scratch& scratch) {
    const WorkTile& tile = schedule.tiles[static_cast<std::size_t>(split.tile)];
    WorkItem item = prepare_tile(tile, shared, scratch);
    take_heads(split.item, &item);
    const Partial partial = workspace_.partial(schedule, split.partial);
    for (std::int32_t chunk = split.first_cut; chunk < tile.num_kv_chunks; ++chunk) {
      combine(item, partial, workspace_.partial(schedule, split.partial + chunk));
    }
    store_item(item, partial, shared);
  }

  void combine(const WorkItem& item, const Partial& into, const Partial& later) const {
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      const std::int64_t row = std::int64_t{h} * item.head_rows;
      const auto head = [&](const Partial& all) {
        return Partial{all.o + row * item.padded_v, all.max + row, all.sum + row};
      };
      kernels_.combine(head(into), head(later), item.rows, item.padded_v);
    }
  }

  void store_item(const WorkItem& item, const Partial& partial, bool shared) {
    for (std::int32_t h = 0; h < item.kv_heads; ++h) {
      for (std::int32_t r = 0; r < item.rows; ++r) {
        const std::int64_t at = std::int64_t{h} * item.head_rows + r;
        const std::int32_t head = (item.first_kv_head + h) * layer_.group + r % layer_.group;
        store_row(item, r / layer_.group, head,
                  {partial.o + at * item.padded_v, partial.max + at, partial.sum + at}, shared);
      }
    }
  }

  // The row of token i of the tile and of one head, all of its keys combined: to prefix partials
  // or, normalised, to the output.
  void store_row(const WorkItem& item, std::int32_t i, std::int32_t head, const Partial& row,
                 bool shared) {
    if (shared) {
      const Partial prefix = workspace_.prefix_partial(item.tile->first_row + i, head);
      std::copy(row.o, row.o + item.padded_v, prefix.o);
      *prefix.max = *row.max;
      *prefix.sum = *row.sum;
      return;
    }
    const std::int64_t token_row = item.scratch->tokens[static_cast<std::size_t>(i)].row;
    if (item.tile->first_shared_row < 0) return normalise(token_row, head, row);
    const Partial prefix = workspace_.prefix_partial(item.tile->first_shared_row + i, head);
    kernels_.combine(prefix, row, 1, item.padded_v);
    normalise(token_row, head, prefix);
  }

  // `partial` is of no use afterwards.
  void normalise(std::int64_t row, std::int32_t head, const Partial& partial) {
    if (is_int4_) {
      semantics::rotate_output<semantics::OneThread>(partial.o, layer_.head_size_v);
    }
    const bool has_sink = layer_.sinks != nullptr;
    constexpr float kUp = 1 << kWeightsDownLog2;
    const auto normalised =
        semantics::normalise(semantics::SoftmaxState<float>{*partial.max, *partial.sum * kUp},
                             has_sink, has_sink ? layer_.sinks[head] : 0.0F);
    const float scale = normalised.output_scale * kUp * value_scale_;
    if (block_output_ != nullptr) {
      kernels_.store_row(partial.o, layer_.head_size_v, scale, 1.0F,
                         block_output_ + row * row_size() + std::int64_t{head} * layer_.head_size_v,
                         DType::kFloat32);
    } else {
      kernels_.store_row(partial.o, layer_.head_size_v, scale, output_scale_, output_at(row, head),
                         p_.output_dtype);
    }
    if (p_.lse != nullptr) {
      p_.lse[head * p_.lse_head_stride + row * p_.lse_token_stride] = normalised.lse;
    }
  }

  std::int64_t row_size() const { return std::int64_t{layer_.num_heads} * layer_.head_size_v; }

  void* output_at(std::int64_t row, std::int64_t head) const {
    return static_cast<char*>(p_.output) +
           (row * p_.output_token_stride + head * p_.output_head_stride) * size_of(p_.output_dtype);
  }

  // A group of 128 elements may hold elements of several heads, so this runs when all heads are
  // done.
  void quantize_blocks(ThreadPool& pool) {
    const std::vector<WorkTile>& tiles = workspace_.work().main.tiles;
    auto task = [&](std::int64_t i, int) {
      const WorkTile& tile = tiles[static_cast<std::size_t>(i)];
      for (std::int32_t t = 0; t < tile.num_tokens; ++t) quantize_token(tile.first_row + t);
    };
    parallel_for(pool, static_cast<std::int64_t>(tiles.size()), task);
  }

  void quantize_token(std::int64_t row) {
    const float* from = block_output_ + row * row_size();
    for (std::int64_t begin = 0; begin < row_size(); begin += semantics::kOutputGroup) {
      const std::int64_t end = std::min(begin + semantics::kOutputGroup, row_size());
      float absmax = 0.0F;
      for (std::int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(from[i]));
      const float scale = semantics::block_output_scale(absmax);
      p_.block_scales[row * p_.block_scales_token_stride +
                      begin / semantics::kOutputGroup * p_.block_scales_group_stride] = scale;
      for (std::int64_t i = begin; i < end; ++i) {
        semantics::store_element(output_at(row, i / layer_.head_size_v), p_.output_dtype,
                                 i % layer_.head_size_v, from[i] / scale);
      }
    }
  }

  CpuPlan& workspace_;
  const AttentionParams& p_;
  const LayerParams& layer_;
  const Kernels& kernels_;
  const float query_scale_;
  const float value_scale_;
  const bool is_int4_;
  float output_scale_ = 1.0F;
  float* block_output_ = nullptr;
};

}  // namespace

void CpuPlan::attention(const AttentionParams& params, const Context& ctx) {
  ThreadPool& pool = pool_of(ctx);
  reserve_workers(pool.num_threads());
  Call(*this, params).run(pool);
}

}  // namespace quire::cpu
