// "NaN and Inf" of semantics.md: keys that nobody sees may hold anything, what a row does see comes
// out of that row.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum class Side : std::uint8_t { kKey, kValue, kBoth };

class NonFiniteTest : public ConformanceTest {
 protected:
  // Whether a row stays clean also of keys that only other rows of its sequence see. Elsewhere such
  // a row may be NaN.
  bool selects() const { return backend().device_type() == DeviceType::kCpu; }

  static bool can_hold(const Tensor& tensor, double x) {
    return std::isnan(x) ? is_float(tensor.dtype)
                         : is_float(tensor.dtype) && tensor.dtype != DType::kFloat8E4M3;
  }

  // Where key j of sequence s lies: its row of key and value, or its block and slot.
  static Sizes place(const Case& c, std::int64_t s, std::int64_t j) {
    if (c.spec.has_cache()) return slot_of(c, s, j);
    const Tensor& starts = c.kv_start_loc ? c.kv_start_loc : c.query_start_loc;
    return {0, static_cast<std::int64_t>(starts.get({s})) + j};
  }

  // Puts x into the head vectors of key j of sequence s, or into their scales.
  static void poison(const Case& c, std::int64_t s, std::int64_t j, Side side, double x,
                     bool scales = false) {
    const Sizes at = place(c, s, j);
    const bool cached = c.spec.has_cache();
    for (const bool is_key : {true, false}) {
      if (side != Side::kBoth && is_key != (side == Side::kKey)) continue;
      const Tensor& rows =
          cached ? (is_key ? c.key_cache : c.value_cache) : (is_key ? c.key : c.value);
      const Tensor& row_scales = is_key ? c.k_scale_cache : c.v_scale_cache;
      for (std::int64_t h = 0; h < c.spec.config.num_kv_heads; ++h) {
        if (row_scales && (scales || !can_hold(rows, x))) {
          row_scales.set({at[0], at[1], h}, x);
          continue;
        }
        const double held = can_hold(rows, x) ? x : kNan;
        for (std::int64_t d = 0; d < rows.shape.back(); ++d) {
          if (cached) {
            rows.set({at[0], at[1], h, d}, held);
          } else {
            rows.set({at[1], h, d}, held);
          }
        }
      }
    }
  }

  static std::int64_t num_keys(const Case& c, std::int64_t s) {
    return static_cast<std::int64_t>(c.spec.sequences[s].seq_len);
  }
  static std::int64_t num_rows(const Case& c, std::int64_t s) {
    return c.spec.sequences[s].query_len;
  }
  static bool seen_by_some_row(const Case& c, std::int64_t s, std::int64_t j) {
    for (std::int64_t i = 0; i < num_rows(c, s); ++i) {
      if (is_visible(c, s, i, j)) return true;
    }
    return false;
  }

  // Rows of sequences of which some row sees something that is not finite.
  static std::vector<bool> rows_near_damage(const Case& c) {
    std::vector<bool> near(c.spec.num_rows(), false);
    std::int64_t first_row = c.spec.leading_rows;
    const Expected expected = literal_attention(c);
    for (std::size_t s = 0; s < c.spec.sequences.size(); ++s) {
      const std::int64_t end = first_row + c.spec.sequences[s].query_len;
      bool damaged = false;
      for (std::int64_t row = first_row; row < end; ++row) {
        for (std::int64_t h = 0; h < expected.num_heads; ++h) {
          const double* out = expected.out(row, h);
          damaged = damaged || !std::all_of(out, out + expected.head_size_v,
                                            [](double x) { return std::isfinite(x); });
        }
      }
      std::fill(near.begin() + first_row, near.begin() + end, damaged);
      first_row = end;
    }
    return near;
  }

  // check(), but where the backend does not select, rows beside a damaged one may be NaN. fp32, bf16
  // or fp16 outputs, contiguous.
  void check_damaged(const Case& c) {
    DeviceCase on_device(c, backend());
    actual_ = on_device.attend();
    expected_ = literal_attention(c);
    EXPECT_EQ(on_device.damage(), "");
    if (!selects()) excuse(c, rows_near_damage(c));
    EXPECT_EQ(compare(c, actual_, expected_), "") << describe(c.spec);
  }

