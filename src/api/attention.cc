// The functional core: check once, lower to params.h, hand to the backend.
#include "quire/attention.h"

#include <cmath>

#include "api/check.h"
#include "api/lower.h"

namespace quire {
namespace api {
namespace {

using check::kAny;

bool is_encoder(AttentionType type) {
  return type == AttentionType::kEncoder || type == AttentionType::kEncoderOnly;
}

}  // namespace

namespace {

// A call may bring a score of its own, so this is asked once more than Backend::unsupported() does.
void check_score_capabilities(const Score& score, const BackendCapabilities& caps) {
  check::capability(!score.alibi_slopes || caps.alibi, "alibi_slopes", score.alibi_slopes);
  check::capability(!score.sinks || caps.sinks, "sinks", score.sinks);
  check::capability(score.soft_cap == 0 || caps.soft_cap, "soft_cap", score.soft_cap);
}

void lower_score(const AttentionConfig& config, const BackendCapabilities& caps, const Score& score,
                 LayerParams* layer) {
  if (score.alibi_slopes) {
    check::tensor("alibi_slopes", score.alibi_slopes, config.device, {DType::kFloat32},
                  {config.num_heads});
    check::contiguous("alibi_slopes", score.alibi_slopes);
  }
  if (score.sinks) {
    check::tensor("sinks", score.sinks, config.device, {DType::kFloat32}, {config.num_heads});
    check::contiguous("sinks", score.sinks);
  }
  check::that(std::isfinite(score.softmax_scale), "softmax_scale", "a finite scale",
              score.softmax_scale);
  check::that(std::isfinite(score.soft_cap) && score.soft_cap >= 0, "soft_cap",
              "a finite cap of at least 0", score.soft_cap);
  check::that(!score.alibi_sqrt || score.alibi_slopes, "alibi_slopes",
              "slopes to go with alibi_sqrt", "none");
  layer->softmax_scale = score.softmax_scale != 0.0F
                             ? score.softmax_scale
                             : 1.0F / std::sqrt(static_cast<float>(config.head_size));
  layer->soft_cap = score.soft_cap;
  layer->alibi_slopes = check::data<const float>(score.alibi_slopes);
  layer->alibi_sqrt = score.alibi_sqrt;
  layer->sinks = check::data<const float>(score.sinks);
  check_score_capabilities(score, caps);
}

}  // namespace

LayerParams lower_layer(const AttentionConfig& config, const BackendCapabilities& caps) {
  LayerParams layer;
  layer.num_heads = static_cast<std::int32_t>(config.num_heads);
  layer.num_kv_heads = static_cast<std::int32_t>(config.num_kv_heads);
  layer.group = layer.num_heads / layer.num_kv_heads;
  layer.head_size = static_cast<std::int32_t>(config.head_size);
  layer.head_size_v = static_cast<std::int32_t>(config.value_head_size());
  layer.block_size = static_cast<std::int32_t>(config.block_size);
  layer.device = config.device;
  layer.dtype = config.dtype;
  layer.paged = !is_encoder(config.type);
  layer.kv_dtype = layer.paged ? storage_dtype(config.kv_cache_dtype, config.dtype) : config.dtype;
  layer.token_scales = layer.paged && is_per_token_head(config.kv_cache_dtype);
  layer.cross = config.type == AttentionType::kEncoderDecoder;
  layer.batch_invariant = config.batch_invariant;
  layer.auto_cascade =
      config.auto_cascade && caps.cascade && !config.batch_invariant && layer.paged;
  layer.mask = config.mask;
  if (config.type != AttentionType::kDecoder) layer.mask.causal = false;
  lower_score(config, caps, config.score, &layer);
  return layer;
}

namespace {

void lower_masks(const CommonAttentionMetadata& batch, Device device, BatchParams* p) {
  const std::int64_t num_seqs = p->num_seqs;
  if (batch.causal) {
    check::tensor("causal", batch.causal, device, {DType::kBool, DType::kUInt8}, {num_seqs});
    check::contiguous("causal", batch.causal);
    p->causal = check::data<const std::uint8_t>(batch.causal);
  }
  if (batch.mm_prefix_range) {
    check::tensor("mm_prefix_range", batch.mm_prefix_range, device, {DType::kInt32},
                  {num_seqs, kAny, 2});
    check::contiguous("mm_prefix_range", batch.mm_prefix_range);
    p->ranges = check::data<const std::int32_t>(batch.mm_prefix_range);
    p->num_ranges = static_cast<std::int32_t>(batch.mm_prefix_range.shape[1]);
  }
  if (batch.visible_prefix_lens) {
    check::tensor("visible_prefix_lens", batch.visible_prefix_lens, device, {DType::kInt32},
                  {num_seqs});
    check::contiguous("visible_prefix_lens", batch.visible_prefix_lens);
    p->visible_prefix_lens = check::data<const std::int32_t>(batch.visible_prefix_lens);
  }
}

void lower_positions(const CommonAttentionMetadata& batch, Device device, BatchParams* p) {
  const auto lower = [&](std::string_view name, const ConstTensorView& view) {
    if (view) {
      check::tensor(name, view, device, {DType::kInt32}, {p->num_seqs});
      check::contiguous(name, view);
    }
    return check::data<const std::int32_t>(view);
  };
  p->kv_offset = lower("kv_offset", batch.kv_offset);
  p->kv_stride = lower("kv_stride", batch.kv_stride);
  p->q_offset = lower("q_offset", batch.q_offset);
}

void lower_qq_bias(const ConstTensorView& bias, Device device, bool has_own_keys, BatchParams* p) {
  if (!bias) return;
  if (bias.ndim == 3) {
    check::tensor("qq_bias", bias, device, {DType::kFloat32}, {p->num_seqs, kAny, kAny});
    p->qq_seq_stride = bias.strides[0];
  } else {
    check::tensor("qq_bias", bias, device, {DType::kFloat32}, {kAny, kAny});
  }
  check::that(bias.shape[bias.ndim - 1] == bias.shape[bias.ndim - 2], "qq_bias",
              "a square [m, m] for each sequence", bias);
  check::unit_last_stride("qq_bias", bias);
  if (!has_own_keys) return;  // the bias is about this step's own tokens: here no key is one
  p->qq_bias = check::data<const float>(bias);
  p->qq_size = bias.shape[bias.ndim - 1];
  p->qq_row_stride = bias.strides[bias.ndim - 2];
}

void lower_keys(const AttentionConfig& config, const CommonAttentionMetadata& batch,
                BatchParams* p) {
  if (is_encoder(config.type)) {
    if (!batch.kv_start_loc) return;
    check::tensor("kv_start_loc", batch.kv_start_loc, config.device, {DType::kInt32},
                  {p->num_seqs + 1});
    check::contiguous("kv_start_loc", batch.kv_start_loc);
    p->kv_start_loc = check::data<const std::int32_t>(batch.kv_start_loc);
    return;
  }
  check::tensor("seq_lens", batch.seq_lens, config.device, {DType::kInt32}, {p->num_seqs});
  check::contiguous("seq_lens", batch.seq_lens);
  check::tensor("block_table", batch.block_table, config.device, {DType::kInt32}, {kAny, kAny});
  check::unit_last_stride("block_table", batch.block_table);
  check::at_least("block_table", batch.block_table, 0, p->num_seqs, "one row a sequence");
  p->seq_lens = check::data<const std::int32_t>(batch.seq_lens);
  p->block_table = check::data<const std::int32_t>(batch.block_table);
  p->table_stride = batch.block_table.strides[0];
  p->table_width = batch.block_table.shape[1];
}

void check_batch_capabilities(const BackendCapabilities& caps, const CommonAttentionMetadata& batch,
                              std::int64_t common_prefix_len) {
  check::capability(!batch.mm_prefix_range || caps.bidirectional_ranges, "mm_prefix_range",
                    batch.mm_prefix_range);
  check::capability(!batch.visible_prefix_lens || caps.visible_prefix, "visible_prefix_lens",
                    batch.visible_prefix_lens);
  check::capability(!batch.qq_bias || caps.qq_bias, "qq_bias", batch.qq_bias);
  check::capability(common_prefix_len == 0 || caps.cascade, "common_prefix_len", common_prefix_len);
}

}  // namespace

BatchParams lower_batch(const AttentionConfig& config, const BackendCapabilities& caps,
                        const CommonAttentionMetadata& batch, std::int64_t common_prefix_len) {
  const Device device = config.device;
  BatchParams p;
  check::tensor("query_start_loc", batch.query_start_loc, device, {DType::kInt32}, {kAny});
  check::contiguous("query_start_loc", batch.query_start_loc);
  check::at_least("query_start_loc", batch.query_start_loc, 0, 1, "num_seqs + 1 offsets");
  check::that(batch.query_start_loc.shape[0] <= (1LL << 30), "query_start_loc",
              "at most 2^30 sequences", batch.query_start_loc.shape[0]);
  p.num_seqs = static_cast<std::int32_t>(batch.num_seqs());
  check::that(batch.num_actual_tokens >= 0 && batch.num_actual_tokens < (1LL << 31),
              "num_actual_tokens", "0 to 2^31 - 1", batch.num_actual_tokens);
  check::that(batch.max_query_len >= 0, "max_query_len", "at least 0", batch.max_query_len);
  check::that(batch.max_seq_len >= 0, "max_seq_len", "at least 0", batch.max_seq_len);
  check::that(common_prefix_len >= 0 && common_prefix_len < (1LL << 31), "common_prefix_len",
              "0 to 2^31 - 1", common_prefix_len);
  check::that(common_prefix_len == 0 || !is_encoder(config.type), "common_prefix_len",
              "0 for attention without a cache", common_prefix_len);
  check_batch_capabilities(caps, batch, common_prefix_len);
  p.num_tokens = batch.num_actual_tokens;
  p.max_query_len = batch.max_query_len;
  p.max_seq_len = batch.max_seq_len;
  p.query_start_loc = check::data<const std::int32_t>(batch.query_start_loc);
  p.common_prefix_len = config.batch_invariant ? 0 : common_prefix_len;
  lower_keys(config, batch, &p);
  lower_masks(batch, device, &p);
  lower_positions(batch, device, &p);
  const bool has_own_keys = config.type != AttentionType::kEncoderDecoder && !p.kv_start_loc;
  lower_qq_bias(batch.qq_bias, device, has_own_keys, &p);
  return p;
}

namespace {

void lower_query(const AttentionConfig& config, const AttentionArgs& args, AttentionParams* p) {
  const std::int64_t num_tokens = p->batch.num_tokens;
  check::tensor("query", args.query, config.device, {config.dtype},
                {kAny, config.num_heads, config.head_size});
  check::unit_last_stride("query", args.query);
  check::at_least("query", args.query, 0, num_tokens, "num_actual_tokens");
  p->query = args.query.data;
  p->query_token_stride = args.query.strides[0];
  p->query_head_stride = args.query.strides[1];
  if (config.dtype == DType::kFloat8E4M3) {
    check::scale("q_scale", args.q_scale);
    p->q_scale = args.q_scale;
  }
}

void lower_paged(const AttentionConfig& config, const AttentionArgs& args, AttentionParams* p) {
  const PagedKvCache& cache = args.kv_cache;
  lower_cache(cache, config.device, &p->k, &p->v);
  const KvCacheDType wanted = spelled_out(config.kv_cache_dtype, config.dtype);
  check::that(
      spelled_out(cache.dtype, cache.key.dtype) == wanted,
      cache.dtype == KvCacheDType::kAuto ? "kv_cache.key" : "kv_cache.dtype",
      [&] { return std::string("the plan's kv_cache_dtype ") + to_string(wanted); },
      cache.dtype == KvCacheDType::kAuto ? to_string(cache.key.dtype) : to_string(cache.dtype));
  check::tensor(
      "kv_cache.key", cache.key, config.device, {cache.key.dtype},
      {kAny, config.block_size, config.num_kv_heads, stored_head_size(wanted, config.head_size)});
  check::tensor("kv_cache.value", cache.value, config.device, {cache.value.dtype},
                {kAny, config.block_size, config.num_kv_heads,
                 stored_head_size(wanted, config.value_head_size())});
  check::that(cache.num_blocks() < (1LL << 31), "kv_cache.key", "at most 2^31 - 1 blocks",
              cache.num_blocks());
  p->num_blocks = cache.num_blocks();
}

KvParams lower_direct_side(std::string_view name, const ConstTensorView& view,
                           const AttentionConfig& config, std::int64_t head_size) {
  check::tensor(name, view, config.device, {config.dtype}, {kAny, config.num_kv_heads, head_size});
  check::unit_last_stride(name, view);
  KvParams params;
  params.data = const_cast<void*>(view.data);  // attention only reads it
  params.dtype = view.dtype;
  params.strides = {0, view.strides[0], view.strides[1]};
  return params;
}

void lower_direct(const AttentionConfig& config, const AttentionArgs& args, AttentionParams* p) {
  p->k = lower_direct_side("key", args.key, config, config.head_size);
  p->v = lower_direct_side("value", args.value, config, config.value_head_size());
  p->num_kv_tokens = args.key.shape[0];
  check::that(args.value.shape[0] == p->num_kv_tokens, "value", "as many rows as key", args.value);
  if (p->batch.kv_start_loc == nullptr) {
    check::at_least("key", args.key, 0, p->batch.num_tokens, "num_actual_tokens");
  }
}

void lower_output_scales(const AttentionConfig& config, const AttentionArgs& args,
                         AttentionParams* p) {
  const bool fp8 = args.output.dtype == DType::kFloat8E4M3;
  const bool block = static_cast<bool>(args.output_block_scale);
  check::that(!(block && args.has_output_scale), "output_block_scale",
              "at most one of output_scale and output_block_scale", "both");
  check::that(fp8 || !args.has_output_scale, "output_scale", "an fp8 output to go with it",
              to_string(args.output.dtype));
  check::that(fp8 || !block, "output_block_scale", "an fp8 output to go with it",
              to_string(args.output.dtype));
  check::that(!fp8 || block || args.has_output_scale, "output_scale",
              "an output_scale or output_block_scale for an fp8 output", "none");
  if (args.has_output_scale) {
    check::scale("output_scale", args.output_scale);
    p->has_output_scale = true;
    p->output_scale = args.output_scale;
  }
  if (!block) return;
  const std::int64_t groups = (config.num_heads * config.value_head_size() + 127) / 128;
  check::tensor("output_block_scale", args.output_block_scale, config.device, {DType::kFloat32},
                {kAny, groups});
  check::at_least("output_block_scale", args.output_block_scale, 0, p->batch.num_tokens,
                  "num_actual_tokens");
  p->block_scales = check::data<float>(args.output_block_scale);
  p->block_scales_token_stride = args.output_block_scale.strides[0];
  p->block_scales_group_stride = args.output_block_scale.strides[1];
}

void lower_output(const AttentionConfig& config, const BackendCapabilities& caps,
                  const AttentionArgs& args, AttentionParams* p) {
  const TensorView& output = args.output;
  const std::int64_t head_size_v = config.value_head_size();
  if (output.ndim == 3) {
    check::tensor("output", output, config.device, caps.output_dtypes,
                  {kAny, config.num_heads, head_size_v});
    p->output_head_stride = output.strides[1];
  } else {
    check::tensor("output", output, config.device, caps.output_dtypes,
                  {kAny, config.num_heads * head_size_v});
    p->output_head_stride = head_size_v;
  }
  check::capability(output.dtype != DType::kFloat8E4M3 || caps.fp8_output, "output", output);
  check::capability(!args.output_block_scale || caps.block_scale_output, "output_block_scale",
                    args.output_block_scale);
  check::capability(!args.lse || caps.lse, "lse", args.lse);
  check::unit_last_stride("output", output);
  check::at_least("output", output, 0, p->batch.num_tokens, "num_actual_tokens");
  p->output = output.data;
  p->output_dtype = output.dtype;
  p->output_token_stride = output.strides[0];
  lower_output_scales(config, args, p);
  if (!args.lse) return;
  check::tensor("lse", args.lse, config.device, {DType::kFloat32}, {config.num_heads, kAny});
  check::at_least("lse", args.lse, 1, p->batch.num_tokens, "num_actual_tokens");
  p->lse = check::data<float>(args.lse);
  p->lse_head_stride = args.lse.strides[0];
  p->lse_token_stride = args.lse.strides[1];
}

}  // namespace

AttentionParams lower_attention(const AttentionConfig& config, const BackendCapabilities& caps,
                                const LayerParams& layer, const BatchParams& batch,
                                const AttentionArgs& args) {
  AttentionParams params;
  params.layer = layer;
  params.batch = batch;
  if (args.score != nullptr) lower_score(config, caps, *args.score, &params.layer);
  lower_query(config, args, &params);
  if (layer.paged) {
    lower_paged(config, args, &params);
  } else {
    lower_direct(config, args, &params);
  }
  lower_output(config, caps, args, &params);
  return params;
}

const Backend& backend_of(const AttentionConfig& config) {
  const Backend& backend = pick_backend(config.device, config.backend);
  const std::vector<Unsupported> reasons = backend.unsupported(config);
  if (reasons.empty()) return backend;
  std::string others;
  for (std::size_t i = 1; i < reasons.size(); ++i) others += "; " + reasons[i].text();
  throw Error(reasons[0].argument, reasons[0].expected, reasons[0].got + others);
}

void check_backend(const Backend& backend, const Context& ctx) {
  check::that(
      ctx.backend.empty() || ctx.backend == backend.name(), "backend",
      [&] { return std::string("none, or the plan's, ") + backend.name(); }, ctx.backend);
}

}  // namespace api

Plan::Plan(const AttentionConfig& config) : impl_(std::make_unique<Impl>()) {
  impl_->config = config;
  impl_->backend = &api::backend_of(config);
  impl_->layer = api::lower_layer(config, impl_->backend->capabilities());
  impl_->plan = impl_->backend->make_plan(impl_->layer);
}

Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

void Plan::update(const CommonAttentionMetadata& batch, std::int64_t common_prefix_len,
                  const Context& ctx) {
  impl().update(batch, impl().lower(batch, common_prefix_len, ctx), ctx);
}

BatchParams Plan::Impl::lower(const CommonAttentionMetadata& metadata,
                              std::int64_t common_prefix_len, const Context& ctx) const {
  api::check_backend(*backend, ctx);
  const BatchParams params =
      api::lower_batch(config, backend->capabilities(), metadata, common_prefix_len);
  if (ctx.check_indices) api::check_batch_indices(*backend, layer, params, ctx);
  return params;
}

void Plan::Impl::update(const CommonAttentionMetadata& metadata, const BatchParams& params,
                        const Context& ctx) {
  planned = false;
  ++build_number;
  plan->update(params, ctx);
  batch = metadata;
  batch_params = params;
  planned = true;
}

Plan::Impl& Plan::impl() const {
  check::that(impl_ != nullptr, "plan", "a plan", "one that was moved from");
  return *impl_;
}

const AttentionConfig& Plan::config() const { return impl().config; }
const CommonAttentionMetadata& Plan::batch() const { return impl().batch; }
const char* Plan::backend_name() const { return impl().backend->name(); }
std::int64_t Plan::workspace_bytes() const { return impl().plan->workspace_bytes(); }
std::string Plan::to_string() const { return impl().plan->to_string(); }

Plan plan(const AttentionConfig& config, const CommonAttentionMetadata& batch,
          std::int64_t common_prefix_len, const Context& ctx) {
  Plan result(config);
  result.update(batch, common_prefix_len, ctx);
  return result;
}

void attention(const Plan& plan, const AttentionArgs& args, const Context& ctx) {
  const Plan::Impl& impl = plan.impl();
  check::that(impl.planned, "plan", "a plan that update() was called on", "none");
  impl.attend(impl.lower(args, ctx), ctx);
}

AttentionParams Plan::Impl::lower(const AttentionArgs& args, const Context& ctx) const {
  api::check_backend(*backend, ctx);
  const AttentionParams params =
      api::lower_attention(config, backend->capabilities(), layer, batch_params, args);
  if (ctx.check_indices) api::check_call_data(*backend, params, ctx);
  return params;
}

void Plan::Impl::attend(const AttentionParams& params, const Context& ctx) const {
  if (params.batch.num_tokens == 0 || params.batch.num_seqs == 0) return;
  plan->attention(params, ctx);
}

namespace api {
namespace {

template <class Data>
MergePart lower_part(std::string_view o_name, const BasicTensorView<Data>& o,
                     std::string_view lse_name, const BasicTensorView<Data>& lse,
                     const ConstTensorView& like) {
  using check::kAny;
  check::tensor(o_name, o, like.device, {like.dtype},
                {like.shape[0], like.shape[1], like.shape[2]});
  check::unit_last_stride(o_name, o);
  MergePart part;
  part.output = o.data;
  part.token_stride = o.strides[0];
  part.head_stride = o.strides[1];
  if (lse) {
    check::tensor(lse_name, lse, like.device, {DType::kFloat32}, {like.shape[1], kAny});
    check::at_least(lse_name, lse, 1, like.shape[0], "num_tokens");
    part.lse = check::data<const float>(lse);
    part.lse_head_stride = lse.strides[0];
    part.lse_token_stride = lse.strides[1];
  }
  return part;
}

}  // namespace

MergeParams lower_merge(const BackendCapabilities& caps, const ConstTensorView& o_a,
                        const ConstTensorView& lse_a, const ConstTensorView& o_b,
                        const ConstTensorView& lse_b, const TensorView& output,
                        const TensorView& lse) {
  using check::kAny;
  check::tensor("o_a", o_a, o_a.device, {DType::kFloat16, DType::kBFloat16, DType::kFloat32},
                {kAny, kAny, kAny});
  check::capability(check::contains(caps.output_dtypes, o_a.dtype), "o_a", o_a);
  check::that(static_cast<bool>(lse_a), "lse_a", "a tensor", "none");
  check::that(static_cast<bool>(lse_b), "lse_b", "a tensor", "none");
  check::that(o_a.shape[1] <= kMaxHeads && o_a.shape[2] <= kMaxRowSize, "o_a",
              "at most 65536 heads of at most 2^20 elements", o_a);
  MergeParams params;
  params.a = lower_part("o_a", o_a, "lse_a", lse_a, o_a);
  params.b = lower_part("o_b", o_b, "lse_b", lse_b, o_a);
  params.result = lower_part("output", output, "lse", lse, o_a);
  params.device = o_a.device;
  params.dtype = o_a.dtype;
  params.num_tokens = o_a.shape[0];
  params.num_heads = static_cast<std::int32_t>(o_a.shape[1]);
  params.head_size_v = static_cast<std::int32_t>(o_a.shape[2]);
  return params;
}

}  // namespace api

void merge_states(const ConstTensorView& o_a, const ConstTensorView& lse_a,
                  const ConstTensorView& o_b, const ConstTensorView& lse_b,
                  const TensorView& output, const TensorView& lse, const Context& ctx) {
  const Backend& backend = pick_backend(o_a.device, ctx.backend, "o_a");
  const MergeParams params =
      api::lower_merge(backend.capabilities(), o_a, lse_a, o_b, lse_b, output, lse);
  if (o_a.num_elements() == 0) return;
  backend.merge(params, ctx);
}

}  // namespace quire
