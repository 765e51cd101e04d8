// Each operation on the GPU against the same on the CPU, on rows that are further apart than they
// are long.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <random>
#include <span>

#include "examples/llm/cpu_ops.h"
#include "tests/llm/devices.h"

namespace quire::llm {
namespace {

constexpr std::int64_t kPadding = 3;  // floats between rows

// A float32 matrix, or heads of one: [rows, heads, size].
struct Matrix {
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t heads = 0;

  std::int64_t stride() const { return cols + kPadding; }
  std::size_t count() const { return static_cast<std::size_t>(rows * stride()); }
};

struct Operands {
  std::vector<Matrix> matrices;  // inputs, then the one that is written
  std::vector<std::int32_t> integers;
};

using Operation = std::function<void(DeviceOps& ops, const std::vector<TensorView>& matrices,
                                     const TensorView& integers)>;

// Random numbers from -4 to 4, padding included.
std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random() >> 8) * 0x1p-21F - 4.0F;
  return values;
}

// A float32 weight of random numbers.
Weight random_weight(DeviceOps& ops, std::int64_t rows, std::int64_t cols) {
  const auto values = random_values(static_cast<std::size_t>(rows * cols), 7);
  const GgufTensor stored{{}, GgmlType::kF32, {cols, rows}, std::as_bytes(std::span(values))};
  const GgufTensor* const parts[] = {&stored};
  return ops.load_weight(parts);
}

// What the operation leaves in the last matrix, padding included.
std::vector<float> result_of(DeviceOps& ops, const Operands& operands, const Operation& operation) {
  std::vector<Tensor> memory;
  std::vector<TensorView> views;
  for (const Matrix& m : operands.matrices) {
    memory.push_back(ops.allocate(DType::kFloat32, std::array{m.rows, m.stride()}));
    const auto values = random_values(m.count(), static_cast<unsigned>(memory.size()));
    ops.upload(values.data(), values.size() * sizeof(float), memory.back().view.data);
    TensorView view = memory.back().view.slice(1, 0, m.cols);
    if (m.heads > 0) {
      const std::int64_t size = m.cols / m.heads;
      view = {
          view.data, DType::kFloat32, {m.rows, m.heads, size}, {m.stride(), size, 1}, ops.device()};
    }
    views.push_back(view);
  }
  const auto num_integers = static_cast<std::int64_t>(operands.integers.size());
  const Tensor integers = ops.allocate(DType::kInt32, std::array{num_integers});
  ops.upload(operands.integers.data(), operands.integers.size() * sizeof(std::int32_t),
             integers.view.data);
  operation(ops, views, integers.view);
  std::vector<float> result(operands.matrices.back().count());
  ops.download(memory.back().view.data, result.size() * sizeof(float), result.data());
  return result;
}

class CudaOps : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(DeviceType::kCuda); !reason.empty()) {
      GTEST_SKIP() << reason;
    }
    cuda_ = make_ops(DeviceType::kCuda, 1);
  }

  void expect_same(const Operands& operands, float tolerance, const Operation& operation) {
    const std::vector<float> expected = result_of(cpu_, operands, operation);
    const std::vector<float> got = result_of(*cuda_, operands, operation);
    ASSERT_EQ(got.size(), expected.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], tolerance * std::max(1.0F, std::abs(expected[i])))
          << "element " << i << " of rows of " << operands.matrices.back().stride();
    }
  }

  CpuOps cpu_{1};
  std::unique_ptr<DeviceOps> cuda_;
};

TEST_F(CudaOps, GatherRows) {
  expect_same({{{9, 300}, {5, 300}}, {8, 0, 3, 3, 1}}, 0.0F,
              [](DeviceOps& ops, const auto& m, const TensorView& indices) {
                ops.gather_rows(m[0], indices, m[1]);
              });
}

TEST_F(CudaOps, RmsNorm) {
  for (const std::int64_t cols : {1, 31, 576, 2049}) {
    expect_same({{{4, cols}, {1, cols}, {4, cols}}, {0}}, 1e-6F,
                [](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) {
                  ops.rms_norm(m[0], m[1], 1e-5F, m[2]);
                });
  }
  // In place, as the last norm of a step is.
  expect_same({{{1, 64}, {3, 64}}, {0}}, 1e-6F,
              [](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) {
                ops.rms_norm(m[1], m[0], 1e-5F, m[1]);
              });
}

// Sums of up to 192 products of up to 16: float32 is off by 1e-4 at most, TF32 by 1e-2 and more.
TEST_F(CudaOps, Linear) {
  for (const std::int64_t rows : {1, 3, 70}) {
    for (const std::int64_t inner : {7, 192}) {
      const Operands operands{{{rows, inner}, {rows, 101}}, {0}};
      expect_same(operands, 1e-3F,
                  [&](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) {
                    ops.linear(m[0], random_weight(ops, 101, inner), m[1]);
                  });
      expect_same(operands, 1e-3F,
                  [&](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) {
                    ops.linear_add(m[0], random_weight(ops, 101, inner), m[1]);
                  });
    }
  }
}

TEST_F(CudaOps, Embed) {
  expect_same({{{5, 192}}, {8, 0, 3, 3, 1}}, 0.0F,
              [](DeviceOps& ops, const auto& m, const TensorView& indices) {
                ops.embed(random_weight(ops, 9, 192), indices, m[0]);
              });
}

TEST_F(CudaOps, RopeAngles) {
  const Operation operation = [](DeviceOps& ops, const auto& m, const TensorView& positions) {
    // Frequencies are a vector.
    const TensorView frequencies = m[0].select(0, 0);
    ops.rope_angles(positions, frequencies, m[1]);
  };
  expect_same({{{1, 33}, {4, 66}}, {0, 1, 77, 131071}}, 1e-6F, operation);
}

TEST_F(CudaOps, Rope) {
  // The written one comes last; heads of 20 of which 16 are rotated.
  expect_same(
      {{{5, 16}, {5, 60, 3}}, {0}}, 1e-5F,
      [](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) { ops.rope(m[1], m[0]); });
}

TEST_F(CudaOps, SwiGlu) {
  expect_same({{{3, 1202}, {3, 601}}, {0}}, 1e-5F,
              [](DeviceOps& ops, const auto& m, const TensorView& /*integers*/) {
                ops.swiglu(m[0], m[1]);
              });
}

}  // namespace
}  // namespace quire::llm