  void excuse(const Case& c, const std::vector<bool>& rows) {
    for (std::int64_t row = 0; row < expected_.num_rows; ++row) {
      if (!rows[row]) continue;
      for (std::int64_t h = 0; h < expected_.num_heads; ++h) {
        for (std::int64_t d = 0; d < expected_.head_size_v; ++d) {
          if (std::isnan(out(c, row, h, d))) expected_.out(row, h)[d] = kNan;
        }
        double& wanted = expected_.lse[h * expected_.num_rows + row];
        if (std::isnan(lse(c, row, h))) wanted = kNan;
      }
    }
  }

  struct Shape {
    std::int64_t query_len, group, head_size;
    KvCacheDType cache;
    DType dtype;
  };

  // Every way through the kernels: rows of a request from 1 to 200, heads that are and are not whole
  // vectors, every cache.
  std::vector<Shape> shapes() const {
    const std::vector<KvCacheDType>& caches = backend().capabilities().kv_cache_dtypes;
    const std::int64_t sizes[] = {16, 64, 40, 128, 256};
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    std::vector<Shape> all;
    for (const std::int64_t query_len : {1, 2, 5, 16, 17, 33, 40, 200}) {
      for (const std::int64_t group : {1, 8}) {
        if (query_len * group > 300) continue;
        for (int variant = 0; variant < 5; ++variant) {
          const std::size_t n = all.size();
          all.push_back(
              {query_len, group, sizes[variant], caches[n % caches.size()], dtypes[n / 5 % 3]});
        }
      }
    }
    return all;
  }

  static CaseSpec spec_of(const Shape& shape, std::vector<SequenceSpec> sequences) {
    CaseSpec spec = small_spec(std::move(sequences));
    spec.config.num_kv_heads = shape.query_len > 20 ? 1 : 2;
    spec.config.num_heads = spec.config.num_kv_heads * shape.group;
    spec.config.head_size = shape.head_size;
    spec.config.block_size = 16;
    spec.config.kv_cache_dtype = shape.cache;
    spec.model_dtype = spec.config.dtype = shape.dtype;
    spec.write = false;
    return spec;
  }
};

// ---- keys that no row of a sequence sees ---------------------------------------------------------

TEST_P(NonFiniteTest, KeysThatNoRowSeesReachNothing) {
  struct Named {
    Mask mask;
    std::int32_t visible_prefix;
  };
  const Named masks[] = {{Mask::sliding_window(20), 0},
                         {Mask::sliding_window(20), 24},  // the dead middle of R-SWA
                         {Mask::sliding_window_both(9), 0},
                         {Mask::chunked(48), 0},
                         {Mask::chunked(32, 1), 7}};
  std::size_t n = 0;
  for (const Shape& shape : shapes()) {
    const Named& named = masks[n++ % std::size(masks)];
    CaseSpec spec = spec_of(shape, {{shape.query_len, shape.query_len + 150}, {1, 90}});
    spec.config.mask = named.mask;
    spec.visible_prefixes = named.visible_prefix > 0;
    spec.sequences[0].visible_prefix = spec.sequences[1].visible_prefix = named.visible_prefix;
    for (const bool scales : {false, true}) {
      if (scales && !is_per_token_head(shape.cache)) continue;
      const Case c = build_case(spec);
      for (std::int64_t s = 0; s < 2; ++s) {
        for (std::int64_t j = 0; j < num_keys(c, s); ++j) {
          if (seen_by_some_row(c, s, j)) continue;
          poison(c, s, j, Side::kBoth, j % 3 == 0 ? kInfinity : kNan, scales);
        }
      }
      check(c);
    }
  }
}

TEST_P(NonFiniteTest, LongSequencesSplitBesideDeadKeys) {
  CaseSpec spec = small_spec({{1, 3000}, {3, 2500}, {1, 40}});
  spec.config.block_size = 16;
  spec.config.mask = Mask::sliding_window(700);
  spec.visible_prefixes = true;
  for (SequenceSpec& sequence : spec.sequences) sequence.visible_prefix = 900;
  spec.write = false;
  for (const std::int64_t head_size : {40, 64}) {
    spec.config.head_size = head_size;
    const Case c = build_case(spec);
    for (std::int64_t s = 0; s < 3; ++s) {
      for (std::int64_t j = 0; j < num_keys(c, s); ++j) {
        if (!seen_by_some_row(c, s, j)) poison(c, s, j, Side::kBoth, kNan);
      }
    }
    check(c);
  }
}

TEST_P(NonFiniteTest, RowsThatAreCutOffSeeNothing) {
  CaseSpec spec = small_spec({{40, 60}});
  spec.cut_rows = 10;
  spec.write = false;
  const Case c = build_case(spec);
  for (std::int64_t j = 50; j < 60; ++j) poison(c, 0, j, Side::kBoth, kNan);
  check(c);
}

