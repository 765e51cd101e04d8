// How a score is made, and the softmax over scores: one edge of semantics.md a test.
#include <gtest/gtest.h>

#include <limits>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class ScoreTest : public ConformanceTest {};

TEST_P(ScoreTest, DefaultScaleIsOneOverRootOfHeadSize) {
  CaseSpec spec = small_spec();
  spec.config.score.softmax_scale = 0.0F;
  check(spec);
  const Expected by_default = expected_;
  spec.config.score.softmax_scale = 0.25F;  // head_size is 16
  check(spec);
  EXPECT_EQ(by_default.output, expected_.output);
}

TEST_P(ScoreTest, NegativeScale) {
  CaseSpec spec = small_spec();
  spec.config.score.softmax_scale = -0.5F;
  check(spec);
}

TEST_P(ScoreTest, SoftCapComesBeforeAlibiAndBias) {
  CaseSpec spec = small_spec({{4, 12}});
  spec.data = Data::kPeaked;
  spec.config.score.soft_cap = 1.5F;
  check(spec);
  spec.alibi = true;
  spec.qq_bias_size = 4;
  check(spec);
}

TEST_P(ScoreTest, AlibiCountsDistance) {
  CaseSpec spec = small_spec({{4, 12}, {1, 30}});
  spec.alibi = true;
  check(spec);
  spec.config.mask = Mask::full();  // keys ahead gain
  check(spec);
}

TEST_P(ScoreTest, SquareRootAlibiIsZeroAhead) {
  CaseSpec spec = small_spec({{4, 12}, {1, 30}});
  spec.alibi = true;
  spec.config.score.alibi_sqrt = true;
  check(spec);
  spec.config.mask = Mask::full();
  check(spec);
}

TEST_P(ScoreTest, QueryQueryBiasReachesThisStepsKeysOnly) {
  CaseSpec spec = small_spec({{5, 12}, {5, 5}, {1, 9}});
  spec.qq_bias_size = 5;
  check(spec);
  spec.qq_bias_per_sequence = true;
  check(spec);
}

TEST_P(ScoreTest, QueryQueryBiasSmallerThanTheQuery) {
  CaseSpec spec = small_spec({{5, 12}, {7, 7}});
  spec.qq_bias_size = 3;
  check(spec);
}

TEST_P(ScoreTest, QueryQueryBiasOfMinusInfinityHidesAKey) {
  CaseSpec spec = small_spec({{4, 9}});
  spec.qq_bias_size = 4;
  Case c = build_case(spec);
  for (std::int64_t n = 0; n < 4; ++n) c.qq_bias.set({2, n}, n == 1 ? 0 : -kInfinity);
  check(c);
  // A row whose own keys are all hidden, and that has no others.
  CaseSpec alone = small_spec({{2, 2}});
  alone.qq_bias_size = 2;
  c = build_case(alone);
  for (std::int64_t n = 0; n < 2; ++n) c.qq_bias.set({1, n}, -kInfinity);
  check(c);
  EXPECT_EQ(lse(c, 1, 0), -kInfinity);
  EXPECT_EQ(out(c, 1, 0, 0), 0.0);
}

TEST_P(ScoreTest, SinkTakesPartInMaximumAndDenominator) {
  CaseSpec spec = small_spec({{3, 10}, {2, 40}});
  spec.sinks = true;
  check(spec);
  Case c = build_case(spec);
  for (std::int64_t h = 0; h < 4; ++h) c.sinks.set({h}, h % 2 == 0 ? 60.0 : -60.0);
  check(c);
  EXPECT_NEAR(lse(c, 0, 0), 60.0, 1e-5);
}

TEST_P(ScoreTest, SinkOfMinusInfinityIsNoSink) {
  CaseSpec spec = small_spec({{1, 10}});
  spec.sinks = true;
  Case c = build_case(spec);
  for (std::int64_t h = 0; h < 4; ++h) c.sinks.set({h}, -kInfinity);
  check(c);
}

TEST_P(ScoreTest, SinkOfARowThatSeesNothingIsItsLse) {
  CaseSpec spec = small_spec({{2, 0}});
  spec.sinks = true;
  const Case c = build_case(spec);
  check(c);
  for (std::int64_t h = 0; h < 4; ++h) {
    EXPECT_EQ(lse(c, 1, h), c.sinks.get({h}));
    EXPECT_EQ(out(c, 1, h, 3), 0.0);
  }
}

TEST_P(ScoreTest, SinkCountsOnceWhereKeysAreSplit) {
  CaseSpec spec = small_spec({{1, 5000}});
  spec.config.num_heads = 2;
  spec.config.num_kv_heads = 1;
  spec.config.block_size = 16;
  spec.sinks = true;
  check(spec);
}

