// Every kernel here is one block a row, with the row's elements over its threads. Simple on purpose:
// the products between them read every weight of the model, these only the batch's activations.
#include "cuda_check.h"
#include "cuda_kernels.h"

namespace quire::llm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A float32 matrix, or a vector as a matrix of one row.
struct Rows {
  float* data;
  std::int64_t stride;
  int cols;

  __device__ float* operator[](std::int64_t row) const { return data + row * stride; }
};

Rows rows_of(const TensorView& view) {
  return {static_cast<float*>(view.data), view.strides[0],
          static_cast<int>(view.shape[view.ndim - 1])};
}

const std::int32_t* integers(const TensorView& view) {
  return static_cast<const std::int32_t*>(view.data);
}

__global__ void __launch_bounds__(kThreads)
    gather_rows(Rows in, const std::int32_t* indices, Rows out) {
  const float* from = in[indices[blockIdx.x]];
  float* to = out[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < out.cols; i += kThreads) to[i] = from[i];
}

// The sum of a value over the block, for every thread.
__device__ float block_sum(float value) {
  __shared__ float sums[kWarps];
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(~0U, value, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0F;
  for (const float sum : sums) total += sum;
  return total;
}

// `x` and `out` may be the same: an element is written by the thread that read it, after the sum.
__global__ void __launch_bounds__(kThreads)
    rms_norm(Rows x, const float* weight, float epsilon, Rows out) {
  const float* in = x[blockIdx.x];
  float* result = out[blockIdx.x];
  float squares = 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < x.cols; i += kThreads) squares += in[i] * in[i];
  const float mean = block_sum(squares) / static_cast<float>(x.cols);
  const float scale = 1.0F / sqrtf(mean + epsilon);
  for (int i = static_cast<int>(threadIdx.x); i < x.cols; i += kThreads) {
    result[i] = in[i] * scale * weight[i];
  }
}

// In float64: late positions turn the fast pairs by thousands of radians. Once a step, so cheap.
__global__ void __launch_bounds__(kThreads)
    rope_angles(const std::int32_t* positions, Rows frequencies, Rows out) {
  const int pairs = frequencies.cols;
  float* result = out[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < pairs; i += kThreads) {
    const double angle =
        static_cast<double>(positions[blockIdx.x]) * static_cast<double>(frequencies.data[i]);
    double sine = 0.0;
    double cosine = 0.0;
    sincos(angle, &sine, &cosine);
    result[i] = static_cast<float>(cosine);
    result[pairs + i] = static_cast<float>(sine);
  }
}

__global__ void __launch_bounds__(kThreads)
    rope(Rows x, int num_heads, std::int64_t head_stride, Rows angles) {
  const int pairs = angles.cols / 2;
  const float* cosines = angles[blockIdx.x];
  const float* sines = cosines + pairs;
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * pairs; i += kThreads) {
    const int pair = i % pairs;
    float* v = x[blockIdx.x] + (i / pairs) * head_stride + 2 * pair;
    const float a = v[0];
    const float b = v[1];
    v[0] = a * cosines[pair] - b * sines[pair];
    v[1] = a * sines[pair] + b * cosines[pair];
  }
}

__global__ void __launch_bounds__(kThreads) swiglu(Rows x, Rows out) {
  const float* gate = x[blockIdx.x];
  const float* up = gate + out.cols;
  float* result = out[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < out.cols; i += kThreads) {
    result[i] = gate[i] / (1.0F + expf(-gate[i])) * up[i];
  }
}

// A block for each row of `view`; a grid of none cannot be launched.
template <class... Parameters, class... Arguments>
void queue(const char* name, void (*kernel)(Parameters...), const TensorView& view,
           cudaStream_t stream, Arguments... arguments) {
  if (view.shape[0] == 0) return;
  kernel<<<static_cast<unsigned>(view.shape[0]), kThreads, 0, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace

void queue_gather_rows(const TensorView& in, const TensorView& indices, const TensorView& out,
                       cudaStream_t stream) {
  queue("gather_rows", gather_rows, out, stream, rows_of(in), integers(indices), rows_of(out));
}

void queue_rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                    const TensorView& out, cudaStream_t stream) {
  queue("rms_norm", rms_norm, x, stream, rows_of(x), rows_of(weight).data, epsilon, rows_of(out));
}

void queue_rope_angles(const TensorView& positions, const TensorView& frequencies,
                       const TensorView& out, cudaStream_t stream) {
  queue("rope_angles", rope_angles, out, stream, integers(positions), rows_of(frequencies),
        rows_of(out));
}

void queue_rope(const TensorView& x, const TensorView& angles, cudaStream_t stream) {
  queue("rope", rope, x, stream, rows_of(x), static_cast<int>(x.shape[1]), x.strides[1],
        rows_of(angles));
}

void queue_swiglu(const TensorView& x, const TensorView& out, cudaStream_t stream) {
  queue("swiglu", swiglu, out, stream, rows_of(x), rows_of(out));
}

}  // namespace quire::llm
