// AttentionMetadataBuilder: the metadata of a step, from a batch or filled by hand, and its plan.
#include "quire/metadata.h"

#include <utility>

#include "api/check.h"
#include "api/lower.h"
#include "plan/cascade_tensors.h"
#include "quire/backend.h"

namespace quire {
namespace {

// use_cascade, the prefix and the cascade tensors go together. `p` is the batch, lowered.
void check_cascade(const AttentionMetadata& metadata, Device device, const BatchParams& p) {
  const auto tensor = [&](const char* name, const ConstTensorView& view, std::int64_t size) {
    if (!view) return;
    check::that(metadata.use_cascade, name, "none without use_cascade", view);
    check::tensor(name, view, device, {DType::kInt32}, {size});
    check::contiguous(name, view);
  };
  tensor("cu_prefix_query_lens", metadata.cu_prefix_query_lens, 2);
  tensor("prefix_kv_lens", metadata.prefix_kv_lens, 1);
  tensor("suffix_kv_lens", metadata.suffix_kv_lens, p.num_seqs);
}

std::int64_t prefix_of(const AttentionMetadata& metadata) {
  const std::int64_t prefix = metadata.common_prefix_len;
  check::that(!metadata.use_cascade || prefix >= 1, "common_prefix_len",
              "at least 1 with use_cascade", prefix);
  check::that(metadata.use_cascade || prefix == 0, "common_prefix_len", "0 without use_cascade",
              prefix);
  return prefix;
}

// Those of the cascade tensors that the caller left out.
void fill_cascade(const std::int32_t* tensors, Device device, AttentionMetadata* metadata) {
  const auto fill = [&](ConstTensorView* view, std::int32_t at, std::int64_t size) {
    if (!*view) *view = ConstTensorView(tensors + at, DType::kInt32, {size}, device);
  };
  fill(&metadata->cu_prefix_query_lens, 0, 2);
  fill(&metadata->prefix_kv_lens, planning::kPrefixKvLens, 1);
  fill(&metadata->suffix_kv_lens, planning::kSuffixKvLens, metadata->num_seqs());
}

}  // namespace

AttentionMetadataBuilder::AttentionMetadataBuilder(const AttentionConfig& config)
    : config_(config), plan_(std::make_shared<Plan>(config)) {}

AttentionMetadata AttentionMetadataBuilder::build(std::int64_t common_prefix_len,
                                                  const CommonAttentionMetadata& common,
                                                  bool /*fast_build*/, const Context& ctx) {
  AttentionMetadata metadata{common};
  metadata.use_cascade = common_prefix_len != 0;
  metadata.common_prefix_len = common_prefix_len;
  return plan(metadata, ctx);
}

AttentionMetadata AttentionMetadataBuilder::plan(const AttentionMetadata& metadata,
                                                 const Context& ctx) {
  check::that(plan_ != nullptr, "plan", "a builder with a plan", "one that was moved from");
  Plan::Impl& impl = plan_->impl();
  const BatchParams batch = impl.lower(metadata, prefix_of(metadata), ctx);
  check_cascade(metadata, config_.device, batch);
  if (ctx.check_indices && batch.common_prefix_len > 0) {
    api::check_cascade_data(*impl.backend, impl.layer, batch, metadata, ctx);
  }
  AttentionMetadata planned = metadata;
  planned.use_cascade = batch.common_prefix_len > 0;
  planned.common_prefix_len = batch.common_prefix_len;
  if (!planned.use_cascade) {  // nothing announced, or a batch-invariant layer
    planned.cu_prefix_query_lens = planned.prefix_kv_lens = planned.suffix_kv_lens = {};
  }
  impl.update(metadata, batch, ctx);
  if (planned.use_cascade) {
    fill_cascade(impl.plan->cascade_tensors(batch, ctx), config_.device, &planned);
  }
  planned.scheduler_metadata = plan_;
  planned.prefix_scheduler_metadata = planned.use_cascade ? plan_ : nullptr;
  planned.build_number = impl.build_number;
  return planned;
}

AttentionMetadata AttentionMetadataBuilder::build_for_cudagraph_capture(
    const CommonAttentionMetadata& common, const Context& ctx) {
  check::that(plan_ != nullptr, "plan", "a builder with a plan", "one that was moved from");
  const Backend& backend = *plan_->impl().backend;
  check::that(backend.capabilities().graph_capture, "backend", "one whose work a graph can capture",
              backend.name());
  return build(0, common, true, ctx);
}

}  // namespace quire
