#include "cuda/layer_plan.h"

#include "cuda/check.h"
#include "cuda/early_launch.h"
#include "cuda/kernel_params.h"

namespace quire::cuda {

CudaPlan::CudaPlan(const LayerParams& layer)
    : layer_(layer),
      device_(device_info(layer.device.index)),
      best_(layer_, device_, Calls::kSome) {
  if (!best_.is_complete()) any_ = std::make_unique<FamilyPlan>(layer_, device_, Calls::kAny);
}

void CudaPlan::update(const BatchParams& batch, const Context& ctx) {
  const cudaStream_t stream = stream_of(ctx);
  const DeviceScope scope(layer_.device);
  if (batch.num_seqs == 0 || batch.num_tokens == 0) return;
  best_.update(batch, stream);
  shares_ = false;
  const bool announced =
      any_ != nullptr && !best_.shares() && !is_capturing(stream) && any_->shares_announced(batch);
  any_is_planned_ = any_is_captured_ || announced;
  if (!any_is_planned_) return;
  any_->update(batch, stream);
  shares_ = announced && any_->shares();
}

void CudaPlan::attention(const AttentionParams& params, const Context& ctx) {
  const cudaStream_t stream = stream_of(ctx);
  const DeviceScope scope(layer_.device);
  const bool capturing = is_capturing(stream);
  KernelParams p = lower(params);
  // In a graph it can be seen: two calls are like one there.
  p.follows_write = has_early_launches(device_) &&
                    (p.follows_write || (capturing && follows_captured_write(stream)));
  if (any_ == nullptr || (!shares_ && best_.takes(p, capturing))) {
    best_.attention(p, stream);
    return;
  }
  if (!any_is_planned_) {
    any_->update(p.batch, stream);
    p.follows_write = false;
  }
  any_is_planned_ = true;
  any_is_captured_ = any_is_captured_ || capturing;
  any_->attention(p, stream);
}

const std::int32_t* CudaPlan::cascade_tensors(const BatchParams& batch, const Context& ctx) {
  const DeviceScope scope(layer_.device);
  return cascade_tensors_.write(batch, stream_of(ctx));
}

std::int64_t CudaPlan::workspace_bytes() const {
  return best_.workspace_bytes() + (any_ != nullptr ? any_->workspace_bytes() : 0) +
         cascade_tensors_.bytes();
}

std::string CudaPlan::to_string() const {
  std::string text = best_.to_string();
  if (any_ != nullptr) text += "for other strides and scores:\n" + any_->to_string();
  return text;
}

}  // namespace quire::cuda
