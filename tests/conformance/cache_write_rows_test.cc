// write_kv_cache() of several heads and many tokens, to the bit: layouts, alignments, head sizes and
// types decide between a backend's ways of moving rows. Tokens whose slots are negative or out of
// range hold NaN (build_case).
#include <gtest/gtest.h>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr KvCacheDType kKinds[] = {
    KvCacheDType::kAuto,
    KvCacheDType::kFloat16,
    KvCacheDType::kBFloat16,
    KvCacheDType::kFloat32,
    KvCacheDType::kFp8E4M3,
    KvCacheDType::kFp8E5M2,
    KvCacheDType::kInt8PerTokenHead,
    KvCacheDType::kFp8E4M3PerTokenHead,
    KvCacheDType::kInt4PerTokenHead,
};
constexpr CacheLayout kLayouts[] = {CacheLayout::kNhd, CacheLayout::kHnd, CacheLayout::kPacked,
                                    CacheLayout::kPackedNhd, CacheLayout::kSeparate};

struct HeadSizes {
  std::int64_t k;
  std::int64_t v;
};
// Multiples of 16, of 8, of 4 and of nothing; rows of less than one and of several pieces a lane.
constexpr HeadSizes kSizes[] = {{128, 128}, {64, 64}, {80, 80},   {72, 24},  {8, 8},
                                {36, 36},   {41, 19}, {576, 512}, {192, 128}};

class CacheWriteRows : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  static CaseSpec spec_of(DType model, KvCacheDType kind, HeadSizes sizes) {
    CaseSpec spec;
    spec.seed = 23;
    spec.model_dtype = spec.config.dtype = model;
    spec.config.num_heads = spec.config.num_kv_heads = 3;
    const std::int64_t unit = kind == KvCacheDType::kInt4PerTokenHead ? 2 : 1;
    spec.config.head_size = (sizes.k + unit - 1) / unit * unit;
    spec.config.head_size_v = (sizes.v + unit - 1) / unit * unit;
    spec.config.block_size = 16;
    spec.config.kv_cache_dtype = kind;
    spec.sequences = {{9, 9}, {2, 21}};
    spec.padded_rows = 3;
    return spec;
  }
  static void check(const CaseSpec& spec) {
    const Case c = build_case(spec);
    EXPECT_EQ(DeviceCase(c, *GetParam()).write_cache(), "") << describe(spec);
  }
};

TEST_P(CacheWriteRows, EveryLayoutAndType) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const KvCacheDType kind : kKinds) {
      for (const HeadSizes sizes : kSizes) {
        for (const CacheLayout layout : kLayouts) {
          CaseSpec spec = spec_of(model, kind, sizes);
          spec.layout = layout;
          spec.scales_in_memory = layout == CacheLayout::kHnd;
          check(spec);
        }
      }
    }
  }
}

TEST_P(CacheWriteRows, OddStridesAndUnalignedBases) {
  for (const DType model : {DType::kBFloat16, DType::kFloat32}) {
    for (const KvCacheDType kind : kKinds) {
      for (const CacheLayout layout : kLayouts) {
        for (const std::int64_t offset : {1, 2, 4, 8}) {
          CaseSpec spec = spec_of(model, kind, {128, 128});
          spec.layout = layout;
          spec.storage_offset = offset;
          spec.page_padding = offset % 4;
          spec.strided_query = offset < 4;
          check(spec);
        }
      }
    }
  }
}

TEST_P(CacheWriteRows, ScalesBehindEachRow) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const KvCacheDType kind :
         {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead,
          KvCacheDType::kInt4PerTokenHead}) {
      for (const HeadSizes sizes : kSizes) {
        for (const CacheLayout layout : kLayouts) {
          CaseSpec spec = spec_of(model, kind, sizes);
          spec.layout = layout;
          spec.inline_scales = true;
          check(spec);
        }
      }
    }
  }
}

TEST_P(CacheWriteRows, AnyBlockSizeAndNumberOfHeads) {
  for (const KvCacheDType kind :
       {KvCacheDType::kAuto, KvCacheDType::kInt8PerTokenHead, KvCacheDType::kInt4PerTokenHead}) {
    for (const std::int64_t block_size : {1, 3, 7, 16, 24, 100, 1024}) {
      for (const std::int64_t heads : {1, 2, 5, 8, 17}) {
        CaseSpec spec = spec_of(DType::kBFloat16, kind, {32, 32});
        spec.config.block_size = block_size;
        spec.config.num_heads = spec.config.num_kv_heads = heads;
        check(spec);
      }
    }
  }
}

// Rows longer than a warp of lanes holds, and than a warp.
TEST_P(CacheWriteRows, LongRows) {
  for (const KvCacheDType kind :
       {KvCacheDType::kAuto, KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E4M3PerTokenHead}) {
    for (const std::int64_t size : {1024, 1032, 2048, 4096}) {
      check(spec_of(DType::kBFloat16, kind, {size, 128}));
      check(spec_of(DType::kFloat32, kind, {128, size}));
    }
  }
}

TEST_P(CacheWriteRows, ThousandsOfTokens) {
  for (const KvCacheDType kind : kKinds) {
    CaseSpec spec = spec_of(DType::kBFloat16, kind, {64, 64});
    spec.sequences.assign(100, {47, 51});
    spec.leading_rows = 100;
    spec.layout = kind == KvCacheDType::kFp8E4M3 ? CacheLayout::kPacked : CacheLayout::kNhd;
    const Case c = build_case(spec);
    ASSERT_GT(c.slot_mapping.shape[0], 4096);
    EXPECT_EQ(DeviceCase(c, *GetParam()).write_cache(), "") << describe(spec);
  }
}

QUIRE_ON_EVERY_DEVICE(CacheWriteRows);

}  // namespace
}  // namespace quire::conformance
