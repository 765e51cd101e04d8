// "Edges that every backend must get right" of semantics.md, and the forms of outputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class EdgeTest : public ConformanceTest {};

TEST_P(EdgeTest, RowThatSeesNothingIsZeroWithLseMinusInfinity) {
  const Case c = build_case(small_spec({{2, 0}, {1, 5}}));
  check(c);
  for (std::int64_t h = 0; h < 4; ++h) {
    EXPECT_EQ(lse(c, 0, h), -kInfinity);
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(out(c, 0, h, d), 0.0);
  }
}

TEST_P(EdgeTest, SlotsPastSeqLenMayHoldNanOrInfinity) {
  for (const std::int64_t block_size : {1, 4, 16, 64}) {
    for (const std::int64_t seq_len : {1, 3, 4, 5, 33}) {
      CaseSpec spec = small_spec({{1, seq_len}, {std::min<std::int64_t>(seq_len, 9), seq_len}});
      spec.config.block_size = block_size;
      check(spec);  // poisons with NaN, for some seeds with infinity
      spec.seed = 8;
      check(spec);
    }
  }
}

TEST_P(EdgeTest, SlotsPastSeqLenOfEveryCacheDType) {
  for (const KvCacheDType dtype : backend().capabilities().kv_cache_dtypes) {
    for (const std::int64_t query_len : {1, 12}) {
      CaseSpec spec = small_spec({{query_len, 13}, {query_len, 30}});
      spec.config.kv_cache_dtype = dtype;
      spec.model_dtype = spec.config.dtype = DType::kBFloat16;
      check(spec);
    }
  }
}

TEST_P(EdgeTest, MaskedKeysOfOtherRowsMayNotLeakInfinities) {
  // Keys inside seq_len that a window hides hold ordinary numbers; those of freed blocks may not:
  // a window layer's manager frees blocks that no query can see any more.
  CaseSpec spec = small_spec({{2, 40}});
  spec.config.mask = Mask::sliding_window(6);
  spec.write = false;
  const Case c = build_case(spec);
  for (std::int64_t j = 0; j < 32; ++j) {  // rows are at 38 and 39: they see 33 and later
    const Sizes at = slot_of(c, 0, j);
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t d = 0; d < 16; ++d) {
        c.key_cache.set({at[0], at[1], h, d}, std::nan(""));
        c.value_cache.set({at[0], at[1], h, d}, kInfinity);
      }
    }
  }
  DeviceCase on_device(c, backend());
  const Actual with_garbage = on_device.attend();
  const Case clean = build_case(spec);
  EXPECT_EQ(compare(clean, with_garbage, literal_attention(clean)), "");
}

TEST_P(EdgeTest, EmptyQueriesAndEmptySequences) {
  check(small_spec({{0, 10}, {3, 10}, {0, 0}, {1, 5}, {0, 3}}));
  check(small_spec({{0, 0}}));
  check(small_spec({{0, 10}, {0, 0}}));
}

TEST_P(EdgeTest, EmptyBatchTouchesNothing) {
  CaseSpec spec = small_spec();
  spec.sequences.clear();
  check(spec);
  spec.padded_rows = 3;
  check(spec);
  spec.padded_sequences = 2;
  check(spec);
}

TEST_P(EdgeTest, RowsPastNumActualTokensAreNotTouched) {
  CaseSpec spec = small_spec();
  spec.padded_rows = 5;
  spec.padded_sequences = 3;
  check(spec);
  spec.cut_rows = 2;  // inside the last sequences
  check(spec);
}

TEST_P(EdgeTest, RowsOfNoSequenceAreNotTouched) {
  CaseSpec spec = small_spec();
  spec.leading_rows = 2;
  check(spec);
  spec.leading_rows = 0;
  spec.padded_rows = 4;
  spec.counted_rows = 3;
  check(spec);
}

