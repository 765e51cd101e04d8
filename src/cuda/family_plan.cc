#include "cuda/family_plan.h"

#include <algorithm>
#include <cstdio>
#include <string_view>

#include "cuda/kernels.h"
#include "cuda/plan/shared_prefix.h"

namespace quire::cuda {

FamilyPlan::FamilyPlan(const LayerParams& layer, const DeviceInfo& device, Calls calls)
    : layer_(layer),
      device_(device),
      families_(choose_kernels(kernel_table(), layer, device, calls)),
      workspace_(layer_, device_, families_) {
  find_mixed();
}

// In batch-invariant mode items are cut where the mixed kernels cannot combine them.
void FamilyPlan::find_mixed() {
  const KernelFamily& many = families_.back();
  if (layer_.batch_invariant || many.members.size() > 1) return;
  for (int i = 0; i < num_families() - 1; ++i) {
    for (const FamilyMember& member : families_[i].members) {
      const char* beside = member.kernel->beside;
      if (beside == nullptr || !std::string_view(many.first().name).starts_with(beside)) continue;
      few_ = i;
      mixed_ = &member;
      return;
    }
  }
}

// Whether the planned batch's first and last families can be one launch. Which of them has work
// does not matter.
bool FamilyPlan::can_mix() const {
  return mixed_ != nullptr && !shares_ && !buffers_->captured_apart && end_used_ == num_families();
}

// How many of the families, from the first on, sequences of up to so many rows need.
int FamilyPlan::families_for(std::int64_t most_rows) const {
  int used = 0;
  while (used < num_families() - 1 && families_[used].first().key.max_rows < most_rows) ++used;
  return used + 1;
}

// What batches may share, as far as the host knows: the launch that reads shared prefixes costs
// time on every call, also where the device then finds none.
planning::PrefixRule FamilyPlan::cascade_rule(const BatchParams& batch) const {
  const AttentionKernel& kernel = families_.back().first();
  // Inside a window there is little to share.
  if (!kernel.shared_prefix || layer_.mask.window != WindowKind::kNone) return {};
  // A tile that a sequence's own rows fill reads its keys once as it is.
  const std::int64_t most_rows = kernel.policy.rows / 2;
  const planning::PrefixRule rule = planning::prefix_rule(layer_, batch, most_rows, most_rows);
  if (layer_.group > most_rows || rule.min_blocks == 0) return {};
  std::int64_t longest = batch.table_width * layer_.block_size;
  if (batch.max_seq_len > 0) longest = std::min(longest, batch.max_seq_len);
  if (longest < rule.min_blocks * layer_.block_size) return {};
  return prefix_pays(rule, batch.num_seqs, longest) ? rule : planning::PrefixRule{};
}

void FamilyPlan::update(const BatchParams& batch, cudaStream_t stream) {
  if (batch.num_seqs == 0 || batch.num_tokens == 0) return;
  workspace_.allocate_partials(stream);
  buffers_ = nullptr;
  buffers_ = &workspace_.buffers_for(batch, stream);
  const bool capturing = is_capturing(stream);
  // A graph serves batches of any composition: plain.
  const bool plain = capturing || buffers_->captured_plain;
  const planning::PrefixRule rule = plain ? planning::PrefixRule{} : cascade_rule(batch);
  shares_ = rule.min_blocks > 0;
  if (shares_) workspace_.allocate_cascade(buffers_, stream);
  if (capturing) Workspace::capture_plan(buffers_);
  end_used_ = batch.max_query_len > 0 ? families_for(batch.max_query_len * layer_.group)
                                      : std::min(workspace_.families_captured(), num_families());
  PlanArgs args;
  args.layer = layer_;
  args.batch = batch;
  std::copy(buffers_->rules, buffers_->rules + kMaxFamilies, args.rules);
  share_out(args.rules, end_used_);
  // Sequences of one length are one kernel's: the others need not be launched. Not in a graph,
  // which serves batches of any composition, nor where bits must not depend on padding, which can
  // make other batches look like this.
  first_used_ = 0;
  if (!capturing && !layer_.batch_invariant &&
      batch.num_tokens == batch.num_seqs * batch.max_query_len) {
    first_used_ = end_used_ - 1;
    for (int i = 0; i < first_used_; ++i) args.rules[i].up_to_rows = 0;
    args.rules[first_used_].above_rows = 0;
  }
  is_mixed_ = first_used_ == 0 && can_mix();
  if (is_mixed_) {
    args.rules[few_].buckets = buffers_->buckets[few_];
    TileRule& many = args.rules[num_families() - 1];
    many.policy = mixed_->kernel->beside_policy;
    many.beside = few_;
  }
  args.shared = buffers_->shared;
  args.prefixes = buffers_->prefixes;
  args.prefixes.rule = rule;
  launch_plan(args, stream);
}

bool FamilyPlan::is_complete() const {
  return std::all_of(families_.begin(), families_.end(),
                     [](const KernelFamily& family) { return family.is_complete(); });
}

bool FamilyPlan::takes(const KernelParams& params, bool capturing) const {
  if (shares_ && families_.back().member_for(params) == nullptr) return false;
  return std::all_of(
      families_.begin() + (capturing ? 0 : first_used_), families_.begin() + end_used_,
      [&](const KernelFamily& family) { return family.member_for(params) != nullptr; });
}

void FamilyPlan::attention(KernelParams p, cudaStream_t stream) {
  if (p.block_scales != nullptr) p.block_output = workspace_.block_output(buffers_, stream);
  const bool capturing = is_capturing(stream);
  const bool mixed = capturing ? can_mix() : is_mixed_;
  if (capturing) {
    const bool apart = mixed_ != nullptr && !mixed && end_used_ == num_families();
    workspace_.capture_attention(buffers_, shares_, apart, end_used_);
  }
  // Only the first launch follows the cache write; the others follow that one.
  const auto next = [&p] {
    KernelParams params = p;
    p.follows_write = false;
    return params;
  };
  if (shares_) launch(families_.back(), buffers_->shared, buffers_->prefixes.rows, next(), stream);
  for (int i = capturing ? 0 : first_used_; i < end_used_; ++i) {
    if (mixed && (i == few_ || i == num_families() - 1)) continue;
    launch(families_[i], buffers_->rules[i], nullptr, next(), stream);
  }
  if (mixed) launch_mixed(next(), stream);
  if (p.block_output != nullptr) {
    launch_block_quantize(
        p, static_cast<int>(std::min(p.batch.num_tokens, std::int64_t{device_.sm_count} * 4)),
        stream);
  }
}

KernelParams FamilyPlan::with_schedule(KernelParams params, const KernelFamily& family,
                                       const TileRule& rule, const SharedRow* shared_rows) const {
  params.schedule = workspace_.view_of(*buffers_, family, rule);
  params.schedule.shared_rows = shared_rows;
  params.columns = rule.policy.v_columns;
  params.passes = rule.heads / layer_.num_kv_heads;
  return params;
}

// The first and the last family in one launch. Both take the call, so their kernel does.
void FamilyPlan::launch_mixed(const KernelParams& params, cudaStream_t stream) const {
  const KernelFamily& many = families_.back();
  const KernelParams few_params =
      with_schedule(params, families_[few_], buffers_->rules[few_], nullptr);
  TileRule rule = buffers_->rules[num_families() - 1];
  rule.policy = mixed_->kernel->beside_policy;
  const KernelParams many_params = with_schedule(params, many, rule, nullptr);
  mixed_->kernel->launch_beside(mixed_->launch, many.grid, few_params, many_params, stream);
}

void FamilyPlan::launch(const KernelFamily& family, const TileRule& rule,
                        const SharedRow* shared_rows, KernelParams params,
                        cudaStream_t stream) const {
  params = with_schedule(params, family, rule, shared_rows);
  const FamilyMember* member = family.member_for(params);
  params.pipeline_stages = member->launch.pipeline_stages;
  member->kernel->launch(member->launch, family.grid, params, stream);
}

// The plan proper lives on the device and is not read back.
std::string FamilyPlan::to_string() const {
  std::string text;
  for (const KernelFamily& family : families_) {
    for (const FamilyMember& member : family.members) {
      const TilePolicy& policy = member.kernel->policy;
      char line[240];
      std::snprintf(line, sizeof line,
                    "%s: tiles of %d rows, %d CTAs, %d stages, %d column passes\n",
                    member.kernel->name, policy.rows,
                    member.kernel->beside == nullptr ? family.grid : families_.back().grid,
                    member.launch.pipeline_stages, num_passes(layer_, policy));
      text += line;
    }
  }
  if (shares_) text += "find_partners: shared prefixes are looked for\n";
  return text;
}

}  // namespace quire::cuda
