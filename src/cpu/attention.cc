// One attention call on the CPU: hands ranges of the plan to workers, folds what they share,
// finishes rows. Plain C++; the arithmetic is in the kernels of the ISA (attention-inl.h).
//
//   shared prefixes (ranges, folds) -> main tiles (ranges, folds) -> block-scale quantisation
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/layer_plan.h"
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
        value_scale_(value_of(params.v.scale)) {
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
    auto fold_task = [&](std::int64_t i, int worker) {
      fold_split(schedule, schedule.splits[static_cast<std::size_t>(i)], shared,
                 workspace_.scratch(worker));
    };
    parallel_for(pool, static_cast<std::int64_t>(schedule.splits.size()), fold_task);
  }

  void run_range(const Schedule& schedule, const WorkRange& range, bool shared, Scratch& scratch) {
    WorkPoint at = range.begin;
    Item item;
    bool tokens_ready = false;
    while (at != range.end) {
      const WorkTile& tile = schedule.tiles[static_cast<std::size_t>(at.tile)];
      const bool last = at.tile == range.end.tile && at.item == range.end.item;
      const std::int32_t chunk_end = last ? range.end.chunk : tile.num_chunks;
      if (!tokens_ready) item = prepare_tile(tile, shared, scratch);
      take_heads(at.item, &item);
      run_item(schedule, item, at.chunk, chunk_end,
               at.chunk > 0 ? range.first_item_slot : range.last_item_slot, shared);
      if (last) return;
      tokens_ready = at.item + 1 < tile.num_items(layer_);
      at = tokens_ready ? WorkPoint{at.tile, at.item + 1, 0} : WorkPoint{at.tile + 1, 0, 0};
    }
  }

  void take_heads(std::int32_t index, Item* item) const {
    item->kv_head = index * item->tile->heads;
    item->heads = std::min(item->tile->heads, layer_.num_kv_heads - item->kv_head);
  }

  static semantics::Spans common_part(const semantics::Spans& a, const semantics::Spans& b) {
    return {semantics::clip(a.prefix, b.prefix.begin, b.prefix.end),
            semantics::clip(a.main, b.main.begin, b.main.end)};
  }

  // Resolves the tile's query tokens and what each sees.
  Item prepare_tile(const WorkTile& tile, bool shared, Scratch& scratch) const {
    const BatchParams& batch = p_.batch;
    Item item;
    item.params = &p_;
    item.tile = &tile;
    item.scratch = &scratch;
    item.rows = tile.num_tokens * layer_.group;
    item.head_rows = head_rows(layer_, tile);
    item.query_scale = query_scale_;
    item.padded_k = workspace_.padded_k();
    item.padded_v = workspace_.padded_v();
    Sequence seq = sequence_at(layer_, batch, p_.num_kv_tokens, tile.seq);
    item.first_kv_row = seq.first_kv_row;
    for (std::int32_t i = 0; i < tile.num_tokens; ++i) {
      TileToken& token = scratch.tokens[static_cast<std::size_t>(i)];
      token.seq = tile.seq;
      token.row = tile.first + i;
      if (shared) {
        const SharedRow& row =
            workspace_.work().shared_rows[static_cast<std::size_t>(tile.first + i)];
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
        item.hull_begin = item.hull_end == 0 ? span.begin : std::min(item.hull_begin, span.begin);
        item.hull_end = std::max(item.hull_end, span.end);
      }
      // A query-query bias may hide keys too.
      const semantics::Spans certain =
          batch.qq_bias == nullptr ? token.visible : clip(token.visible, 0, token.context_len);
      item.common = i == 0 ? certain : common_part(item.common, certain);
    }
    return item;
  }

  // Chunks [chunk_begin, chunk_end) of an item. A whole item is finished here; a part of one goes
  // to the item's partial slots.
  void run_item(const Schedule& schedule, Item& item, std::int32_t chunk_begin,
                std::int32_t chunk_end, std::int64_t first_slot, bool shared) {
    const WorkTile& tile = *item.tile;
    kernels_.load_queries(item);
    const auto run_chunk = [&](std::int32_t chunk, const PartialRows& out) {
      item.cold = chunk == chunk_begin;
      kernels_.run_chunk(item, chunk * tile.units_per_chunk,
                         std::min((chunk + 1) * tile.units_per_chunk, tile.units.count()), out);
    };
    if (chunk_begin > 0) {
      for (std::int32_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
        run_chunk(chunk, workspace_.slot(schedule, first_slot + chunk));
      }
      return;
    }
    const bool whole = chunk_end == tile.num_chunks;
    const PartialRows result = whole ? item.scratch->result : workspace_.slot(schedule, first_slot);
    run_chunk(0, result);
    for (std::int32_t chunk = 1; chunk < chunk_end; ++chunk) {
      run_chunk(chunk, item.scratch->chunk);
      kernels_.fold(result, item.scratch->chunk, item.head_rows * item.heads, item.padded_v);
    }
    if (whole) finish_item(item, result, shared);
  }

  void fold_split(const Schedule& schedule, const SplitItem& split, bool shared, Scratch& scratch) {
    const WorkTile& tile = schedule.tiles[static_cast<std::size_t>(split.tile)];
    Item item = prepare_tile(tile, shared, scratch);
    take_heads(split.item, &item);
    const PartialRows result = workspace_.slot(schedule, split.slot);
    for (std::int32_t chunk = split.first_cut; chunk < tile.num_chunks; ++chunk) {
      kernels_.fold(result, workspace_.slot(schedule, split.slot + chunk),
                    item.head_rows * item.heads, item.padded_v);
    }
    finish_item(item, result, shared);
  }

  void finish_item(const Item& item, const PartialRows& result, bool shared) {
    for (std::int32_t h = 0; h < item.heads; ++h) {
      for (std::int32_t r = 0; r < item.rows; ++r) finish_head_row(item, result, h, r, shared);
    }
  }

  void finish_head_row(const Item& item, const PartialRows& result, std::int32_t h, std::int32_t r,
                       bool shared) {
    const std::int32_t i = r / layer_.group;
    const std::int32_t head = (item.kv_head + h) * layer_.group + r % layer_.group;
    const std::int64_t at = std::int64_t{h} * item.head_rows + r;
    PartialRows row{result.o + at * item.padded_v, result.max + at, result.sum + at};
    if (shared) {
      const PartialRows kept = workspace_.shared_result(item.tile->first + i, head);
      std::copy(row.o, row.o + item.padded_v, kept.o);
      *kept.max = *row.max;
      *kept.sum = *row.sum;
      return;
    }
    if (item.tile->shared_first >= 0) {
      const PartialRows prefix = workspace_.shared_result(item.tile->shared_first + i, head);
      kernels_.fold(prefix, row, 1, item.padded_v);
      row = prefix;
    }
    finish_row(item.scratch->tokens[static_cast<std::size_t>(i)].row, head, row);
  }

  void finish_row(std::int64_t row, std::int32_t head, const PartialRows& state) {
    const bool has_sink = layer_.sinks != nullptr;
    constexpr float kUp = 1 << kWeightsDownLog2;
    const auto finished =
        semantics::finish(semantics::SoftmaxState<float>{*state.max, *state.sum * kUp}, has_sink,
                          has_sink ? layer_.sinks[head] : 0.0F);
    const float scale = finished.output_scale * kUp * value_scale_;
    if (block_output_ != nullptr) {
      kernels_.store_row(state.o, layer_.head_size_v, scale, 1.0F,
                         block_output_ + row * row_size() + std::int64_t{head} * layer_.head_size_v,
                         DType::kFloat32);
    } else {
      kernels_.store_row(state.o, layer_.head_size_v, scale, output_scale_, output_at(row, head),
                         p_.output_dtype);
    }
    if (p_.lse != nullptr) {
      p_.lse[head * p_.lse_head_stride + row * p_.lse_token_stride] = finished.lse;
    }
  }

  std::int64_t row_size() const { return std::int64_t{layer_.num_heads} * layer_.head_size_v; }

  void* output_at(std::int64_t row, std::int64_t head) const {
    return static_cast<char*>(p_.output) +
           (row * p_.output_token_stride + head * p_.output_head_stride) * size_of(p_.output_dtype);
  }

  // Groups of 128 cross heads, so rows are quantised when all heads are there.
  void quantize_blocks(ThreadPool& pool) {
    const std::vector<WorkTile>& tiles = workspace_.work().main.tiles;
    auto task = [&](std::int64_t i, int) {
      const WorkTile& tile = tiles[static_cast<std::size_t>(i)];
      for (std::int32_t t = 0; t < tile.num_tokens; ++t) quantize_token(tile.first + t);
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
