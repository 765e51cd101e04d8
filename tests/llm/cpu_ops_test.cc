// Products by weights as a file stores them, against sums in double of the widened elements.
#include "examples/llm/cpu_ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <random>

#include "examples/llm/dequantize.h"

namespace quire::llm {
namespace {

// A stored weight with its memory. Blocks of 8 and 4 bits have scales from 0.03 to 0.06.
struct Stored {
  std::vector<std::byte> data;
  GgufTensor tensor;

  Stored(GgmlType type, std::int64_t rows, std::int64_t cols, unsigned seed) {
    std::mt19937 random(seed);
    const auto byte = [&] { return static_cast<std::byte>(random() >> 24); };
    if (type == GgmlType::kF32) {
      for (std::int64_t i = 0; i < rows * cols; ++i) {
        const float value = static_cast<float>(random() >> 8) * 0x1p-21F - 4.0F;
        const auto bytes = std::bit_cast<std::array<std::byte, 4>>(value);
        data.insert(data.end(), bytes.begin(), bytes.end());
      }
    } else {
      const int quants = type == GgmlType::kQ8_0 ? 32 : 16;
      for (std::int64_t i = 0; i < rows * cols / 32; ++i) {
        data.push_back(byte());
        data.push_back(std::byte{0x28});
        for (int j = 0; j < quants; ++j) data.push_back(byte());
      }
    }
    tensor = {{}, type, {cols, rows}, data};
  }

  std::vector<float> widened() const {
    std::vector<float> values(static_cast<std::size_t>(tensor.num_rows() * tensor.row_size()));
    dequantize_rows(tensor, 0, tensor.num_rows(), values.data());
    return values;
  }
};

constexpr std::int64_t kCols = 192;

class CpuLinear : public testing::Test {
 protected:
  // More rows than one strip has, a part shorter than a strip, a float32 part behind odd bytes.
  CpuLinear()
      : stored_{Stored(GgmlType::kQ8_0, 301, kCols, 1), Stored(GgmlType::kQ4_0, 5, kCols, 2),
                Stored(GgmlType::kF32, 70, kCols, 3)} {
    std::vector<const GgufTensor*> parts;
    for (const Stored& part : stored_) {
      parts.push_back(&part.tensor);
      const std::vector<float> values = part.widened();
      widened_.insert(widened_.end(), values.begin(), values.end());
    }
    weight_ = ops_.load_weight(parts);
  }

  Tensor random_matrix(std::int64_t rows, std::int64_t cols, unsigned seed) {
    Tensor matrix = ops_.allocate(DType::kFloat32, std::array{rows, cols});
    std::mt19937 random(seed);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      data(matrix.view)[i] = static_cast<float>(random() >> 8) * 0x1p-23F - 1.0F;
    }
    return matrix;
  }

  static float* data(const TensorView& view) { return static_cast<float*>(view.data); }
  const float* weight_row(std::int64_t i) const { return widened_.data() + i * kCols; }

  CpuOps ops_{3};
  std::array<Stored, 3> stored_;
  std::vector<float> widened_;
  Weight weight_;
};

TEST_F(CpuLinear, IsTheProductByTheWidenedRows) {
  const std::int64_t num_rows = weight_.num_rows();
  ASSERT_EQ(num_rows, 376);
  for (const std::int64_t rows : {1, 3, 4, 5, 33}) {
    for (const bool add : {false, true}) {
      // Rows further apart than they are long; what lies between them stays.
      const Tensor x = random_matrix(rows, kCols + 7, 4);
      const Tensor out = random_matrix(rows, num_rows + 5, 5);
      const Tensor before = random_matrix(rows, num_rows + 5, 5);
      const TensorView x_view = x.view.slice(1, 0, kCols);
      const TensorView out_view = out.view.slice(1, 0, num_rows);
      add ? ops_.linear_add(x_view, weight_, out_view) : ops_.linear(x_view, weight_, out_view);
      for (std::int64_t i = 0; i < rows; ++i) {
        const float* got = data(out.view) + i * (num_rows + 5);
        const float* was = data(before.view) + i * (num_rows + 5);
        for (std::int64_t j = 0; j < num_rows; ++j) {
          double sum = add ? was[j] : 0.0;
          double size = std::abs(sum);
          for (std::int64_t k = 0; k < kCols; ++k) {
            const double product =
                static_cast<double>(data(x.view)[i * (kCols + 7) + k]) * weight_row(j)[k];
            sum += product;
            size += std::abs(product);
          }
          ASSERT_NEAR(got[j], sum, 1e-6 * size) << rows << " rows, " << i << ", " << j;
        }
        for (std::int64_t j = num_rows; j < num_rows + 5; ++j) ASSERT_EQ(got[j], was[j]);
      }
    }
  }
}

TEST_F(CpuLinear, EmbedsRowsOfEveryPart) {
  std::vector<std::int32_t> tokens{375, 0, 300, 301, 305, 306, 301};
  const TensorView indices{tokens.data(), DType::kInt32, {std::ssize(tokens)}};
  const Tensor out = random_matrix(std::ssize(tokens), kCols, 6);
  ops_.embed(weight_, indices, out.view);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const float* got = data(out.view) + static_cast<std::int64_t>(i) * kCols;
    EXPECT_TRUE(std::equal(got, got + kCols, weight_row(tokens[i]))) << i;
  }
}

// What becomes of the bytes that a weight was loaded from does not reach it: the file may be closed.
TEST_F(CpuLinear, KeepsItsOwnCopy) {
  const Tensor x = random_matrix(1, kCols, 4);
  const Tensor first = random_matrix(1, weight_.num_rows(), 5);
  const Tensor second = random_matrix(1, weight_.num_rows(), 6);
  ops_.linear(x.view, weight_, first.view);
  for (Stored& part : stored_) std::ranges::fill(part.data, std::byte{0});
  ops_.linear(x.view, weight_, second.view);
  EXPECT_TRUE(
      std::equal(data(first.view), data(first.view) + weight_.num_rows(), data(second.view)));
}

}  // namespace
}  // namespace quire::llm
