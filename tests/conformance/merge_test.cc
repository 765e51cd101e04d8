// merge_states() against its formula, on every device.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct Parts {
  Tensor o_a, lse_a, o_b, lse_b, output, lse;
};

Parts make_parts(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t size) {
  Rng rng(42);
  Layout padded;
  padded.padding = {0, 1, 3};
  Parts parts{make_tensor(dtype, {tokens, heads, size}, padded),
              make_tensor(DType::kFloat32, {heads, tokens}),
              make_tensor(dtype, {tokens, heads, size}),
              make_tensor(DType::kFloat32, {heads, tokens}),
              make_tensor(dtype, {tokens, heads, size}, padded),
              make_tensor(DType::kFloat32, {heads, tokens})};
  for (const Tensor* tensor : {&parts.o_a, &parts.lse_a, &parts.o_b, &parts.lse_b}) {
    fill_normal(*tensor, &rng);
  }
  return parts;
}

// The formula, for one (token, head).
void expect_merged(const Parts& before, const Tensor& output, const std::vector<std::byte>& bytes,
                   const std::vector<std::byte>* lse_bytes, std::int64_t t, std::int64_t h) {
  const double a = before.lse_a.get({h, t});
  const double b = before.lse_b.get({h, t});
  const double highest = std::max(a, b);
  const bool none = std::isinf(highest);
  const double lse =
      none ? highest : highest + std::log(std::exp(a - highest) + std::exp(b - highest));
  const double tolerance = tolerance_of(output.dtype);
  for (std::int64_t d = 0; d < output.shape[2]; ++d) {
    double wanted = 0;
    if (!std::isinf(a)) wanted += before.o_a.get({t, h, d}) * std::exp(a - lse);
    if (!std::isinf(b)) wanted += before.o_b.get({t, h, d}) * std::exp(b - lse);
    const std::int64_t at = output.at({t, h, d}) - output.buffer->bytes.data();
    EXPECT_NEAR(decode(output.dtype, &bytes[at]), wanted, tolerance * (1 + std::fabs(wanted)))
        << t << " " << h << " " << d;
  }
  if (lse_bytes == nullptr) return;
  const double got = decode(DType::kFloat32, &(*lse_bytes)[(h * before.lse_a.strides[0] + t) * 4]);
  if (none) {
    EXPECT_EQ(got, lse);
  } else {
    EXPECT_NEAR(got, lse, 1e-5 * (1 + std::fabs(lse)));
  }
}

class MergeStates : public testing::TestWithParam<const AttentionBackend*> {};

TEST_P(MergeStates, FollowsTheFormula) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Parts parts = make_parts(dtype, 7, 3, 20);
    // Parts that contribute nothing, whatever they hold.
    parts.lse_a.set({0, 0}, kMinusInfinity);
    parts.lse_b.set({1, 1}, kMinusInfinity);
    parts.lse_a.set({2, 2}, kMinusInfinity);
    parts.lse_b.set({2, 2}, kMinusInfinity);
    for (std::int64_t d = 0; d < 20; ++d) {
      parts.o_a.set({0, 0, d}, std::nan(""));
      parts.o_b.set({1, 1, d}, std::numeric_limits<double>::infinity());
      parts.o_b.set({2, 2, d}, std::nan(""));
    }
    parts.lse_a.set({0, 3}, 1e30);  // dwarfs the other
    parts.lse_b.set({0, 4}, 5000.0);
    DeviceBuffers buffers(&memory_of(GetParam()->device_type()));
    merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
                 buffers.view(parts.lse_b), buffers.view(parts.output), buffers.view(parts.lse));
    EXPECT_EQ(buffers.damage({&parts.output, &parts.lse}), "");
    const auto output = buffers.download(parts.output);
    const auto lse = buffers.download(parts.lse);
    for (std::int64_t t = 0; t < 7; ++t) {
      for (std::int64_t h = 0; h < 3; ++h) {
        expect_merged(parts, parts.output, output, &lse, t, h);
      }
    }
  }
}

// Writes over a part, whose other one contributes nothing in places.
void expect_merged_in_place(DeviceMemory* memory, DType dtype, bool over_a, bool with_lse) {
  const Parts parts = make_parts(dtype, 9, 4, 33);
  const Tensor& target = over_a ? parts.o_a : parts.o_b;
  const Tensor& target_lse = over_a ? parts.lse_a : parts.lse_b;
  parts.lse_a.set({1, 2}, kMinusInfinity);
  parts.lse_b.set({3, 5}, kMinusInfinity);
  parts.lse_a.set({0, 8}, kMinusInfinity);
  parts.lse_b.set({0, 8}, kMinusInfinity);
  DeviceBuffers buffers(memory);
  merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
               buffers.view(parts.lse_b), buffers.view(target),
               with_lse ? buffers.view(target_lse) : TensorView{});
  EXPECT_EQ(buffers.damage({&target, with_lse ? &target_lse : &target}), "");
  const auto output = buffers.download(target);
  const auto lse = buffers.download(target_lse);
  for (std::int64_t t = 0; t < 9; ++t) {
    for (std::int64_t h = 0; h < 4; ++h) {
      expect_merged(parts, target, output, with_lse ? &lse : nullptr, t, h);
    }
  }
}

TEST_P(MergeStates, MayWriteOverEitherPart) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const bool over_a : {true, false}) {
      for (const bool with_lse : {true, false}) {
        expect_merged_in_place(&memory_of(GetParam()->device_type()), dtype, over_a, with_lse);
      }
    }
  }
}

TEST_P(MergeStates, NothingToMerge) {
  const Parts parts = make_parts(DType::kFloat32, 0, 4, 8);
  DeviceBuffers buffers(&memory_of(GetParam()->device_type()));
  merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
               buffers.view(parts.lse_b), buffers.view(parts.output));
  EXPECT_EQ(buffers.damage({}), "");
}

QUIRE_ON_EVERY_DEVICE(MergeStates);

}  // namespace
}  // namespace quire::conformance
