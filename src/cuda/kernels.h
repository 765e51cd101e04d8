// The launchers: one for each stage. All are asynchronous on the stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernel_params.h"
#include "params.h"

namespace quire::cuda {

void launch_plan(const PlanArgs& args, cudaStream_t stream);
void launch_cache_write(const CacheWriteParams& params, cudaStream_t stream);
// Whether it is one of the kernels that launch_cache_write() launches.
bool is_cache_write(const void* kernel);
void launch_merge(const MergeParams& params, cudaStream_t stream);
// fp32 rows of block_output -> fp8 rows of the output and a scale for each group of 128.
void launch_block_quantize(const KernelParams& params, int grid, cudaStream_t stream);

}  // namespace quire::cuda
