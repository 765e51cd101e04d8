#include "cuda/early_launch.h"

#include "cuda/kernels.h"

namespace quire::cuda {
namespace {

constexpr int kOldestDriver = 12050;  // by the CUDA version that it serves

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}

// The one node that the next one depends on; null: there are none or several.
cudaError_t find_last_node(cudaStream_t stream, cudaGraphNode_t* last) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  std::size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, nullptr, &count);
#else
  const cudaError_t error =
      cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, nullptr, &nodes, &count);
#endif
  const bool is_one = error == cudaSuccess && status == cudaStreamCaptureStatusActive && count == 1;
  *last = is_one ? nodes[0] : nullptr;
  return error;
}

}  // namespace

bool has_early_launches(const DeviceInfo& device) {
  static const bool knows = driver_version() >= kOldestDriver;
  return knows && device.major >= 9;
}

bool follows_captured_write(cudaStream_t stream) {
  cudaGraphNode_t node = nullptr;
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
  cudaKernelNodeParams params = {};
  cudaError_t error = find_last_node(stream, &node);
  if (node != nullptr) error = cudaGraphNodeGetType(node, &type);
  // Of others' kernels this runtime may know nothing.
  if (type == cudaGraphNodeTypeKernel) error = cudaGraphKernelNodeGetParams(node, &params);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return params.func != nullptr && is_cache_write(params.func);
}

}  // namespace quire::cuda
