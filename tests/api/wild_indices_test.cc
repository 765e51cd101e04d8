// Index tensors full of rubbish: never an access outside the caller's buffers. Guard zones around
// every buffer catch stray writes; the address sanitizer's build catches stray reads as well.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;
using conformance::Rng;

std::int32_t wild_int32(Rng* rng) {
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  switch (rng->uniform(0, 3)) {
    case 0: return rng->pick({kMin, kMin + 1, -1, 0, 1, kMax - 1, kMax});
    case 1: return static_cast<std::int32_t>(rng->uniform(-20, 60));
    case 2: return static_cast<std::int32_t>(rng->uniform(0, 8));
    default: return static_cast<std::int32_t>(rng->next());
  }
}

void scribble(const TensorView& view, double chance, Rng* rng) {
  if (!view) return;
  const std::int64_t columns = view.ndim > 1 ? view.shape[view.ndim - 1] : 1;
  const std::int64_t rows = view.num_elements() / std::max<std::int64_t>(columns, 1);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < columns; ++i) {
      if (!rng->chance(chance)) continue;
      // 1-D, a 2-D table with padded rows, or contiguous.
      const std::int64_t at = view.ndim == 2 ? r * view.strides[0] + i : r * columns + i;
      static_cast<std::int32_t*>(view.data)[at] = wild_int32(rng);
    }
  }
}

CaseSpec wild_spec(Rng* rng) {
  CaseSpec spec = Call::default_spec();
  spec.seed = rng->next();
  spec.config.type =
      rng->pick({AttentionType::kDecoder, AttentionType::kDecoder, AttentionType::kDecoder,
                 AttentionType::kEncoder, AttentionType::kEncoderDecoder});
  spec.kv_start_loc = !spec.has_cache() && rng->chance(0.5);
  spec.config.block_size = rng->pick<std::int64_t>({1, 4, 16});
  const std::int64_t num_seqs = rng->uniform(1, 6);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t query_len = rng->uniform(0, 12);
    const bool own = spec.has_cache() || spec.kv_start_loc;
    spec.sequences.push_back({query_len, query_len + (own ? rng->uniform(0, 150) : 0)});
  }
  if (spec.config.type == AttentionType::kDecoder) {
    spec.config.mask.causal = rng->chance(0.7);
    spec.ranges = rng->chance(0.3);
    spec.visible_prefixes = rng->chance(0.3);
    spec.qq_bias_size = rng->chance(0.3) ? 5 : 0;
  }
  if (rng->chance(0.5)) {
    spec.config.mask.window =
        rng->pick({WindowKind::kLeft, WindowKind::kBoth, WindowKind::kChunked});
    spec.config.mask.window_size =
        rng->pick<std::int64_t>({1, 7, 100, (std::int64_t{1} << 31) - 1});
    spec.config.mask.chunk_lookback = rng->pick<std::int64_t>({0, 3, (std::int64_t{1} << 31) - 1});
  }
  spec.config.kv_cache_dtype =
      rng->pick({KvCacheDType::kAuto, KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead});
  if (!spec.has_cache()) spec.config.kv_cache_dtype = KvCacheDType::kAuto;
  spec.config.batch_invariant = rng->chance(0.2);
  spec.announced_prefix_len = rng->chance(0.3) ? rng->uniform(1, 300) : 0;
  spec.alibi = rng->chance(0.2);
  spec.block_scale = rng->chance(0.2);
  if (spec.block_scale) spec.output_dtype = DType::kFloat8E4M3;
  return spec;
}

void run_wild_case(std::uint64_t index) {
  Rng rng(99, index);
  const CaseSpec spec = wild_spec(&rng);
  Call call(spec);
  const double chance = rng.pick({0.05, 0.3, 1.0});
  for (TensorView* view :
       {&call.batch.query_start_loc, &call.batch.seq_lens, &call.batch.block_table,
        &call.batch.mm_prefix_range, &call.batch.visible_prefix_lens, &call.batch.kv_start_loc}) {
    if (rng.chance(0.5)) scribble(*view, chance, &rng);
  }
  call.run();
  // The index tensors were changed by the test: compare against what it wrote.
  const conformance::Case& c = call.tensors;
  std::vector<const conformance::Tensor*> changed{
      &c.output,      &c.lse,         &c.output_block_scale, &c.query_start_loc,
      &c.seq_lens,    &c.block_table, &c.mm_prefix_range,    &c.visible_prefix_lens,
      &c.kv_start_loc};
  EXPECT_EQ(call.on_device.buffers().damage(changed), "") << index << ": " << describe(spec);
}

TEST(WildIndices, NeverLeaveTheBuffers) {
  const char* text = std::getenv("QUIRE_TEST_CASES");
  const std::int64_t count = text != nullptr ? std::strtoll(text, nullptr, 10) : 1500;
  for (std::int64_t index = 0; index < count; ++index) {
    run_wild_case(static_cast<std::uint64_t>(index));
    if (testing::Test::HasFailure()) return;
  }
}

TEST(WildIndices, SlotsNeverLeaveTheCache) {
  for (std::uint64_t index = 0; index < 200; ++index) {
    Rng rng(7, index);
    CaseSpec spec = Call::default_spec();
    spec.config.kv_cache_dtype =
        rng.pick({KvCacheDType::kAuto, KvCacheDType::kFp8E5M2, KvCacheDType::kFp8E4M3PerTokenHead});
    Call call(spec);
    auto* slots = static_cast<std::int64_t*>(call.batch.slot_mapping.data);
    for (std::int64_t i = 0; i < call.batch.slot_mapping.shape[0]; ++i) {
      slots[i] = rng.chance(0.5) ? static_cast<std::int64_t>(rng.next()) : rng.uniform(-50, 500);
    }
    const conformance::Case& c = call.tensors;
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    write_kv_cache(buffers.view(c.key), buffers.view(c.value), call.args.kv_cache,
                   call.batch.slot_mapping);
    EXPECT_EQ(buffers.damage({&c.key_cache, &c.value_cache, &c.k_scale_cache, &c.v_scale_cache,
                              &c.slot_mapping}),
              "");
  }
}

// Sequences end at the table's width: the result is that of the shorter sequence at the same
// positions, and nothing past the table is read.
TEST(WildIndices, TablesTooNarrowForTheirSequences) {
  Call call;
  call.batch.block_table.shape[1] = 1;
  call.run();
  EXPECT_EQ(call.on_device.buffers().damage({&call.tensors.output, &call.tensors.lse}), "");
}

}  // namespace
}  // namespace quire