// Whether or not padding makes the lengths look equal.
TEST_P(EdgeTest, LongestQuerySaidByTheCaller) {
  CaseSpec spec = small_spec();
  for (const SequenceSpec& sequence : spec.sequences) {
    spec.max_query_len = std::max(spec.max_query_len, sequence.query_len);
  }
  check(spec);
  const auto num_seqs = static_cast<std::int64_t>(spec.sequences.size());
  spec.padded_rows = spec.counted_rows = num_seqs * spec.max_query_len - spec.num_rows();
  check(spec);
  spec = small_spec({{4, 300}, {4, 4}, {4, 77}});
  spec.max_query_len = 4;
  check(spec);
}

TEST_P(EdgeTest, BlocksThatAreNotThereReadAsZeros) {
  CaseSpec spec = small_spec({{1, 30}, {5, 17}});
  spec.wild_blocks = 3;
  check(spec);
  for (const KvCacheDType dtype :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kInt4PerTokenHead}) {
    spec.config.kv_cache_dtype = dtype;
    check(spec);
  }
}

// Keys of a block that is not there have score 0. Where all others are far below, their weights must
// not underflow in 16 bits beside it: decode, prefill, and a block that every row sees all of.
TEST_P(EdgeTest, WeightsBesideABlockThatIsNotThere) {
  for (const std::int64_t query_len : {1, 40}) {
    for (const std::int64_t head_size : {64, 128, 256}) {
      CaseSpec spec = small_spec({{query_len, 600}});
      spec.model_dtype = spec.config.dtype = DType::kFloat16;
      spec.config.head_size = head_size;
      spec.config.score.softmax_scale = 1;
      spec.config.block_size = 16;
      spec.write = false;
      const Case c = build_case(spec);
      for (std::int64_t i = 0; i < query_len; ++i) {
        for (std::int64_t h = 0; h < 4; ++h) {
          for (std::int64_t d = 0; d < head_size; ++d) c.query.set({i, h, d}, d == 0 ? 4 : 0);
        }
      }
      for (std::int64_t j = 0; j < 600; ++j) {
        const Sizes at = slot_of(c, 0, j);
        for (std::int64_t h = 0; h < 2; ++h) {
          c.key_cache.set({at[0], at[1], h, 0}, -4.25);
          for (std::int64_t d = 0; d < head_size; ++d) {
            c.value_cache.set({at[0], at[1], h, d}, 2000);
          }
        }
      }
      c.block_table.set({0, 18}, -1);
      check(c);
    }
  }
}

TEST_P(EdgeTest, BlockSizesThatAreNoPowersOfTwo) {
  for (const std::int64_t block_size : {1, 2, 3, 7, 17, 48, 100, 1000}) {
    CaseSpec spec = small_spec({{1, 130}, {9, 20}});
    spec.config.block_size = block_size;
    check(spec);
  }
}

TEST_P(EdgeTest, CachesOfEveryLayout) {
  for (const CacheLayout layout : {CacheLayout::kNhd, CacheLayout::kHnd, CacheLayout::kPacked,
                                   CacheLayout::kPackedNhd, CacheLayout::kSeparate}) {
    for (const KvCacheDType dtype : backend().capabilities().kv_cache_dtypes) {
      CaseSpec spec = small_spec();
      spec.layout = layout;
      spec.config.kv_cache_dtype = dtype;
      check(spec);
      spec.page_padding = 1;
      spec.storage_offset = 3;
      spec.strided_query = true;
      spec.inline_scales = is_per_token_head(dtype);
      check(spec);
    }
  }
}

TEST_P(EdgeTest, QueriesInFp8) {
  for (const KvCacheDType cache : {KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E5M2}) {
    for (const DType output : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      CaseSpec spec = small_spec({{1, 40}, {12, 30}});
      spec.model_dtype = DType::kBFloat16;
      spec.config.dtype = DType::kFloat8E4M3;
      spec.config.kv_cache_dtype = cache;
      spec.output_dtype = output;
      spec.scales_in_memory = output == DType::kFloat32;
      check(spec);
    }
  }
}

