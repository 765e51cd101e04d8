#include "cpu_ops.h"

#include <cblas.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "dequantize.h"

namespace quire::llm {
namespace {

float* row(const TensorView& x, std::int64_t i) {
  return static_cast<float*>(x.data) + i * x.strides[0];
}

// Up to so many rows of x a matrix-vector product for each, over a strip of the weight that stays
// in the first-level cache meanwhile, beats OpenBLAS's general product, which repacks the weight.
constexpr std::int64_t kVectorRows = 4;
constexpr std::int64_t kStripBytes = 1 << 17;

}  // namespace

CpuOps::CpuOps(int num_threads)
    : own_threads_(num_threads > 0 ? make_thread_pool(num_threads) : nullptr),
      threads_(own_threads_ ? *own_threads_ : default_thread_pool()) {
  // The products are cut into parts here: BLAS threads of its own would spin beside Quire's.
  openblas_set_num_threads(1);
}

Context CpuOps::context() const {
  Context context;
  context.threads = &threads_;
  return context;
}

template <class Work>
void CpuOps::parallel(std::int64_t count, std::int64_t grain, const Work& work) const {
  struct Shared {
    const Work& work;
    std::int64_t count;
    std::int64_t parts;
  };
  const std::int64_t most = 4 * static_cast<std::int64_t>(threads_.num_threads());
  const std::int64_t parts = std::clamp((count + grain - 1) / grain, std::int64_t{1}, most);
  Shared shared{work, count, parts};
  threads_.run(
      parts,
      [](void* context, std::int64_t index, int) {
        const auto& job = *static_cast<const Shared*>(context);
        job.work(job.count * index / job.parts, job.count * (index + 1) / job.parts);
      },
      &shared);
}

Tensor CpuOps::allocate(DType dtype, std::span<const std::int64_t> shape) {
  // calloc: large memory comes as untouched pages, so a cache costs only what is used of it.
  return make_tensor(device(), dtype, shape, [](std::size_t bytes) {
    void* memory = std::calloc(bytes, 1);
    return memory == nullptr ? std::shared_ptr<void>() : std::shared_ptr<void>(memory, std::free);
  });
}

void CpuOps::upload(const void* host, std::size_t bytes, void* device) {
  std::memcpy(device, host, bytes);
}

void CpuOps::download(const void* device, std::size_t bytes, void* host) {
  std::memcpy(host, device, bytes);
}

void CpuOps::begin_timed() { timed_since_ = std::chrono::steady_clock::now(); }

void CpuOps::end_timed() {
  timed_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - timed_since_).count();
}

Tensor CpuOps::load_weight(std::span<const GgufTensor* const> parts) {
  std::int64_t num_rows = 0;
  for (const GgufTensor* part : parts) num_rows += part->num_rows();
  const std::int64_t cols = parts[0]->row_size();
  Tensor weight = allocate(DType::kFloat32, std::array{num_rows, cols});
  std::int64_t first = 0;
  for (const GgufTensor* part : parts) {
    parallel(part->num_rows(), 16, [&](std::int64_t begin, std::int64_t end) {
      dequantize_rows(*part, begin, end, row(weight.view, first + begin));
    });
    first += part->num_rows();
  }
  return weight;
}

void CpuOps::gather_rows(const TensorView& in, const TensorView& indices, const TensorView& out) {
  const auto* index = static_cast<const std::int32_t*>(indices.data);
  const auto bytes = static_cast<std::size_t>(out.shape[1]) * sizeof(float);
  for (std::int64_t i = 0; i < out.shape[0]; ++i) {
    std::memcpy(row(out, i), row(in, index[i]), bytes);
  }
}

