// Cascade: a shared prefix that is read once for all changes no result, whatever else a layer and a
// batch ask for.
#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class CascadeTest : public ConformanceTest {
 protected:
  // Runs with and without sharing, both judged. The bits must differ: else nothing was shared.
  void compare_with_plain(CaseSpec spec) {
    spec.announced_prefix_len = spec.shared_prefix_len;
    check(spec);
    const Actual shared = actual_;
    spec.announced_prefix_len = 0;
    spec.config.auto_cascade = false;
    check(spec);
    if (std::string(backend().name()) == "reference") return;
    EXPECT_NE(shared.output, actual_.output) << describe(spec);
  }

  // Sequences of few rows that go on after a prefix; one ends with it, but for its own token.
  CaseSpec decode_spec(DType dtype, std::int64_t prefix) {
    CaseSpec spec = small_spec({{1, prefix + 60}, {1, prefix + 1}, {4, prefix + 20}, {1, 900}});
    spec.model_dtype = spec.config.dtype = dtype;
    spec.config.head_size = 64;
    spec.config.num_heads = 8;
    spec.config.block_size = 16;
    spec.shared_prefix_len = prefix;
    spec.output_dtype = DType::kFloat32;
    return spec;
  }
};

TEST_P(CascadeTest, PrefixEndsAnywhereInATile) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t prefix : {16, 64, 400, 640, 656}) {
      compare_with_plain(decode_spec(dtype, prefix));
    }
  }
}

TEST_P(CascadeTest, ScoresAndMasks) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    CaseSpec spec = decode_spec(dtype, 400);
    spec.sinks = true;
    compare_with_plain(spec);
    spec.alibi = true;
    compare_with_plain(spec);
    spec.config.score.soft_cap = 20.0F;
    spec.config.score.softmax_scale = -0.1F;
    compare_with_plain(spec);
    // Rows that see nothing behind the prefix: all their own keys are hidden.
    spec = decode_spec(dtype, 400);
    spec.sequences.assign(9, {1, 401});
    spec.qq_bias_size = 16;
    spec.qq_bias_per_sequence = spec.qq_bias_has_infinity = true;
    compare_with_plain(spec);
    spec = decode_spec(dtype, 400);
    spec.ranges = spec.causal_flags = true;
    spec.sequences[0].ranges = {{380, 459}};
    spec.sequences[2].causal = false;
    compare_with_plain(spec);
  }
}

TEST_P(CascadeTest, SlidingWindows) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    CaseSpec spec = decode_spec(dtype, 400);
    spec.announced_prefix_len = 400;
    for (const Mask& mask : {Mask::sliding_window(70), Mask::chunked(128, 1)}) {
      spec.config.mask = mask;
      check(spec);
    }
  }
}

TEST_P(CascadeTest, CacheTypes) {
  for (const KvCacheDType cache :
       {KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead, KvCacheDType::kInt4PerTokenHead}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      CaseSpec spec = decode_spec(dtype, 400);
      spec.config.kv_cache_dtype = cache;
      compare_with_plain(spec);
    }
  }
}

TEST_P(CascadeTest, HeadSizesAndGroups) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    CaseSpec spec = decode_spec(dtype, 208);
    for (const auto& [size, size_v] : {std::pair{128, 128}, {256, 256}, {80, 48}, {576, 512}}) {
      spec.config.head_size = size;
      spec.config.head_size_v = size_v;
      spec.config.num_heads = 5;
      spec.config.num_kv_heads = 1;
      compare_with_plain(spec);
    }
  }
}

TEST_P(CascadeTest, ManySequencesALongPrefix) {
  CaseSpec spec = decode_spec(DType::kBFloat16, 2000);
  spec.config.num_heads = 7;
  spec.config.num_kv_heads = 1;
  spec.sequences.assign(45, {1, 2003});
  spec.sequences[7] = {150, 2160};  // its rows fill tiles of their own
  spec.sequences[9] = {0, 2010};
  spec.padded_sequences = 2;
  spec.padded_rows = 3;
  compare_with_plain(spec);
}

TEST_P(CascadeTest, Outputs) {
  CaseSpec spec = decode_spec(DType::kBFloat16, 400);
  spec.cut_rows = 1;
  spec.leading_rows = 2;
  for (const DType output : {DType::kBFloat16, DType::kFloat8E4M3}) {
    for (const bool block_scale : {false, true}) {
      if (block_scale && output != DType::kFloat8E4M3) continue;
      spec.output_dtype = output;
      spec.block_scale = block_scale;
      spec.announced_prefix_len = 400;
      spec.repeat = true;
      EXPECT_EQ(run_case(build_case(spec), backend()), "") << describe(spec);
    }
  }
}

// Three families of sequences that take turns, and some of none.
TEST_P(CascadeTest, SeveralGroupsAreFound) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    CaseSpec spec = decode_spec(dtype, 0);
    spec.config.num_heads = 4;
    spec.write = false;
    for (std::int64_t s = 0; s < 32; ++s) {
      spec.sequences.resize(32);
      spec.sequences[s] = {1 + s % 3, 1300 + 5 * s};
    }
    const Case c = build_case(spec);
    for (std::int64_t s = 4; s < 32; ++s) {
      const std::int64_t family = s % 4;
      if (family == 3) continue;
      for (std::int64_t i = 0; i < 78 + family; ++i) {
        c.block_table.set({s, i}, c.block_table.get({family, i}));
      }
    }
    check(c);
    const Actual shared = actual_;
    Case plain = c;
    plain.spec.config.auto_cascade = false;
    check(plain);
    if (std::string(backend().name()) == "reference") continue;
    EXPECT_NE(shared.output, actual_.output) << to_string(dtype);
  }
}

QUIRE_ON_EVERY_BACKEND(CascadeTest);

}  // namespace
}  // namespace quire::conformance
