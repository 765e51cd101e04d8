// AttentionMetadataBuilder and AttentionImpl: vLLM's names over the functional core.
#include "api/check.h"
#include "api/lower.h"
#include "quire/backend.h"

namespace quire {

AttentionMetadataBuilder::AttentionMetadataBuilder(const AttentionConfig& config)
    : config_(config), plan_(std::make_shared<Plan>(config)) {}

AttentionMetadata AttentionMetadataBuilder::build(std::int64_t common_prefix_len,
                                                  const CommonAttentionMetadata& common,
                                                  bool /*fast_build*/, const Context& ctx) {
  plan_->update(common, common_prefix_len, ctx);
  AttentionMetadata metadata;
  metadata.common = common;
  metadata.use_cascade = common_prefix_len > 0 && !config_.batch_invariant;
  metadata.common_prefix_len = metadata.use_cascade ? common_prefix_len : 0;
  metadata.scheduler_metadata = plan_;
  return metadata;
}

AttentionMetadata AttentionMetadataBuilder::build_for_cudagraph_capture(
    const CommonAttentionMetadata& common, const Context& ctx) {
  return build(0, common, true, ctx);
}

AttentionImpl::AttentionImpl(const AttentionConfig& config,
                             std::string kv_sharing_target_layer_name)
    : config_(config), kv_sharing_target_layer_name_(std::move(kv_sharing_target_layer_name)) {
  const Plan validated(config);
}

namespace {

PagedKvCache with_scales(PagedKvCache cache, const LayerScales& scales) {
  if (is_per_tensor_fp8(cache.dtype)) {
    cache.k_scale = scales.k;
    cache.v_scale = scales.v;
  }
  return cache;
}

// A profiling run has no batch: the output only has to exist and be finite.
void fill_with_zeros(const AttentionConfig& config, const TensorView& output, const Context& ctx) {
  check::that(output.ndim == 2 || output.ndim == 3, "output", "2 or 3 dimensions", output);
  check::tensor("output", output, config.device, {output.dtype},
                output.ndim == 2
                    ? std::initializer_list<std::int64_t>{check::kAny, check::kAny}
                    : std::initializer_list<std::int64_t>{check::kAny, check::kAny, check::kAny});
  check::unit_last_stride("output", output);
  pick_backend(config.device, config.backend).fill_zero(output, ctx);
}

bool same_layer(const AttentionConfig& a, const AttentionConfig& b) {
  return a.num_heads == b.num_heads && a.num_kv_heads == b.num_kv_heads &&
         a.head_size == b.head_size && a.value_head_size() == b.value_head_size() &&
         a.block_size == b.block_size && a.kv_cache_dtype == b.kv_cache_dtype && a.type == b.type &&
         a.dtype == b.dtype && a.device == b.device && a.mask == b.mask;
}

}  // namespace

TensorView AttentionImpl::forward(const LayerScales& scales, const TensorView& query,
                                  const TensorView& key, const TensorView& value,
                                  const PagedKvCache& kv_cache, const AttentionMetadata* metadata,
                                  const TensorView& output,
                                  const std::optional<Scale>& output_scale,
                                  const TensorView& output_block_scale, const TensorView& lse,
                                  const Context& ctx) const {
  if (metadata == nullptr) {
    fill_with_zeros(config_, output, ctx);
    return output;
  }
  check::that(metadata->scheduler_metadata != nullptr, "metadata",
              "metadata made by AttentionMetadataBuilder", "no plan in it");
  const Plan& plan = *metadata->scheduler_metadata;
  check::that(same_layer(plan.config(), config_), "metadata",
              "metadata built for this layer's configuration", "another one's");

  const bool encoder = !plan.impl().layer.paged;
  AttentionArgs args;
  args.query = query;
  args.output = output;
  args.lse = lse;
  args.score = &config_.score;
  args.q_scale = scales.q;
  args.has_output_scale = output_scale.has_value();
  if (output_scale) args.output_scale = *output_scale;
  args.output_block_scale = output_block_scale;
  if (encoder) {
    args.key = key;
    args.value = value;
  } else {
    args.kv_cache = with_scales(kv_cache, scales);
  }

  // Everything is checked before the cache changes.
  const Plan::Impl& impl = plan.impl();
  check::that(impl.planned, "metadata", "metadata of a successful build()", "an unplanned batch");
  LayerParams layer = impl.layer;
  const AttentionParams params = api::lower_attention(impl.config, impl.batch_params, args, &layer);
  if (ctx.check_indices) api::check_block_table(*impl.backend, params, ctx);
  if (!encoder && (key || value)) {
    do_kv_cache_update(scales, key, value, kv_cache, metadata->common.slot_mapping, ctx);
  }
  attention(plan, args, ctx);
  return output;
}

void AttentionImpl::do_kv_cache_update(const LayerScales& scales, const TensorView& key,
                                       const TensorView& value, const PagedKvCache& kv_cache,
                                       const TensorView& slot_mapping, const Context& ctx) const {
  if (!kv_sharing_target_layer_name_.empty()) return;
  write_kv_cache(key, value, with_scales(kv_cache, scales), slot_mapping, ctx);
}

}  // namespace quire
