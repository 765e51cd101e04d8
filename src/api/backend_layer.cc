// AttentionImpl: one layer of vLLM's serving interface over the functional core.
#include "api/check.h"
#include "api/lower.h"
#include "quire/backend.h"

namespace quire {

AttentionImpl::AttentionImpl(const AttentionConfig& config,
                             std::string kv_sharing_target_layer_name)
    : config_(config),
      backend_(&api::backend_of(config)),
      kv_sharing_target_layer_name_(std::move(kv_sharing_target_layer_name)) {
  api::lower_layer(config, backend_->capabilities());  // checks the tensors of its score
}

namespace {

PagedKvCache with_scales(PagedKvCache cache, const LayerScales& scales) {
  if (scales.k) cache.k_scale = *scales.k;
  if (scales.v) cache.v_scale = *scales.v;
  return cache;
}

// A profiling run has no batch: the output only has to exist and be finite.
void fill_with_zeros(const Backend& backend, const AttentionConfig& config,
                     const TensorView& output, const Context& ctx) {
  check::that(output.ndim == 2 || output.ndim == 3, "output", "2 or 3 dimensions", output);
  check::tensor("output", output, config.device, {output.dtype},
                output.ndim == 2
                    ? std::initializer_list<std::int64_t>{check::kAny, check::kAny}
                    : std::initializer_list<std::int64_t>{check::kAny, check::kAny, check::kAny});
  check::unit_last_stride("output", output);
  backend.fill_zero(output, ctx);
}

// The member in which a plan's configuration is not this layer's; "" if it serves the layer.
std::string difference(const AttentionConfig& plan, const AttentionConfig& layer) {
  std::string text;
  const auto compare = [&](const char* member, bool same) {
    if (!same && text.empty()) text = member;
  };
  compare("device", plan.device == layer.device);
  compare("dtype", plan.dtype == layer.dtype);
  compare("num_heads", plan.num_heads == layer.num_heads);
  compare("num_kv_heads", plan.num_kv_heads == layer.num_kv_heads);
  compare("head_size", plan.head_size == layer.head_size);
  compare("head_size_v", plan.value_head_size() == layer.value_head_size());
  compare("type", plan.type == layer.type);
  compare("mask", plan.mask == layer.mask);
  compare("block_size", plan.block_size == layer.block_size);
  compare("kv_cache_dtype", api::spelled_out(plan.kv_cache_dtype, plan.dtype) ==
                                api::spelled_out(layer.kv_cache_dtype, layer.dtype));
  compare("batch_invariant", plan.batch_invariant || !layer.batch_invariant);
  return text;
}

// The field in which metadata is not as it was planned; "" if none. Slots may be the layer's own.
std::string changed_field(const AttentionMetadata& metadata, const Plan::Impl& plan) {
  using Common = CommonAttentionMetadata;
  static constexpr std::pair<const char*, ConstTensorView Common::*> kTensors[] = {
      {"query_start_loc", &Common::query_start_loc},
      {"seq_lens", &Common::seq_lens},
      {"block_table", &Common::block_table},
      {"causal", &Common::causal},
      {"mm_prefix_range", &Common::mm_prefix_range},
      {"visible_prefix_lens", &Common::visible_prefix_lens},
      {"qq_bias", &Common::qq_bias},
      {"kv_start_loc", &Common::kv_start_loc},
      {"kv_offset", &Common::kv_offset},
      {"kv_stride", &Common::kv_stride},
      {"q_offset", &Common::q_offset}};
  static constexpr std::pair<const char*, std::int64_t Common::*> kNumbers[] = {
      {"num_actual_tokens", &Common::num_actual_tokens},
      {"max_query_len", &Common::max_query_len},
      {"max_seq_len", &Common::max_seq_len}};
  for (const auto& [name, member] : kTensors) {
    const ConstTensorView& now = metadata.*member;
    const ConstTensorView& planned = plan.batch.*member;
    if (now.data != planned.data || now.dtype != planned.dtype || now.shape != planned.shape) {
      return name;
    }
  }
  for (const auto& [name, member] : kNumbers) {
    if (metadata.*member != plan.batch.*member) return name;
  }
  const std::int64_t prefix = metadata.use_cascade ? metadata.common_prefix_len : 0;
  return prefix != plan.batch_params.common_prefix_len ? "common_prefix_len" : "";
}

// The plan of metadata that is good for this layer now.
const Plan::Impl& plan_of(const AttentionMetadata& metadata, const AttentionConfig& config,
                          const Backend& backend) {
  check::that(metadata.scheduler_metadata != nullptr, "scheduler_metadata",
              "a plan: AttentionMetadataBuilder::build() makes metadata that has one, and plan() "
              "gives one to metadata filled by hand",
              "none");
  const Plan::Impl& plan = metadata.scheduler_metadata->impl();
  std::string other = difference(plan.config, config);
  if (other.empty() && plan.backend != &backend) other = "backend";
  check::that(other.empty(), "metadata", "metadata built for this layer's configuration",
              [&] { return "another " + other; });
  check::that(plan.planned && metadata.build_number == plan.build_number, "metadata",
              "the metadata of its builder's last build() or plan()", "that of an earlier one");
  check::that(metadata.prefix_scheduler_metadata ==
                  (metadata.use_cascade ? metadata.scheduler_metadata : nullptr),
              "prefix_scheduler_metadata",
              "scheduler_metadata with use_cascade, null without, as the builder sets it",
              "another");
  const std::string changed = changed_field(metadata, plan);
  check::that(changed.empty(), changed,
              "what was planned: AttentionMetadataBuilder::plan() plans changed metadata",
              "another");
  return plan;
}

}  // namespace

TensorView AttentionImpl::forward(const LayerScales& scales, const ConstTensorView& query,
                                  const ConstTensorView& key, const ConstTensorView& value,
                                  const PagedKvCache& kv_cache, const AttentionMetadata* metadata,
                                  const TensorView& output,
                                  const std::optional<Scale>& output_scale,
                                  const TensorView& output_block_scale, const TensorView& lse,
                                  const Context& ctx) const {
  if (metadata == nullptr) {
    fill_with_zeros(*backend_, config_, output, ctx);
    return output;
  }
  const Plan::Impl& plan = plan_of(*metadata, config_, *backend_);
  const bool encoder = !plan.layer.paged;
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
  AttentionParams attend = plan.lower(args, ctx);
  const bool writes = !encoder && (key || value) && kv_sharing_target_layer_name_.empty();
  if (writes) {
    const CacheWriteParams write =
        api::checked_cache_write(*backend_, key, value, args.kv_cache, metadata->slot_mapping, ctx);
    api::run_cache_write(*backend_, write, ctx);
    attend.follows_write = write.num_slots > 0;
  }
  plan.attend(attend, ctx);
  return output;
}

void AttentionImpl::do_kv_cache_update(const LayerScales& scales, const ConstTensorView& key,
                                       const ConstTensorView& value, const PagedKvCache& kv_cache,
                                       const ConstTensorView& slot_mapping,
                                       const Context& ctx) const {
  if (!kv_sharing_target_layer_name_.empty()) return;
  api::check_backend(*backend_, ctx);
  const CacheWriteParams write = api::checked_cache_write(
      *backend_, key, value, with_scales(kv_cache, scales), slot_mapping, ctx);
  api::run_cache_write(*backend_, write, ctx);
}

}  // namespace quire