TEST_P(ScoreTest, LargestFiniteScoresDoNotOverflow) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const std::int64_t query_len : {1, 40}) {
      CaseSpec spec = small_spec({{query_len, 150}, {query_len, 41}});
      spec.model_dtype = spec.config.dtype = dtype;
      spec.data = Data::kExtreme;
      spec.config.score.softmax_scale = 1.0F;
      check(spec);
    }
  }
}

TEST_P(ScoreTest, AllScoresAtTheLowestFiniteValue) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    CaseSpec spec = small_spec({{2, 20}});
    spec.model_dtype = spec.config.dtype = dtype;
    spec.data = Data::kExtreme;
    spec.config.score.softmax_scale = -1.0F;
    check(spec);
  }
}

// Scores of the first query heads that rise by 32 from each 128 keys to the next, towards the
// first key of the one sequence and the last of the other: kernels go through keys in either order,
// and some expect that a row's maximum seldom moves far.
Case rising_case(std::int64_t head_size, DType dtype, std::int64_t num_rising) {
  CaseSpec spec = small_spec({{40, 600}, {40, 600}});
  spec.model_dtype = spec.config.dtype = dtype;
  spec.config.head_size = head_size;
  spec.config.block_size = 16;
  spec.config.score.softmax_scale = 0.1F;
  spec.write = false;
  Case c = build_case(spec);
  for (std::int64_t t = 0; t < 80; ++t) {
    for (std::int64_t h = 0; h < 4; ++h) c.query.set({t, h, 0}, h < num_rising ? 10.0 : 0.0);
  }
  for (std::int64_t s = 0; s < 2; ++s) {
    for (std::int64_t j = 0; j < 600; ++j) {
      const double score = static_cast<double>(s == 0 ? 600 - j : j) / 4;
      const Sizes slot = slot_of(c, s, j);
      for (std::int64_t h = 0; h < 2; ++h) c.key_cache.set({slot[0], slot[1], h, 0}, score);
    }
  }
  return c;
}

TEST_P(ScoreTest, MaximaThatRiseFromTileToTile) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t head_size : {64, 128, 256}) check(rising_case(head_size, dtype, 4));
  }
}

TEST_P(ScoreTest, RowsDoNotFeelTheirNeighboursMaxima) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t head_size : {64, 128, 256}) {
      std::vector<std::vector<double>> outputs;
      for (const std::int64_t num_rising : {0, 1, 3}) {
        const Case c = rising_case(head_size, dtype, num_rising);
        check(c);
        std::vector<double>& output = outputs.emplace_back();
        for (std::int64_t t = 0; t < 80; ++t) {
          for (std::int64_t d = 0; d < head_size; ++d) output.push_back(out(c, t, 3, d));
        }
      }
      EXPECT_EQ(outputs[0], outputs[1]) << head_size;
      EXPECT_EQ(outputs[0], outputs[2]) << head_size;
    }
  }
}

TEST_P(ScoreTest, GroupsOfEverySize) {
  for (const std::int64_t group : {1, 2, 3, 5, 6, 7, 8, 12, 16, 71}) {
    CaseSpec spec = small_spec({{1, 40}, {3, 9}});
    spec.config.num_kv_heads = 2;
    spec.config.num_heads = 2 * group;
    check(spec);
  }
}

TEST_P(ScoreTest, HeadSizesOfEveryKind) {
  for (const std::int64_t size : {8, 9, 15, 16, 17, 20, 72, 80, 96, 112, 256, 575, 576}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      CaseSpec spec = small_spec({{1, 20}, {9, 21}});
      spec.model_dtype = spec.config.dtype = dtype;
      spec.config.head_size = size;
      check(spec);
    }
  }
}

TEST_P(ScoreTest, ValueHeadSizeOfItsOwn) {
  for (const auto& [head_size, head_size_v] :
       {std::pair{192, 128}, {576, 512}, {8, 576}, {576, 8}, {33, 17}}) {
    CaseSpec spec = small_spec({{1, 20}, {9, 21}});
    spec.config.head_size = head_size;
    spec.config.head_size_v = head_size_v;
    for (const CacheLayout layout :
         {CacheLayout::kPacked, CacheLayout::kSeparate, CacheLayout::kPackedNhd}) {
      spec.layout = layout;
      check(spec);
    }
  }
}

QUIRE_ON_EVERY_BACKEND(ScoreTest);

}  // namespace
}  // namespace quire::conformance
