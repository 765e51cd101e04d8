// The limits of a CUDA device: reading memory, and multiplying matrices with cuBLAS.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <stdexcept>
#include <vector>

#include "bench/cuda_bench.h"
#include "bench/statistics.h"

namespace quire::bench {
namespace {

constexpr std::int64_t kReadBytes = std::int64_t{1} << 30;
constexpr int kSize = 8192;
// About 10 ms of reads come first: the memory clock rises, and the driver clears what the previous
// workload freed. Without them an H100 seemed to read 2.6 TB/s after large workloads, not 3.05.
constexpr int kWarmUpReads = 30;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

__global__ void __launch_bounds__(512)
    read_all(const uint4* data, std::int64_t count, unsigned* out) {
  unsigned sum = 0;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
#pragma unroll 8
  for (std::int64_t i = first; i < count; i += stride) {
    const uint4 x = __ldcs(data + i);
    sum ^= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == 0x12345678U) *out = sum;
}

// Anything but zeros: they draw less power and run faster.
__global__ void fill_random(std::uint16_t* data, std::int64_t count) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t x = static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9U;
    const float value = static_cast<float>((x >> 40) & 0xFFFFU) / 32768.0F - 1.0F;
    data[i] = __bfloat16_as_ushort(__float2bfloat16(value));
  }
}

// The few functions of cuBLAS that a product needs, by their C names and codes.
struct CuBlas {
  using Create = int (*)(void**);
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int,
                       const void*, int, int, const void*, void*, int, int, int, int);
  void* handle = nullptr;
  Gemm gemm = nullptr;

  CuBlas() {
    void* library = nullptr;
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so",
                             "/usr/local/cuda/lib64/libcublas.so"}) {
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library != nullptr) break;
    }
    if (library == nullptr) return;
    const auto create = reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"));
    const auto found = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
    if (create != nullptr && found != nullptr && create(&handle) == 0) gemm = found;
  }

  // c = a b^T, bf16 with fp32 sums.
  void multiply(const void* a, const void* b, void* c) const {
    constexpr int kNone = 0, kTranspose = 1, kBf16 = 14, kCompute32F = 68, kDefault = -1;
    const float one = 1.0F;
    const float zero = 0.0F;
    if (gemm(handle, kTranspose, kNone, kSize, kSize, kSize, &one, a, kBf16, kSize, b, kBf16, kSize,
             &zero, c, kBf16, kSize, kCompute32F, kDefault) != 0) {
      throw std::runtime_error("cublasGemmEx failed");
    }
  }
};

class CudaLimitMeter : public LimitMeter {
 public:
  CudaLimitMeter() {
    check(cudaMalloc(&memory_, kReadBytes));
    check(cudaMalloc(&sink_, 256));
    fill_random<<<1024, 256>>>(static_cast<std::uint16_t*>(memory_), kReadBytes / 2);
    check(cudaGetLastError());
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0));
    grid_ = properties.multiProcessorCount * 4;
  }
  ~CudaLimitMeter() override {
    cudaFree(memory_);
    cudaFree(sink_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  LimitSample measure() override {
    LimitSample sample;
    const auto read = [&] {
      read_all<<<grid_, 512>>>(static_cast<const uint4*>(memory_), kReadBytes / 16,
                               static_cast<unsigned*>(sink_));
    };
    for (int i = 0; i < kWarmUpReads; ++i) read();
    const double read_s = time_of(read);
    sample.bytes_per_second = static_cast<double>(kReadBytes) / read_s;
    if (blas_.gemm != nullptr) {
      char* a = static_cast<char*>(memory_);
      const std::int64_t bytes = std::int64_t{kSize} * kSize * 2;
      const double gemm_s = time_of([&] { blas_.multiply(a, a + bytes, a + 2 * bytes); });
      sample.flops_per_second = 2.0 * kSize * kSize * static_cast<double>(kSize) / gemm_s;
    } else {
      sample.flops_per_second = 1e30;
    }
    return sample;
  }

  std::string read_method() const override { return "1 GiB, 16-byte loads"; }
  std::string flops_method() const override {
    return blas_.gemm != nullptr ? "cuBLAS, bf16, 8192^3" : "not measured: no cuBLAS";
  }

 private:
  template <class Body>
  double time_of(const Body& body) {
    body();
    std::vector<double> seconds;
    for (int i = 0; i < 9; ++i) {
      check(cudaEventRecord(begin_));
      body();
      check(cudaEventRecord(end_));
      check(cudaEventSynchronize(end_));
      float ms = 0.0F;
      check(cudaEventElapsedTime(&ms, begin_, end_));
      seconds.push_back(1e-3 * ms);
    }
    return median(seconds);
  }

  CuBlas blas_;
  void* memory_ = nullptr;
  void* sink_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  int grid_ = 0;
};

}  // namespace

std::unique_ptr<LimitMeter> make_cuda_limit_meter() { return std::make_unique<CudaLimitMeter>(); }

CudaMachine inspect_cuda_machine() {
  std::size_t available = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&available, &total));
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  return {static_cast<std::int64_t>(available), properties.l2CacheSize};
}

}  // namespace quire::bench
