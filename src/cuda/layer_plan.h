// A layer on a device: the kernels that serve it, and what is planned and launched for a batch. No
// architecture is named here.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "backend.h"
#include "cuda/cascade_tensors.h"
#include "cuda/device.h"
#include "cuda/kernel_table.h"
#include "cuda/workspace.h"

namespace quire::cuda {

class CudaPlan final : public LayerPlan {
 public:
  explicit CudaPlan(const LayerParams& layer);

  void update(const BatchParams& batch, const Context& ctx) override;
  void attention(const AttentionParams& params, const Context& ctx) override;
  const std::int32_t* cascade_tensors(const BatchParams& batch, const Context& ctx) override {
    const DeviceScope scope(layer_.device);
    return cascade_tensors_.write(batch, stream_of(ctx));
  }
  std::int64_t workspace_bytes() const override {
    return workspace_.bytes() + cascade_tensors_.bytes();
  }
  std::string to_string() const override;

 private:
  int num_families() const { return static_cast<int>(families_.size()); }
  int families_for(std::int64_t most_rows) const;
  planning::PrefixRule cascade_rule(const BatchParams& batch, bool capturing) const;
  void launch(const KernelFamily& family, const TileRule& rule, const SharedRow* shared_rows,
              KernelParams params, cudaStream_t stream) const;

  const LayerParams layer_;
  const DeviceInfo& device_;
  std::vector<KernelFamily> families_;
  Workspace workspace_;
  CascadeTensors cascade_tensors_;
  // Of the planned batch: its buffers, the families that have work in it, whether it may have
  // shared prefixes.
  BatchBuffers* buffers_ = nullptr;
  int first_used_ = 0;
  int end_used_ = 0;
  bool shares_ = false;
};

}  // namespace quire::cuda