void CpuOps::rms_norm(const TensorView& x, const TensorView& weight, float epsilon,
                      const TensorView& out) {
  const std::int64_t cols = x.shape[1];
  const float* gain = row(weight, 0);
  parallel(x.shape[0], 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* in = row(x, i);
      float* result = row(out, i);
      double squares = 0.0;
      for (std::int64_t j = 0; j < cols; ++j) squares += static_cast<double>(in[j]) * in[j];
      const auto scale = static_cast<float>(
          1.0 / std::sqrt(squares / static_cast<double>(cols) + static_cast<double>(epsilon)));
      for (std::int64_t j = 0; j < cols; ++j) result[j] = in[j] * scale * gain[j];
    }
  });
}

void CpuOps::linear(const TensorView& x, const TensorView& weight, const TensorView& out) {
  multiply(x, weight, 0.0F, out);
}

void CpuOps::linear_add(const TensorView& x, const TensorView& weight, const TensorView& out) {
  multiply(x, weight, 1.0F, out);
}

void CpuOps::multiply(const TensorView& x, const TensorView& weight, float beta,
                      const TensorView& out) {
  const auto rows = static_cast<int>(x.shape[0]);
  const auto inner = static_cast<int>(x.shape[1]);
  const auto x_stride = static_cast<int>(x.strides[0]);
  const auto weight_stride = static_cast<int>(weight.strides[0]);
  const auto out_stride = static_cast<int>(out.strides[0]);
  if (rows == 0) return;
  // Each part computes some columns of the result: some rows of the weight.
  parallel(weight.shape[0], 64, [&](std::int64_t begin, std::int64_t end) {
    if (rows > kVectorRows) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, static_cast<int>(end - begin),
                  inner, 1.0F, row(x, 0), x_stride, row(weight, begin), weight_stride, beta,
                  row(out, 0) + begin, out_stride);
      return;
    }
    const std::int64_t strip =
        std::max<std::int64_t>(kStripBytes / (inner * std::int64_t{sizeof(float)}), 8);
    for (std::int64_t first = begin; first < end; first += strip) {
      const auto count = static_cast<int>(std::min(strip, end - first));
      for (int i = 0; i < rows; ++i) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, count, inner, 1.0F, row(weight, first),
                    weight_stride, row(x, i), 1, beta, row(out, i) + first, 1);
      }
    }
  });
}

void CpuOps::rope_angles(const TensorView& positions, const TensorView& frequencies,
                         const TensorView& out) {
  const auto* position = static_cast<const std::int32_t*>(positions.data);
  const auto* frequency = static_cast<const float*>(frequencies.data);
  const std::int64_t pairs = frequencies.shape[0];
  parallel(out.shape[0], 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float* result = row(out, i);
      for (std::int64_t j = 0; j < pairs; ++j) {
        const double angle = static_cast<double>(position[i]) * static_cast<double>(frequency[j]);
        result[j] = static_cast<float>(std::cos(angle));
        result[pairs + j] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

void CpuOps::rope(const TensorView& x, const TensorView& angles) {
  const std::int64_t pairs = angles.shape[1] / 2;
  parallel(x.shape[0], 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* cosine = row(angles, i);
      const float* sine = cosine + pairs;
      for (std::int64_t head = 0; head < x.shape[1]; ++head) {
        float* v = row(x, i) + head * x.strides[1];
        for (std::int64_t j = 0; j < pairs; ++j) {
          const float a = v[2 * j];
          const float b = v[2 * j + 1];
          v[2 * j] = a * cosine[j] - b * sine[j];
          v[2 * j + 1] = a * sine[j] + b * cosine[j];
        }
      }
    }
  });
}

void CpuOps::swiglu(const TensorView& x, const TensorView& out) {
  const std::int64_t cols = out.shape[1];
  parallel(x.shape[0], 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* gate = row(x, i);
      const float* up = gate + cols;
      float* result = row(out, i);
      for (std::int64_t j = 0; j < cols; ++j) {
        result[j] = gate[j] / (1.0F + std::exp(-gate[j])) * up[j];
      }
    }
  });
}

}  // namespace quire::llm