TEST_P(NonFiniteTest, KeysOfASharedPrefixThatOnlyOthersSee) {
  CaseSpec spec = small_spec({{1, 300}, {2, 420}, {1, 301}});
  spec.config.block_size = 16;
  spec.shared_prefix_len = spec.announced_prefix_len = 288;
  spec.config.mask = Mask::sliding_window(40);
  spec.write = false;
  for (const std::int64_t head_size : {16, 40, 128}) {
    for (const bool automatic : {false, true}) {
      spec.config.head_size = head_size;
      spec.config.auto_cascade = automatic;
      spec.announced_prefix_len = automatic ? 0 : 288;
      const Case window = build_case(spec);
      poison(window, 0, 270, Side::kBoth, kNan);  // of rows 0 and 3, but not of the second sequence
      check_damaged(window);
      EXPECT_TRUE(std::isnan(out(window, 0, 0, 0)));
      EXPECT_FALSE(std::isnan(out(window, 1, 0, 0)));
      CaseSpec prefixes = spec;
      prefixes.visible_prefixes = true;
      prefixes.sequences[1].visible_prefix = 100;
      const Case dead_middle = build_case(prefixes);
      poison(dead_middle, 1, 60, Side::kValue, kInfinity);  // of the second sequence alone
      check_damaged(dead_middle);
      EXPECT_FALSE(std::isfinite(out(dead_middle, 1, 0, 0)));
      EXPECT_TRUE(std::isfinite(out(dead_middle, 0, 0, 0)));
    }
  }
}

// ---- keys that some rows see, and others do not --------------------------------------------------

TEST_P(NonFiniteTest, RowsThatSeeItAreNanAndNoOtherSequence) {
  std::size_t n = 0;
  for (const Shape& shape : shapes()) {
    CaseSpec spec = spec_of(shape, {{shape.query_len, shape.query_len + 30}, {3, 50}});
    if (n % 3 == 1) spec.config.mask = Mask::sliding_window(25);
    if (n % 3 == 2) spec.config.mask = Mask::chunked(16);
    const Side side = std::array{Side::kKey, Side::kValue, Side::kBoth}[n / 3 % 3];
    ++n;
    for (const double x : {kNan, kInfinity}) {
      // An infinite key gives infinite scores of both signs, or NaN, as rounding has it.
      if (x == kInfinity && side != Side::kValue) continue;
      const Case c = build_case(spec);
      poison(c, 0, shape.query_len + 29, side, x);  // the last row's own key
      poison(c, 0, 29, side, x);                    // in every row's past, or behind its window
      check_damaged(c);
      if (!is_per_token_head(shape.cache)) continue;
      const Case scales = build_case(spec);
      poison(scales, 0, shape.query_len + 29, side, x, true);
      check_damaged(scales);
    }
  }
}

TEST_P(NonFiniteTest, FutureKeysLeaveEarlierRowsClean) {
  if (!selects()) GTEST_SKIP() << "promised on the CPU only";
  for (const Shape& shape : shapes()) {
    if (shape.query_len == 1) continue;
    CaseSpec spec = spec_of(shape, {{shape.query_len, shape.query_len}});
    const Case c = build_case(spec);
    poison(c, 0, shape.query_len - 1, Side::kBoth, kNan);
    check(c);
    EXPECT_TRUE(std::isfinite(out(c, shape.query_len - 2, 0, 0))) << describe(spec);
    EXPECT_TRUE(std::isnan(out(c, shape.query_len - 1, 0, 0))) << describe(spec);
  }
}

TEST_P(NonFiniteTest, EveryKeyOfARowNan) {
  for (const std::int64_t query_len : {1, 40}) {
    for (const bool sinks : {false, true}) {
      CaseSpec spec = small_spec({{query_len, query_len}, {1, 5}});
      spec.config.mask = Mask::sliding_window(1);
      spec.sinks = sinks;
      spec.write = false;
      const Case c = build_case(spec);
      poison(c, 0, query_len - 1, Side::kKey, kNan);
      check_damaged(c);
      EXPECT_TRUE(std::isnan(out(c, query_len - 1, 0, 0)));
      EXPECT_TRUE(std::isnan(lse(c, query_len - 1, 0)));
    }
  }
}

