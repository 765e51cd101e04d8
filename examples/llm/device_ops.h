// What a Llama model needs of a device besides attention. One implementation a device: cpu_ops.h,
// cuda_ops.h.
//
// Matrices are quire::TensorView in the device's memory, row-major, of dtype(), with unit stride in
// the last dimension; rows may be further apart than they are long. Operations are queued in order;
// only upload(), download() and timed_seconds() wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "gguf.h"
#include "quire/types.h"

namespace quire::llm {

// Memory of a device and a view of it. Copies share the memory.
struct Tensor {
  std::shared_ptr<void> memory;
  TensorView view;
};

// A weight matrix, [num_rows(), columns], in the form that the device multiplies by.
struct Weight {
  Tensor tensor;                  // CUDA: the matrix, in dtype(). CPU: the memory of `parts`
  std::vector<GgufTensor> parts;  // CPU: rows as the file stores them, one part below the other

  std::int64_t num_rows() const;
};

class DeviceOps {
 public:
  virtual ~DeviceOps() = default;

  virtual Device device() const = 0;
  // Of activations and vectors, and so of the queries that attention sees.
  virtual DType dtype() const = 0;
  // What Quire's calls are to run with, so that they follow the operations here.
  virtual Context context() const = 0;

  // A contiguous tensor of any dtype and at most four dimensions. Its content is zero.
  virtual Tensor allocate(DType dtype, std::span<const std::int64_t> shape) = 0;
  virtual void upload(const void* host, std::size_t bytes, void* device) = 0;
  virtual void download(const void* device, std::size_t bytes, void* host) = 0;

  // Seconds that the device has spent between begin_timed() and end_timed(), all pairs together.
  virtual void begin_timed() = 0;
  virtual void end_timed() = 0;
  virtual double timed_seconds() = 0;

  // The rows of several stored weights with equally long rows, one below the other.
  virtual Weight load_weight(std::span<const GgufTensor* const> parts) = 0;
  // A stored vector, [1, cols] of dtype().
  virtual Tensor load_vector(const GgufTensor& stored) = 0;

  // out[i] = weight[indices[i]], rows; indices int32 on the device.
  virtual void embed(const Weight& weight, const TensorView& indices, const TensorView& out) = 0;
  // out[i] = in[indices[i]], rows; indices int32 on the device.
  virtual void gather_rows(const TensorView& in, const TensorView& indices,
                           const TensorView& out) = 0;
  // out = x / rms(x) * weight, by rows; weight [1, cols].
  virtual void rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                        const TensorView& out) = 0;
  // out = x weight^T, or out += x weight^T; weight [out cols, x cols].
  virtual void linear(const TensorView& x, const Weight& weight, const TensorView& out) = 0;
  virtual void linear_add(const TensorView& x, const Weight& weight, const TensorView& out) = 0;
  // The angles of rotary embeddings: out[i] = cos(positions[i] * frequencies), then as many sines.
  // positions int32 [rows], frequencies float32 [pairs], out float32 [rows, 2 * pairs].
  virtual void rope_angles(const TensorView& positions, const TensorView& frequencies,
                           const TensorView& out) = 0;
  // Rotates, in place, elements (2i, 2i + 1) of each head of x [rows, heads, head_size] by the
  // row's angle i. That is the order in which GGUF files store Llama's q and k.
  virtual void rope(const TensorView& x, const TensorView& angles) = 0;
  // out = silu(left half of x) * right half of x, by rows.
  virtual void swiglu(const TensorView& x, const TensorView& out) = 0;
};

// The operations of the first device of that type, with `num_threads` CPU threads (0: Quire's
// default pool). Throws std::runtime_error if this build or this machine has no such device.
std::unique_ptr<DeviceOps> make_ops(DeviceType type, int num_threads = 0);

// For implementations: a contiguous tensor in what `allocate` gives for a number of bytes; null
// means that there is not so much, which throws.
Tensor make_tensor(Device device, DType dtype, std::span<const std::int64_t> shape,
                   std::shared_ptr<void> (*allocate)(std::size_t bytes));

}  // namespace quire::llm
