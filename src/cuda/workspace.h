// The device memory of a layer's plan, and the rules of graph capture.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/kernel_table.h"
#include "cuda/plan/schedule.h"

namespace quire::cuda {

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  // Takes memory, once, each byte set to `fill`. Throws Error while `stream` is being captured.
  void allocate(std::size_t bytes, cudaStream_t stream, int fill = 0);
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

// What depends on a batch's padded size: the plan on the device, and what a call keeps for its end.
struct BatchBuffers {
  std::int32_t max_seqs = 0;
  std::int64_t max_tokens = 0;
  DeviceBuffer memory;
  DeviceBuffer block_output;  // when block scales are first wanted
  DeviceBuffer cascade;       // when a batch that may share prefixes first comes
  TileRule rules[kMaxFamilies];
  TileRule shared;
  SharedPrefixes prefixes;
  PrefixPartials prefix_partials;
  bool captured = false;        // some graph has its addresses
  bool captured_plain = false;  // some graph attends without the launch for shared prefixes
  bool captured_apart = false;  // some graph launches families apart that may run in one launch
  CostBuckets* buckets[kMaxFamilies] = {};  // of each rule, also where it does not use them yet
};

// A captured graph keeps the addresses and the launches that it was captured with, and serves every
// later batch that is planned in its buffers. So:
//
//   1. nothing is allocated while a stream is captured: Error, "warm up first";
//   2. buffers that a capture has seen live as long as the plan, and a batch is planned in the
//      smallest buffers that it fits, so that a graph finds it there;
//   3. where a graph attends without the launch for shared prefixes, or was captured together with
//      its planning, which does without them, every batch in its buffers is planned without them;
//   4. where a graph launches apart what may run side by side, every batch in its buffers is planned
//      to be launched apart (the other way round any plan will do);
//   5. a batch whose longest query is not known is planned for the kernels that all graphs launch:
//      families_captured() of them, from the first on.
class Workspace {
 public:
  Workspace(const LayerParams& layer, const DeviceInfo& device,
            const std::vector<KernelFamily>& families)
      : layer_(layer), device_(device), families_(families) {}

  // What does not depend on the batch. Once.
  void allocate_partials(cudaStream_t stream);
  // The buffers of a batch of this padded size: rule 2.
  BatchBuffers& buffers_for(const BatchParams& batch, cudaStream_t stream);
  void allocate_cascade(BatchBuffers* buffers, cudaStream_t stream) const;
  float* block_output(BatchBuffers* buffers, cudaStream_t stream) const;

  // A plan, or an attention call that launches `num_families`, is part of a graph from now on.
  static void capture_plan(BatchBuffers* buffers);
  void capture_attention(BatchBuffers* buffers, bool shares, bool apart, int num_families);
  int families_captured() const { return families_captured_; }

  // What a kernel of `family` sees of the plan that `rule` led to.
  ScheduleView view_of(const BatchBuffers& buffers, const KernelFamily& family,
                       const TileRule& rule) const;

  std::int64_t bytes() const;

 private:
  TileRule rule_of(const KernelFamily& family, const BatchBuffers& buffers) const;
  std::int64_t floats_of(const KernelFamily& family) const;

  const LayerParams& layer_;
  const DeviceInfo& device_;
  const std::vector<KernelFamily>& families_;
  DeviceBuffer partials_;
  DeviceBuffer awaited_partials_;
  DeviceBuffer arrivals_;
  std::vector<std::unique_ptr<BatchBuffers>> buffers_;  // from small to large
  int families_captured_ = kMaxFamilies;
};

// Passes over the keys that a layer's output columns take.
inline std::int32_t num_passes(const LayerParams& layer, const TilePolicy& policy) {
  return (layer.head_size_v + policy.v_columns - 1) / policy.v_columns;
}

}  // namespace quire::cuda