TEST_P(NonFiniteTest, LongSequencesFoldNan) {
  for (const std::int64_t head_size : {40, 64}) {
    for (const std::int64_t bad : {0, 1500, 2999}) {
      CaseSpec spec = small_spec({{1, 3000}, {1, 2000}});
      spec.config.block_size = 16;
      spec.config.head_size = head_size;
      spec.write = false;
      for (const Side side : {Side::kKey, Side::kValue}) {
        const Case c = build_case(spec);
        poison(c, 0, bad, side, kNan);
        check_damaged(c);
        EXPECT_TRUE(std::isnan(out(c, 0, 0, 0)));
      }
    }
  }
}

TEST_P(NonFiniteTest, SharedPrefixFoldsNan) {
  CaseSpec spec = small_spec({{1, 300}, {1, 260}, {3, 290}, {1, 50}});
  spec.config.block_size = 16;
  spec.shared_prefix_len = spec.announced_prefix_len = 256;
  spec.write = false;
  for (const std::int64_t bad : {5, 258}) {  // of all three, of the first alone
    for (const Side side : {Side::kKey, Side::kValue}) {
      const Case c = build_case(spec);
      poison(c, 0, bad, side, kNan);
      check_damaged(c);
    }
  }
}

TEST_P(NonFiniteTest, QueriesBelongToTheirRow) {
  for (const Shape& shape : shapes()) {
    for (const double x : {kNan, kInfinity}) {
      CaseSpec spec = spec_of(shape, {{shape.query_len, shape.query_len + 20}, {2, 33}});
      const Case c = build_case(spec);
      const std::int64_t row = shape.query_len / 2;
      const std::int64_t head = spec.config.num_heads - 1;
      for (std::int64_t d = 0; d < shape.head_size; ++d) c.query.set({row, head, d}, x);
      check(c);  // every backend: rows do not meet
      EXPECT_TRUE(std::isnan(out(c, row, head, 0))) << describe(spec);
      EXPECT_TRUE(std::isnan(lse(c, row, head))) << describe(spec);
    }
  }
}

TEST_P(NonFiniteTest, SoftCapAndAlibiKeepNan) {
  for (const std::int64_t query_len : {1, 40}) {
    CaseSpec spec = small_spec({{query_len, 60}, {1, 9}});
    spec.config.score.soft_cap = 20.0F;
    spec.write = false;
    for (const bool alibi : {false, true}) {
      spec.alibi = alibi;
      const Case c = build_case(spec);
      poison(c, 0, 3, Side::kKey, kNan);
      check_damaged(c);
      EXPECT_TRUE(std::isnan(out(c, 0, 0, 0)));
    }
  }
}

TEST_P(NonFiniteTest, BiasOfMinusInfinityHidesNan) {
  if (!selects()) GTEST_SKIP() << "promised on the CPU only";
  for (const std::int64_t query_len : {4, 40}) {
    for (const std::int64_t head_size : {16, 40}) {
      CaseSpec spec = small_spec({{query_len, query_len + 6}});
      spec.config.head_size = head_size;
      spec.qq_bias_size = query_len;
      spec.write = false;
      for (const Mask& mask : {Mask(), Mask::full()}) {
        spec.config.mask = mask;
        const Case c = build_case(spec);
        for (std::int64_t i = 0; i < query_len; ++i) {
          if (i != 1) c.qq_bias.set({i, 1}, -kInfinity);
        }
        poison(c, 0, 7, Side::kBoth, kNan);  // of row 1; no other row may see it
        check(c);
        EXPECT_TRUE(std::isnan(out(c, 1, 0, 0)));
        EXPECT_TRUE(std::isfinite(out(c, query_len - 1, 0, 0)));
      }
    }
  }
}

TEST_P(NonFiniteTest, EncodersWithoutACache) {
  for (const std::int64_t len : {5, 40, 200}) {
    CaseSpec spec = small_spec({{len, len}, {7, 7}});
    spec.config.type = AttentionType::kEncoderOnly;
    spec.config.mask = Mask::sliding_window_both(6);
    const Case c = build_case(spec);
    poison(c, 0, len - 1, Side::kBoth, kNan);
    check_damaged(c);
    EXPECT_TRUE(std::isnan(out(c, len - 1, 0, 0)));
    EXPECT_TRUE(std::isfinite(out(c, len, 0, 0)));
  }
}

QUIRE_ON_EVERY_BACKEND(NonFiniteTest);

}  // namespace
}  // namespace quire::conformance
