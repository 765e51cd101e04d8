// Batches by name that small cases do not reach: what has failed when a device was full. Samples of
// the rows are compared with float64, every element is scanned, and every bit is the same in the runs
// after the first.
#include <gtest/gtest.h>

#include <chrono>
#include <utility>
#include <vector>

#include "conformance/campaign.h"
#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

struct Heads {
  std::int64_t query, kv, size, size_v;
};

CaseSpec large_spec(const Heads& heads, std::vector<SequenceSpec> sequences) {
  CaseSpec spec;
  spec.seed = 8;
  spec.model_dtype = spec.config.dtype = DType::kBFloat16;
  spec.config.num_heads = heads.query;
  spec.config.num_kv_heads = heads.kv;
  spec.config.head_size = heads.size;
  if (heads.size_v != heads.size) spec.config.head_size_v = heads.size_v;
  spec.config.block_size = 16;
  spec.sequences = std::move(sequences);
  spec.pool_blocks = 64;
  spec.write = false;
  return spec;
}

std::vector<SequenceSpec> equal_decodes(std::int64_t count, std::int64_t keys) {
  return std::vector<SequenceSpec>(static_cast<std::size_t>(count), SequenceSpec{1, keys});
}

// Several prompts among decodes and speculative queries, ragged.
std::vector<SequenceSpec> mixed_batch() {
  std::vector<SequenceSpec> sequences{{300, 900}, {64, 64}};
  Rng rng(3);
  for (int i = 0; i < 100; ++i) {
    const std::int64_t query_len = rng.uniform(1, 6);
    sequences.push_back({query_len, rng.uniform(40, 900)});
  }
  return sequences;
}

class LargeBatchTest : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  const AttentionBackend& backend() const { return *GetParam(); }
  bool is_gpu() const { return backend().device_type() == DeviceType::kCuda; }
  // The float64 loops of "reference" would take minutes.
  bool is_reference() const { return std::string(backend().name()) == "reference"; }

  void check(const CaseSpec& spec, int repeats) {
    const std::string problem = run_sampled(build_case(spec), backend(), repeats);
    EXPECT_EQ(problem, "") << describe(spec);
  }
  int repeats() const { return is_gpu() ? 5 : 1; }
};

// Rows unwritten, and other bits from run to run: the next item's row table was filled before all
// threads had read this item's.
TEST_P(LargeBatchTest, DecodesOfEqualLengthFillTheDevice) {
  if (is_reference()) GTEST_SKIP() << "takes minutes";
  const std::pair<Heads, std::int64_t> batches[] = {{{16, 8, 256, 256}, 96},
                                                    {{32, 8, 128, 128}, 128},
                                                    {{64, 8, 64, 64}, 160},
                                                    {{32, 8, 128, 128}, 500}};
  for (const bool invariant : {true, false}) {
    for (const auto& [heads, count] : batches) {
      CaseSpec spec = large_spec(heads, equal_decodes(count, 600));
      spec.config.batch_invariant = invariant;
      check(spec, repeats());
    }
  }
}

TEST_P(LargeBatchTest, DecodesOfEqualLengthOfEveryCache) {
  if (is_reference()) GTEST_SKIP() << "takes minutes";
  for (const KvCacheDType dtype :
       {KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead, KvCacheDType::kInt4PerTokenHead}) {
    for (const bool fp8_query : {false, true}) {
      if (fp8_query && dtype != KvCacheDType::kFp8E4M3) continue;
      CaseSpec spec = large_spec({32, 8, 128, 128}, equal_decodes(160, 600));
      spec.config.kv_cache_dtype = dtype;
      spec.config.batch_invariant = true;
      if (fp8_query) spec.config.dtype = DType::kFloat8E4M3;
      check(spec, repeats());
    }
  }
}

TEST_P(LargeBatchTest, PromptsAmongDecodes) {
  if (is_reference()) GTEST_SKIP() << "takes minutes";
  for (const bool invariant : {false, true}) {
    for (const std::int64_t window : {0, 300}) {
      CaseSpec spec = large_spec({32, 8, 128, 128}, mixed_batch());
      spec.config.batch_invariant = invariant;
      spec.config.score.soft_cap = window > 0 ? 30.0F : 0.0F;
      if (window > 0) spec.config.mask = Mask::sliding_window(window);
      check(spec, repeats());
    }
  }
}

// Columns of V from 256 on took the maximum of another pass over the keys.
TEST_P(LargeBatchTest, WideHeadsThatShareAPrefix) {
  if (is_reference()) GTEST_SKIP() << "takes minutes";
  for (const std::int64_t announced : {0, 6496}) {
    CaseSpec spec = large_spec({16, 1, 576, 512}, {{1, 6600}, {1, 6600}});
    spec.pool_blocks = 500;
    spec.shared_prefix_len = 6496;
    spec.announced_prefix_len = announced;
    check(spec, repeats());
  }
}

// Two wild row offsets of encoder attention: one wraps a 32-bit index, the other claims keys that do
// not exist, which took minutes to work through.
TEST_P(LargeBatchTest, WildEncoderOffsets) {
  CaseSpec wraps = large_spec({6, 2, 32, 32}, {{2, 2}, {17, 17}, {65, 65}});
  wraps.model_dtype = wraps.config.dtype = DType::kFloat16;
  wraps.config.type = AttentionType::kEncoder;
  wraps.config.mask = Mask::sliding_window_both(40);
  wraps.poison = false;
  CaseSpec claims = large_spec({6, 2, 32, 32}, {{3, 3}});
  claims.config.type = AttentionType::kEncoder;
  claims.config.mask = Mask::full();
  claims.poison = false;
  const auto run = [&](const CaseSpec& spec, const std::vector<std::int32_t>& starts) {
    Case c = build_case(spec);
    c.query_start_loc = make_int32(starts);
    DeviceCase on_device(c, backend());
    const auto start = std::chrono::steady_clock::now();
    const Actual actual = on_device.attend();
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
    EXPECT_EQ(on_device.damage(), "");
    const std::vector<bool> all(static_cast<std::size_t>(c.spec.num_rows()), true);
    EXPECT_EQ(compare_untouched(c, actual, all), "");
  };
  run(wraps, {-2147483647 - 1, 2, 19, 84});
  run(claims, {0, 1 << 30});
}

// What scripts/campaign.sh --sanitize runs under memcheck and racecheck: each fills the device, and
// takes about a minute there.
TEST_P(LargeBatchTest, ForSanitizers) {
  if (!is_gpu()) GTEST_SKIP() << "DecodesOfEqualLengthFillTheDevice and the others do the same";
  for (const bool invariant : {true, false}) {
    CaseSpec decodes = large_spec({32, 8, 128, 128}, equal_decodes(128, 600));
    decodes.config.batch_invariant = invariant;
    check(decodes, 0);
    CaseSpec mixed = large_spec({32, 8, 128, 128}, mixed_batch());
    mixed.config.batch_invariant = invariant;
    check(mixed, 0);
  }
  CaseSpec shared = large_spec({16, 1, 576, 512}, {{1, 6600}, {1, 6600}});
  shared.pool_blocks = 500;
  shared.shared_prefix_len = shared.announced_prefix_len = 6496;
  check(shared, 0);
}

QUIRE_ON_EVERY_BACKEND(LargeBatchTest);

}  // namespace
}  // namespace quire::conformance
