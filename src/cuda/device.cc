#include "cuda/device.h"

#include <mutex>
#include <vector>

#include "cuda/check.h"

namespace quire::cuda {
namespace {

constexpr int kMinMajor = 8;

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

// Why there is no device, for people.
std::string reason_of(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "no NVIDIA driver, or one that is too old for CUDA " +
             std::to_string(CUDART_VERSION / 1000) + "." +
             std::to_string(CUDART_VERSION % 1000 / 10) + ": install a newer one";
    case cudaErrorNoDevice:
      return "the NVIDIA driver shows no GPU to this process: see CUDA_VISIBLE_DEVICES";
    default: return describe(error);
  }
}

Inventory take_inventory() {
  Inventory result;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // the error must not show up in a later call
    result.reason = reason_of(error);
    return result;
  }
  for (int i = 0; i < count; ++i) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) == cudaSuccess &&
        major >= kMinMajor) {
      result.count = count;
    }
  }
  if (result.count == 0) result.reason = "no GPU of compute capability 8.0 or newer";
  return result;
}

// Both edges of the clock, in bytes.
std::int64_t memory_rate(int index) {
  int khz = 0;
  int bits = 0;
  check(cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, index), "memory clock");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index), "memory bus");
  return std::int64_t{khz} * 2 * bits / 8 / 1000;
}

DeviceInfo read_info(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  DeviceInfo info;
  info.sm_count = properties.multiProcessorCount;
  info.major = properties.major;
  info.minor = properties.minor;
  info.shared_bytes_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);
  info.l2_bytes = properties.l2CacheSize;
  info.memory_bytes_per_us = memory_rate(index);
  info.name = properties.name;
  return info;
}

}  // namespace

void fail(const std::string& what, cudaError_t error) {
  cudaGetLastError();  // forget it
  if (error == cudaErrorMemoryAllocation) {
    int index = -1;
    cudaGetDevice(&index);
    throw OutOfMemory("CUDA: " + what + " on " + to_string(Device{DeviceType::kCuda, index}) +
                      ": " + describe(error));
  }
  throw CudaError("CUDA: " + what + ": " + describe(error));
}

void check_launch(const char* kernel, dim3 grid, int threads, std::size_t shared_bytes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  fail(std::string(kernel) + " with grid (" + std::to_string(grid.x) + ", " +
           std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), " +
           std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
           " bytes of shared memory",
       error);
}

const Inventory& inventory() {
  static const Inventory result = take_inventory();
  return result;
}

const DeviceInfo& device_info(int index) {
  static std::mutex mutex;
  static std::vector<DeviceInfo> infos(static_cast<std::size_t>(inventory().count));
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = infos[static_cast<std::size_t>(index)];
  if (info.sm_count == 0) info = read_info(index);
  if (info.major < kMinMajor) {
    throw Error(
        "device", "a GPU of compute capability 8.0 or newer",
        info.name + " (sm_" + std::to_string(info.major) + std::to_string(info.minor) + ")");
  }
  return info;
}

DeviceScope::DeviceScope(Device device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device.index) return;
  check(cudaSetDevice(device.index), "cudaSetDevice");
  previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace quire::cuda
