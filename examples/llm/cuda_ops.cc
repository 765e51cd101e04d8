#include "cuda_ops.h"

#include <cublas_v2.h>

#include <array>
#include <vector>

#include "cpu_ops.h"
#include "cuda_check.h"
#include "cuda_kernels.h"

namespace quire::llm {
namespace {

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error("cuBLAS: " + std::string(what) + ": " + cublasGetStatusString(status));
}
using llm::check;

class Stream {
 public:
  Stream() { check(cudaStreamCreate(&stream_), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  void synchronize() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Matrix products on a stream.
class Blas {
 public:
  explicit Blas(const Stream& stream) {
    check(cublasCreate(&handle_), "cublasCreate");
    check(cublasSetStream(handle_, stream.get()), "cublasSetStream");
  }
  ~Blas() { cublasDestroy(handle_); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // out = x weight^T + beta out. To cuBLAS, which thinks in columns, each matrix is its transpose.
  // COMPUTE_32F with the default math mode is float32 throughout: no TF32, tokens as on the CPU.
  void multiply(const TensorView& x, const TensorView& weight, float beta,
                const TensorView& out) const {
    if (x.shape[0] == 0) return;
    const float alpha = 1.0F;
    check(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(weight.shape[0]),
                       static_cast<int>(x.shape[0]), static_cast<int>(x.shape[1]), &alpha,
                       weight.data, CUDA_R_32F, static_cast<int>(weight.strides[0]), x.data,
                       CUDA_R_32F, static_cast<int>(x.strides[0]), &beta, out.data, CUDA_R_32F,
                       static_cast<int>(out.strides[0]), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx");
  }

 private:
  cublasHandle_t handle_ = nullptr;
};

// Pairs of events around timed work. They are read when the stream has passed them anyway, so that
// timing never makes the GPU wait for the host, and then used again.
class Timer {
 public:
  Timer() = default;
  ~Timer() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  void record(const Stream& stream) {
    if (used_ == events_.size()) {
      events_.push_back(nullptr);
      check(cudaEventCreate(&events_.back()), "cudaEventCreate");
    }
    check(cudaEventRecord(events_[used_++], stream.get()), "cudaEventRecord");
  }

  // After the stream was synchronised.
  void collect() {
    for (std::size_t i = 0; i + 1 < used_; i += 2) {
      float milliseconds = 0.0F;
      check(cudaEventElapsedTime(&milliseconds, events_[i], events_[i + 1]),
            "cudaEventElapsedTime");
      seconds_ += static_cast<double>(milliseconds) * 1e-3;
    }
    used_ = 0;
  }

  double seconds() const { return seconds_; }

 private:
  std::vector<cudaEvent_t> events_;
  std::size_t used_ = 0;
  double seconds_ = 0.0;
};

class CudaOps final : public DeviceOps {
 public:
  explicit CudaOps(int num_threads) : host_(num_threads), blas_(stream_) {}

  Device device() const override { return {DeviceType::kCuda, 0}; }
  DType dtype() const override { return DType::kFloat32; }
  Context context() const override {
    Context context = host_.context();
    context.stream = stream_.get();
    return context;
  }

  Tensor allocate(DType dtype, std::span<const std::int64_t> shape) override {
    Tensor tensor = make_tensor(device(), dtype, shape, [](std::size_t bytes) {
      void* memory = nullptr;
      if (cudaMalloc(&memory, bytes) == cudaSuccess) return std::shared_ptr<void>(memory, cudaFree);
      cudaGetLastError();  // the error must not show up in a later call
      return std::shared_ptr<void>();
    });
    check(cudaMemsetAsync(tensor.view.data, 0, bytes_of(tensor.view), stream_.get()),
          "cudaMemsetAsync");
    return tensor;
  }

  // Waits, since CUDA leaves open when it has read memory that is not pinned.
  void upload(const void* host, std::size_t bytes, void* device) override {
    check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_.get()),
          "copying to the GPU");
    stream_.synchronize();
  }
  void download(const void* device, std::size_t bytes, void* host) override {
    check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_.get()),
          "copying from the GPU");
    stream_.synchronize();
    timer_.collect();
  }

  void begin_timed() override { timer_.record(stream_); }
  void end_timed() override { timer_.record(stream_); }
  double timed_seconds() override {
    stream_.synchronize();
    timer_.collect();
    return timer_.seconds();
  }

  Weight load_weight(std::span<const GgufTensor* const> parts) override {
    std::int64_t num_rows = 0;
    for (const GgufTensor* part : parts) num_rows += part->num_rows();
    const std::int64_t cols = parts[0]->row_size();
    Weight weight{allocate(DType::kFloat32, std::array{num_rows, cols}), {}};
    auto* to = static_cast<float*>(weight.tensor.view.data);
    for (const GgufTensor* part : parts) to = upload_rows(*part, to);
    return weight;
  }
  Tensor load_vector(const GgufTensor& stored) override {
    const GgufTensor* const parts[] = {&stored};
    return load_weight(parts).tensor;
  }

  void embed(const Weight& weight, const TensorView& indices, const TensorView& out) override {
    gather_rows(weight.tensor.view, indices, out);
  }
  void gather_rows(const TensorView& in, const TensorView& indices,
                   const TensorView& out) override {
    queue_gather_rows(in, indices, out, stream_.get());
  }
  void rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                const TensorView& out) override {
    queue_rms_norm(x, weight, epsilon, out, stream_.get());
  }
  void linear(const TensorView& x, const Weight& weight, const TensorView& out) override {
    blas_.multiply(x, weight.tensor.view, 0.0F, out);
  }
  void linear_add(const TensorView& x, const Weight& weight, const TensorView& out) override {
    blas_.multiply(x, weight.tensor.view, 1.0F, out);
  }
  void rope_angles(const TensorView& positions, const TensorView& frequencies,
                   const TensorView& out) override {
    queue_rope_angles(positions, frequencies, out, stream_.get());
  }
  void rope(const TensorView& x, const TensorView& angles) override {
    queue_rope(x, angles, stream_.get());
  }
  void swiglu(const TensorView& x, const TensorView& out) override {
    queue_swiglu(x, out, stream_.get());
  }

 private:
  // Widens a stored weight and copies it to `to`, on the device. Returns what comes behind it there.
  float* upload_rows(const GgufTensor& part, float* to) {
    std::vector<float> rows(static_cast<std::size_t>(part.num_rows() * part.row_size()));
    host_.dequantize(part, rows.data());
    upload(rows.data(), rows.size() * sizeof(float), to);
    return to + rows.size();
  }

  static std::size_t bytes_of(const TensorView& view) {
    return static_cast<std::size_t>(view.num_elements() * size_of(view.dtype));
  }

  CpuOps host_;  // decodes weights
  Stream stream_;
  Blas blas_;
  Timer timer_;
};

}  // namespace

std::unique_ptr<DeviceOps> make_cuda_ops(int num_threads) {
  return std::make_unique<CudaOps>(num_threads);
}

}  // namespace quire::llm
