// Scales, soft caps and values at the edge of float32 and beyond ("NaN and Inf" of semantics.md).
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class ExtremeValuesTest : public ConformanceTest {};

TEST_P(ExtremeValuesTest, DenormalSoftCap) {
  for (const std::int64_t query_len : {1, 40}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const bool zero_query : {true, false}) {
        CaseSpec spec = small_spec({{query_len, 50}});
        spec.model_dtype = spec.config.dtype = dtype;
        spec.config.head_size = 64;
        spec.config.score.soft_cap = 1e-39F;
        spec.write = false;
        const Case c = build_case(spec);
        for (std::int64_t d = 0; zero_query && d < 64; ++d) c.query.set({0, 0, d}, 0);
        check(c);
      }
    }
  }
}

TEST_P(ExtremeValuesTest, OutputScalesOfEverySize) {
  for (const float scale : {1e-39F, 1e-30F, 1e30F}) {
    for (const bool in_memory : {false, true}) {
      CaseSpec spec = small_spec({{1, 40}, {40, 50}});
      spec.output_dtype = DType::kFloat8E4M3;
      spec.output_scale = scale;
      spec.scales_in_memory = in_memory;
      spec.write = false;
      const Case c = build_case(spec);
      for (std::int64_t j = 0; j < 40; ++j) {
        const Sizes at = slot_of(c, 0, j);
        c.value_cache.set({at[0], at[1], 0, 3}, 0);
      }
      check(c);
      EXPECT_EQ(out(c, 0, 0, 3), 0.0);
    }
  }
}

// In memory a scale may hold anything: x / scale and scale * x as IEEE 754 has them.
TEST_P(ExtremeValuesTest, OutputScalesThatAreNoScales) {
  CaseSpec spec = small_spec({{1, 4}});
  spec.output_dtype = DType::kFloat8E4M3;
  spec.scales_in_memory = true;
  spec.write = false;
  const auto output_of = [&](float scale) {
    const Case c = build_case(spec);
    c.scales.set({3}, scale);
    for (std::int64_t j = 0; j < 4; ++j) {
      const Sizes at = slot_of(c, 0, j);
      for (std::int64_t d = 0; d < 16; ++d) c.value_cache.set({at[0], at[1], 0, d}, d == 0 ? 0 : 2);
    }
    DeviceCase on_device(c, backend());
    actual_ = on_device.attend();
    return std::vector<double>{out(c, 0, 0, 0), out(c, 0, 0, 1)};
  };
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isnan(output_of(0.0F)[0]));
  EXPECT_EQ(output_of(0.0F)[1], 448.0);
  EXPECT_EQ(output_of(inf), (std::vector<double>{0, 0}));
  EXPECT_EQ(output_of(-0.5F)[1], -4.0);
  for (const double x : output_of(std::nanf(""))) EXPECT_TRUE(std::isnan(x));
}

TEST_P(ExtremeValuesTest, CacheScalesThatAreNoScales) {
  for (const std::int64_t query_len : {1, 40}) {
    CaseSpec spec = small_spec({{query_len, 60}});
    spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
    spec.model_dtype = spec.config.dtype = DType::kBFloat16;
    spec.config.head_size = 64;
    spec.scales_in_memory = true;
    spec.write = false;
    for (const std::int64_t which : {1, 2}) {  // of K, of V
      for (const double scale : {0.0, -0.03, std::nan("")}) {
        const Case c = build_case(spec);
        c.scales.set({which}, scale);
        check(c);
      }
    }
  }
}

TEST_P(ExtremeValuesTest, LargeValuesDoNotOverflow) {
  if (backend().device_type() != DeviceType::kCpu) GTEST_SKIP() << "promised on the CPU only";
  for (const std::int64_t query_len : {1, 40}) {
    for (const std::int64_t head_size : {16, 40}) {
      CaseSpec spec = small_spec({{query_len, 3000}});
      spec.config.head_size = head_size;
      spec.write = false;
      const Case c = build_case(spec);
      for (std::int64_t j = 0; j < 3000; ++j) {
        const Sizes at = slot_of(c, 0, j);
        for (std::int64_t d = 0; d < head_size; ++d) {
          c.value_cache.set({at[0], at[1], 0, d}, 3e38);
        }
      }
      DeviceCase on_device(c, backend());
      actual_ = on_device.attend();
      EXPECT_NEAR(out(c, query_len - 1, 0, 0), 3e38, 1e33);
    }
  }
}

QUIRE_ON_EVERY_BACKEND(ExtremeValuesTest);

}  // namespace
}  // namespace quire::conformance