TEST_P(EdgeTest, OutputsOfEveryForm) {
  for (const DType dtype : backend().capabilities().output_dtypes) {
    for (const bool three_dimensions : {false, true}) {
      CaseSpec spec = small_spec({{1, 40}, {12, 30}});
      spec.output_dtype = dtype;
      spec.output_3d = three_dimensions;
      spec.output_strided = true;
      check(spec);
      spec.lse = false;
      check(spec);
    }
  }
}

TEST_P(EdgeTest, Fp8OutputSaturates) {
  CaseSpec spec = small_spec();
  spec.output_dtype = DType::kFloat8E4M3;
  spec.output_scale = 1e-4F;
  const Case c = build_case(spec);
  check(c);
  EXPECT_EQ(std::fabs(out(c, 0, 0, 0)), 448.0);
}

TEST_P(EdgeTest, BlockScaleOutputWithAPartialLastGroup) {
  for (const std::int64_t head_size : {16, 32, 40, 72, 128}) {
    CaseSpec spec = small_spec({{1, 40}, {12, 30}});
    spec.config.head_size = head_size;  // rows of 4 * head_size: groups across heads
    spec.output_dtype = DType::kFloat8E4M3;
    spec.block_scale = true;
    spec.output_3d = head_size == 40;
    spec.output_strided = head_size == 72;
    check(spec);
  }
}

TEST_P(EdgeTest, BlockScaleOfARowThatSeesNothing) {
  CaseSpec spec = small_spec({{2, 0}, {1, 4}});
  spec.output_dtype = DType::kFloat8E4M3;
  spec.block_scale = true;
  check(spec);
}

TEST_P(EdgeTest, LongSequencesAreSplitAndMerged) {
  CaseSpec spec = small_spec({{1, 6000}});
  spec.config.num_heads = 2;
  spec.config.num_kv_heads = 1;
  spec.config.block_size = 16;
  check(spec);
  spec.sequences = {{4, 3000}, {1, 10}, {1, 2500}};
  check(spec);
  spec.config.mask = Mask::sliding_window(2000);
  check(spec);
}

TEST_P(EdgeTest, PrefillLongerThanATile) {
  CaseSpec spec = small_spec({{300, 300}, {200, 500}});
  spec.config.num_heads = 2;
  spec.config.num_kv_heads = 1;
  spec.config.block_size = 16;
  check(spec);
}

TEST_P(EdgeTest, SharedPrefixAnnouncedAndFound) {
  for (const std::int64_t announced : {0, 256, 270, 300, 100}) {
    for (const bool automatic : {false, true}) {
      CaseSpec spec = small_spec({{1, 300}, {1, 260}, {3, 290}, {1, 257}});
      spec.config.block_size = 16;
      spec.shared_prefix_len = 256;
      spec.announced_prefix_len = announced;
      spec.config.auto_cascade = automatic;
      spec.sinks = true;
      check(spec);
      spec.loner = 1;  // does not keep the promise
      check(spec);
      spec.loner = 0;
      check(spec);
    }
  }
}

TEST_P(EdgeTest, SharedPrefixReachesIntoThisStepsTokens) {
  CaseSpec spec = small_spec({{60, 160}, {3, 160}, {160, 160}});
  spec.config.block_size = 16;
  spec.shared_prefix_len = spec.announced_prefix_len = 160;
  check(spec);
}

TEST_P(EdgeTest, SharedPrefixUnderMasks) {
  CaseSpec spec = small_spec({{1, 300}, {2, 310}, {1, 420}});
  spec.config.block_size = 16;
  spec.shared_prefix_len = spec.announced_prefix_len = 288;
  spec.config.mask = Mask::sliding_window(40);
  check(spec);
  spec.visible_prefixes = true;
  spec.sequences[1].visible_prefix = 100;
  check(spec);
  spec.config.mask = Mask::chunked(64, 1);
  check(spec);
}

QUIRE_ON_EVERY_BACKEND(EdgeTest);

}  // namespace
}  // namespace quire::conformance
