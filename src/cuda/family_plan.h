// The families of kernels that serve a layer, and what is planned and launched for a batch. No
// architecture is named here.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "backend.h"
#include "cuda/device.h"
#include "cuda/kernel_table.h"
#include "cuda/workspace.h"

namespace quire::cuda {

class FamilyPlan {
 public:
  FamilyPlan(const LayerParams& layer, const DeviceInfo& device, Calls calls);

  void update(const BatchParams& batch, cudaStream_t stream);
  // Whether its kernels take this call of the planned batch.
  bool takes(const KernelParams& params, bool capturing) const;
  // Whether it would attend a prefix that the caller has announced once for all, and whether it
  // may find shared prefixes in the planned batch.
  bool shares_announced(const BatchParams& batch) const { return cascade_rule(batch).announced; }
  bool shares() const { return shares_; }
  void attention(KernelParams params, cudaStream_t stream);
  // Whether its kernels take every call.
  bool is_complete() const;
  std::int64_t workspace_bytes() const { return workspace_.bytes(); }
  std::string to_string() const;

 private:
  int num_families() const { return static_cast<int>(families_.size()); }
  int families_for(std::int64_t most_rows) const;
  planning::PrefixRule cascade_rule(const BatchParams& batch) const;
  void launch(const KernelFamily& family, const TileRule& rule, const SharedRow* shared_rows,
              KernelParams params, cudaStream_t stream) const;
  KernelParams with_schedule(KernelParams params, const KernelFamily& family, const TileRule& rule,
                             const SharedRow* shared_rows) const;
  void find_mixed();
  bool can_mix() const;
  void launch_mixed(const KernelParams& params, cudaStream_t stream) const;

  const LayerParams& layer_;
  const DeviceInfo& device_;
  std::vector<KernelFamily> families_;
  Workspace workspace_;
  // Of the planned batch: its buffers, the families that have work in it, whether it may have
  // shared prefixes.
  BatchBuffers* buffers_ = nullptr;
  int first_used_ = 0;
  int end_used_ = 0;
  // The family whose work `mixed_` does together with the last one's, in one launch; null: none.
  int few_ = 0;
  const FamilyMember* mixed_ = nullptr;
  bool is_mixed_ = false;  // the planned batch is launched so
  bool shares_ = false;
};

}  // namespace quire::cuda
