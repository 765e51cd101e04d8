// The cascade tensors of AttentionMetadata, written by the device: seq_lens lies there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "params.h"

namespace quire::cuda {

class DeviceBuffer;

class CascadeTensors {
 public:
  CascadeTensors();
  ~CascadeTensors();
  CascadeTensors(const CascadeTensors&) = delete;
  CascadeTensors& operator=(const CascadeTensors&) = delete;

  // Queues the write; plan/cascade_tensors.h has the layout. Throws Error where a capture would
  // have to allocate.
  const std::int32_t* write(const BatchParams& batch, cudaStream_t stream);
  std::int64_t bytes() const;

 private:
  // Each at least twice as large as the one before it. All are kept: graphs may have their
  // addresses.
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

}  // namespace quire::cuda
