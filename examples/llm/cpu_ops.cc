#include "cpu_ops.h"

#include <cblas.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "dequantize.h"

namespace quire::llm {
namespace {

float* row(const TensorView& x, std::int64_t i) {
  return static_cast<float*>(x.data) + i * x.strides[0];
}

// Up to so many rows of x a matrix-vector product for each beats OpenBLAS's general product, which
// repacks the weight.
constexpr std::int64_t kVectorRows = 4;
// Rows of a weight are widened so many bytes at a time: what the second-level cache holds, and for
// many rows of x enough to make its packing small beside the product. Strips of the first level's
// size make more calls, each of which takes a lock of OpenBLAS's: a fifth slower with two threads.
constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kStripBytes = 1 << 17;
constexpr std::int64_t kMostStripBytes = 1 << 19;
constexpr std::int64_t kLeastStripRows = 8;
constexpr std::int64_t kCacheLine = 64;

std::int64_t strip_rows(std::int64_t bytes, std::int64_t cols) {
  return std::max(bytes / (cols * std::int64_t{sizeof(float)}), kLeastStripRows);
}

// The products of a step follow each other within microseconds: threads that slept in between would
// take longer to wake than the work takes.
constexpr std::chrono::microseconds kSpin{100};

std::unique_ptr<ThreadPool> start_threads(int num_threads) {
  if (num_threads > 0) return make_thread_pool(num_threads, kSpin);
  try {
    return make_thread_pool(default_num_threads(), kSpin);
  } catch (const std::system_error&) {
    return nullptr;  // the system does not start so many: the default pool has those that fit
  }
}

}  // namespace

CpuOps::CpuOps(int num_threads)
    : own_threads_(start_threads(num_threads)),
      threads_(own_threads_ ? *own_threads_ : default_thread_pool()),
      strips_(static_cast<std::size_t>(threads_.num_threads())) {
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
      [](void* context, std::int64_t index, int worker) {
        const auto& job = *static_cast<const Shared*>(context);
        job.work(job.count * index / job.parts, job.count * (index + 1) / job.parts, worker);
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

Weight CpuOps::load_weight(std::span<const GgufTensor* const> parts) {
  const auto place = [](const GgufTensor& part) {
    return (std::ssize(part.data) + kCacheLine - 1) / kCacheLine * kCacheLine;
  };
  std::int64_t bytes = 0;
  for (const GgufTensor* part : parts) bytes += place(*part);
  Weight weight{allocate(DType::kUInt8, std::array{bytes}), {}};
  auto* to = static_cast<std::byte*>(weight.tensor.view.data);
  for (const GgufTensor* part : parts) {
    std::ranges::copy(part->data, to);
    weight.parts.push_back({{}, part->type, part->shape, {to, part->data.size()}});
    to += place(*part);
  }
  // Here, so that no product allocates.
  const std::int64_t cols = parts[0]->row_size();
  const auto strip = static_cast<std::size_t>(strip_rows(kMostStripBytes, cols) * cols);
  for (std::vector<float>& own : strips_) own.resize(std::max(own.size(), strip));
  return weight;
}

void CpuOps::dequantize(const GgufTensor& stored, float* out) const {
  parallel(stored.num_rows(), 16, [&](std::int64_t begin, std::int64_t end, int) {
    dequantize_rows(stored, begin, end, out + begin * stored.row_size());
  });
}

Tensor CpuOps::load_vector(const GgufTensor& stored) {
  Tensor vector = allocate(DType::kFloat32, std::array{std::int64_t{1}, stored.row_size()});
  dequantize_rows(stored, 0, 1, row(vector.view, 0));
  return vector;
}

void CpuOps::embed(const Weight& weight, const TensorView& indices, const TensorView& out) {
  const auto* index = static_cast<const std::int32_t*>(indices.data);
  for (std::int64_t i = 0; i < out.shape[0]; ++i) {
    std::int64_t from = index[i];
    auto part = weight.parts.begin();
    for (; from >= part->num_rows(); ++part) from -= part->num_rows();
    dequantize_rows(*part, from, from + 1, row(out, i));
  }
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
  parallel(x.shape[0], 16, [&](std::int64_t begin, std::int64_t end, int) {
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

void CpuOps::linear(const TensorView& x, const Weight& weight, const TensorView& out) {
  multiply(x, weight, 0.0F, out);
}

void CpuOps::linear_add(const TensorView& x, const Weight& weight, const TensorView& out) {
  multiply(x, weight, 1.0F, out);
}

void CpuOps::multiply(const TensorView& x, const Weight& weight, float beta,
                      const TensorView& out) {
  if (x.shape[0] == 0) return;
  // Each task computes some columns of the result: some rows of the weight.
  parallel(weight.num_rows(), 64, [&](std::int64_t begin, std::int64_t end, int worker) {
    std::int64_t first = 0;  // row of the weight that is the part's first
    for (const GgufTensor& part : weight.parts) {
      const std::int64_t rows = part.num_rows();
      multiply_rows(x, part, std::clamp(begin - first, std::int64_t{0}, rows),
                    std::clamp(end - first, std::int64_t{0}, rows), beta, out, first,
                    strips_[static_cast<std::size_t>(worker)].data());
      first += rows;
    }
  });
}

void CpuOps::multiply_rows(const TensorView& x, const GgufTensor& part, std::int64_t begin,
                           std::int64_t end, float beta, const TensorView& out, std::int64_t column,
                           float* strip) const {
  const auto rows = static_cast<int>(x.shape[0]);
  const auto inner = static_cast<int>(x.shape[1]);
  const std::int64_t step = strip_rows(rows <= kFewRows ? kStripBytes : kMostStripBytes, inner);
  for (std::int64_t first = begin; first < end; first += step) {
    const auto count = static_cast<int>(std::min(step, end - first));
    dequantize_rows(part, first, first + count, strip);
    if (rows <= kVectorRows) {
      for (int i = 0; i < rows; ++i) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, count, inner, 1.0F, strip, inner, row(x, i), 1,
                    beta, row(out, i) + column + first, 1);
      }
    } else {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, count, inner, 1.0F, row(x, 0),
                  static_cast<int>(x.strides[0]), strip, inner, beta, row(out, 0) + column + first,
                  static_cast<int>(out.strides[0]));
    }
  }
}

void CpuOps::rope_angles(const TensorView& positions, const TensorView& frequencies,
                         const TensorView& out) {
  const auto* position = static_cast<const std::int32_t*>(positions.data);
  const auto* frequency = static_cast<const float*>(frequencies.data);
  const std::int64_t pairs = frequencies.shape[0];
  parallel(out.shape[0], 16, [&](std::int64_t begin, std::int64_t end, int) {
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
  parallel(x.shape[0], 16, [&](std::int64_t begin, std::int64_t end, int) {
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
  parallel(x.shape[0], 4, [&](std::int64_t begin, std::int64_t end, int) {
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
