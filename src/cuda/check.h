// CUDA errors as exceptions. A failed launch says which kernel and what shape.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace quire::cuda {

// A CUDA call that failed for reasons other than the caller's arguments.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws OutOfMemory where the device has no memory left, else CudaError. The runtime's last error
// is cleared: check_launch() would blame a later launch for it.
[[noreturn]] void fail(const std::string& what, cudaError_t error);

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, error);
}

// Right after a launch.
void check_launch(const char* kernel, dim3 grid, int threads, std::size_t shared_bytes);

}  // namespace quire::cuda
