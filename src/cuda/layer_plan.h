// A layer on a device: the best kernels for it, and for calls that these do not take the ones that
// take any.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend.h"
#include "cuda/cascade_tensors.h"
#include "cuda/device.h"
#include "cuda/family_plan.h"

namespace quire::cuda {

// Which kernels a call gets depends on its strides, which come after the plan. So there may be two
// plans of a batch: update() makes the one of the best kernels, and the other is made by the first
// call of the step that needs it; by update() too where a shared prefix is announced that the best
// kernels cannot read for all sequences at once. (Prefixes that are not announced are looked for
// where the best kernels can do that: for most batches there are none, and the others are slower.)
class CudaPlan final : public LayerPlan {
 public:
  explicit CudaPlan(const LayerParams& layer);

  void update(const BatchParams& batch, const Context& ctx) override;
  void attention(const AttentionParams& params, const Context& ctx) override;
  const std::int32_t* cascade_tensors(const BatchParams& batch, const Context& ctx) override;
  std::int64_t workspace_bytes() const override;
  std::string to_string() const override;

 private:
  const LayerParams layer_;
  const DeviceInfo& device_;
  FamilyPlan best_;
  std::unique_ptr<FamilyPlan> any_;  // null: best_ takes every call
  bool any_is_planned_ = false;
  bool shares_ = false;           // the planned batch goes to any_, for its shared prefix
  bool any_is_captured_ = false;  // some graph reads its plan: every update makes it too
  CascadeTensors cascade_tensors_;
};

}  // namespace quire::cuda
