// How an instance of the decode or the prefill kernel becomes a row of the kernel table.
#pragma once

#include "cuda/kernel_table.h"

namespace quire::cuda::sm80 {

// What prepare and launch need to know of an instance.
struct Instance {
  const char* name = nullptr;
  const void* function = nullptr;
  int threads = 0;
  int (*shared_bytes)(int pipeline_stages) = nullptr;
  int max_pipeline_stages = 0;
  bool powers_of_two = false;  // takes pipeline depths that are powers of two only
};

bool prepare(const Instance& instance, const DeviceInfo& device, Launch* launch);
void launch(const Instance& instance, const Launch& launch, int grid, const KernelParams& params,
            cudaStream_t stream);

}  // namespace quire::cuda::sm80
