// The kernels behind CudaOps: each queues the operation of DeviceOps that it is named after.
// Everything is float32, indices and positions int32.
#pragma once

#include <cuda_runtime.h>

#include "quire/types.h"

namespace quire::llm {

void queue_gather_rows(const TensorView& in, const TensorView& indices, const TensorView& out,
                       cudaStream_t stream);
void queue_rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                    const TensorView& out, cudaStream_t stream);
void queue_rope_angles(const TensorView& positions, const TensorView& frequencies,
                       const TensorView& out, cudaStream_t stream);
void queue_rope(const TensorView& x, const TensorView& angles, cudaStream_t stream);
void queue_swiglu(const TensorView& x, const TensorView& out, cudaStream_t stream);

}  // namespace quire::llm
