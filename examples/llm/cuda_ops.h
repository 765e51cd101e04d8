// The operations of a Llama model on a GPU: float32, matrix products by cuBLAS, kernels of its own
// for the rest. Part of builds with QUIRE_CUDA.
#pragma once

#include <memory>

#include "device_ops.h"

namespace quire::llm {

// On GPU 0 and a stream of its own. `num_threads` CPU threads decode the model's file.
std::unique_ptr<DeviceOps> make_cuda_ops(int num_threads);

}  // namespace quire::llm
