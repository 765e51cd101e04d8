// Attention in fp32 arithmetic (no tf32) for every combination of dtypes and head sizes: fp32
// layers, and what the tensor-core kernels do not take.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/work.h"

namespace quire::cuda::sm80 {

inline constexpr int kFp32Rows = 16;
inline constexpr int kFp32Threads = 128;

struct Fp32Launch {
  int keys = 0;  // of a tile
  std::size_t shared_bytes = 0;
  int ctas_per_sm = 1;
};

// Sizes for a layer on the current device.
Fp32Launch fp32_launch(const LayerParams& layer, int shared_bytes_per_block);
void launch_attention_fp32(const KernelParams& params, const Fp32Launch& launch, int grid,
                           cudaStream_t stream);

}  // namespace quire::cuda::sm80
