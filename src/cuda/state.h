// The plan of a layer on a device: which kernels serve it, and the workspace they share. Memory is
// taken when a plan first sees a larger batch, never while a graph is being captured.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "backend.h"
#include "cuda/device.h"
#include "cuda/sm80/attention_fp32.h"
#include "cuda/sm80/table.h"
#include "cuda/work.h"

namespace quire::cuda {

// One allocation that grows.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  // True if it had to grow; the old content is lost then, and queued work on it is waited for.
  bool reserve(std::size_t bytes, cudaStream_t stream, const char* what);
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

class CudaPlan final : public PlanState {
 public:
  explicit CudaPlan(const LayerParams& layer);

  std::int64_t workspace_bytes() const override;
  std::string to_string() const override;

  void update(const LayerParams& layer, const BatchParams& batch, cudaStream_t stream);
  void attend(const AttentionParams& params, cudaStream_t stream);

 private:
  // A kernel of this layer with its grid and its part of the plan.
  struct Stage {
    const sm80::MmaKernel* mma = nullptr;  // null: the fp32 kernel
    int tile_rows = 0;                     // 0: not used
    int pitch = 0;                         // columns of a slot
    int passes = 1;
    bool chunks = false;
    int grid = 0;
    sm80::MmaLaunch mma_launch;
    sm80::Fp32Launch fp32_launch;
    TileRule rule;
  };

  void choose_kernels(const LayerParams& layer, DType kv_dtype);
  void prepare(Stage* stage) const;
  void lay_out(const LayerParams& layer, const BatchParams& batch, cudaStream_t stream);
  ScheduleView view_of(const Stage& stage, const LayerParams& layer) const;
  void launch(const Stage& stage, KernelParams params, cudaStream_t stream) const;

  Device device_;
  int sm_count_ = 0;
  Stage few_;
  Stage many_;
  DeviceBuffer work_;          // headers, tiles, starts
  DeviceBuffer slots_;         // partial results
  DeviceBuffer arrivals_;      // counters
  DeviceBuffer block_output_;  // fp32 rows for block scales
  LayerParams layer_;
  std::int64_t num_tokens_ = 0;
  std::int32_t num_seqs_ = 0;
};

}  // namespace quire::cuda
