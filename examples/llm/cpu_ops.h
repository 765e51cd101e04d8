// The operations of a Llama model on the CPU: float32, matrix products by a BLAS. Weights stay as the
// file stores them, 8.5 bits an element in Q8_0, and are widened strip by strip on the way to the
// product: the memory's bandwidth is what generation for few sequences waits for. The results are
// those of weights widened beforehand.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "device_ops.h"

namespace quire::llm {

class CpuOps final : public DeviceOps {
 public:
  // `num_threads` 0: as many as Quire's default pool. The same threads serve Quire's attention.
  explicit CpuOps(int num_threads = 0);

  // Widens a whole stored weight on the threads: for devices that take float32.
  void dequantize(const GgufTensor& stored, float* out) const;

  Device device() const override { return {}; }
  DType dtype() const override { return DType::kFloat32; }
  Context context() const override;

  Tensor allocate(DType dtype, std::span<const std::int64_t> shape) override;
  void upload(const void* host, std::size_t bytes, void* device) override;
  void download(const void* device, std::size_t bytes, void* host) override;
  void begin_timed() override;
  void end_timed() override;
  double timed_seconds() override { return timed_seconds_; }

  Weight load_weight(std::span<const GgufTensor* const> parts) override;
  Tensor load_vector(const GgufTensor& stored) override;
  void embed(const Weight& weight, const TensorView& indices, const TensorView& out) override;
  void gather_rows(const TensorView& in, const TensorView& indices, const TensorView& out) override;
  void rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                const TensorView& out) override;
  void linear(const TensorView& x, const Weight& weight, const TensorView& out) override;
  void linear_add(const TensorView& x, const Weight& weight, const TensorView& out) override;
  void rope_angles(const TensorView& positions, const TensorView& frequencies,
                   const TensorView& out) override;
  void rope(const TensorView& x, const TensorView& angles) override;
  void swiglu(const TensorView& x, const TensorView& out) override;

 private:
  // Calls work(begin, end, worker) for parts of [0, count), each at least `grain` long, on the
  // threads.
  template <class Work>
  void parallel(std::int64_t count, std::int64_t grain, const Work& work) const;
  void multiply(const TensorView& x, const Weight& weight, float beta, const TensorView& out);
  // Columns of `out` from `column` on: x by rows [begin, end) of a part.
  void multiply_rows(const TensorView& x, const GgufTensor& part, std::int64_t begin,
                     std::int64_t end, float beta, const TensorView& out, std::int64_t column,
                     float* strip) const;

  std::unique_ptr<ThreadPool> own_threads_;
  ThreadPool& threads_;
  std::vector<std::vector<float>> strips_;  // of each worker: widened rows of a weight
  std::chrono::steady_clock::time_point timed_since_;
  double timed_seconds_ = 0.0;
};

}  // namespace quire::llm
