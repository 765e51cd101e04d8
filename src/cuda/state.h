// The plan of a layer on a device: which kernels serve it, and the workspace they share. Memory is
// taken when a plan first sees a larger batch, never while a graph is being captured.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda/cascade_tensors.h"
#include "cuda/device.h"
#include "cuda/sm80/attention_fp32.h"
#include "cuda/sm80/table.h"
#include "cuda/work.h"

namespace quire::cuda {

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  // Takes zeroed memory, once. Throws Error while `stream` is being captured.
  void allocate(std::size_t bytes, cudaStream_t stream);
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

class CudaPlan final : public LayerPlan {
 public:
  explicit CudaPlan(const LayerParams& layer);

  std::int64_t workspace_bytes() const override;
  std::string to_string() const override;

  void update(const BatchParams& batch, const Context& ctx) override;
  void attention(const AttentionParams& params, const Context& ctx) override;
  const std::int32_t* cascade_tensors(const BatchParams& batch, const Context& ctx) override {
    const DeviceScope scope(layer_.device);
    return cascade_tensors_.write(batch, stream_of(ctx));
  }

 private:
  // A kernel of this layer and its grid. Each serves requests of few query rows, some, or many.
  struct Stage {
    const sm80::MmaKernel* mma = nullptr;      // null: the fp32 kernel
    const sm80::MmaKernel* general = nullptr;  // the same tiles, for modified scores
    sm80::MmaLaunch mma_launch;
    sm80::Fp32Launch fp32_launch;
    int tile_rows = 0;  // 0: not used
    int columns = 0;    // of a pass
    int passes = 1;
    int grid = 0;
    bool chunks = false;  // batch-invariant mode: keys may be cut
    int slots_per_cta = 2;
    std::int64_t slot_floats() const { return std::int64_t{tile_rows} * (columns + 2); }
    std::int64_t num_slots() const { return std::int64_t{grid} * slots_per_cta; }
  };

  // What depends on the batch's padded size. A graph keeps the addresses it was captured with, so
  // a workspace that a capture has seen lives as long as the plan, and every batch that fits the
  // smallest one is planned there.
  struct Workspace {
    std::int32_t max_seqs = 0;
    std::int64_t max_tokens = 0;
    bool captured = false;
    // Some graph attends without the launch for shared prefixes, or plans without them: what is
    // planned here must do without.
    bool captured_plain = false;
    DeviceBuffer memory;
    DeviceBuffer block_output;
    DeviceBuffer cascade;  // when a batch that may share prefixes first comes
    TileRule rules[kNumRules];
    TileRule shared;
    SharedPrefixes prefixes;
    Seeds seeds;
  };

  void choose_kernels(const LayerParams& layer);
  const Stage& many() const { return stages_[kNumRules - 1]; }
  int stages_for(std::int64_t most_rows) const;
  Stage make_stage(const LayerParams& layer, const sm80::MmaKernel* kernel,
                   const sm80::MmaKernel* general) const;
  void allocate_slots(cudaStream_t stream);
  Workspace& workspace_for(const LayerParams& layer, const BatchParams& batch, cudaStream_t stream);
  planning::PrefixRule cascade_rule(const LayerParams& layer, const BatchParams& batch,
                                    bool capturing) const;
  void allocate_cascade(const LayerParams& layer, Workspace* workspace, cudaStream_t stream) const;
  ScheduleView view_of(const Stage& stage, const TileRule& rule) const;
  void launch(const Stage& stage, const ScheduleView& schedule, KernelParams params,
              cudaStream_t stream) const;

  LayerParams layer_;
  const DeviceInfo& info_;
  Stage stages_[kNumRules];
  // Stages that have work in the planned batch, by its bound on query lengths.
  int first_used_ = 0;
  int num_used_ = kNumRules;
  int num_captured_ = kNumRules;  // stages that all graphs launch
  bool shares_ = false;           // the planned batch may have shared prefixes
  DeviceBuffer slots_;
  DeviceBuffer arrivals_;
  CascadeTensors cascade_tensors_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // from small to large
  Workspace* current_ = nullptr;
};

}  // namespace quire::cuda
