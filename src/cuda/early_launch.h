// Attention that begins while the cache write before it is under way: where that is allowed. The
// kernels' side is ptx/dependent_launch.cuh, the reasons are in docs/design/0006.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"

namespace quire::cuda {

// Whether the device and its driver can: Hopper and newer, and a driver that knows such launches in
// graphs too.
bool has_early_launches(const DeviceInfo& device);

// Whether what is captured next on the stream depends on a cache write and on nothing else.
bool follows_captured_write(cudaStream_t stream);

}  // namespace quire::cuda
