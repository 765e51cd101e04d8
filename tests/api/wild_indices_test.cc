// Index tensors full of rubbish: never an access outside the caller's buffers. Guard zones around
// every buffer catch stray writes; the address sanitizer's build catches stray reads as well.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::Case;
using conformance::CaseSpec;
using conformance::Rng;
using conformance::Tensor;

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

void scribble(const Tensor& tensor, double chance, Rng* rng) {
  if (!tensor) return;
  tensor.for_each_element([&](std::int64_t offset) {
    if (!rng->chance(chance)) return;
    const std::int32_t wild = wild_int32(rng);
    std::memcpy(tensor.buffer->bytes.data() + offset, &wild, sizeof wild);
  });
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
  spec.config.mask.clamp_ranges = rng->chance(0.3);
  spec.kv_offsets = rng->chance(0.2);
  spec.kv_strides = rng->chance(0.2);
  spec.q_offsets = rng->chance(0.2);
  if (rng->chance(0.5)) {
    spec.config.mask.window =
        rng->pick({WindowKind::kLeft, WindowKind::kBoth, WindowKind::kChunked});
    spec.config.mask.window_size =
        rng->pick<std::int64_t>({1, 7, 100, (std::int64_t{1} << 31) - 1});
    spec.config.mask.chunk_lookback = rng->pick<std::int64_t>({0, 3, (std::int64_t{1} << 31) - 1});
    if (spec.config.mask.window == WindowKind::kChunked) spec.config.mask.clamp_ranges = false;
  }
  spec.config.kv_cache_dtype =
      rng->pick({KvCacheDType::kAuto, KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead,
                 KvCacheDType::kInt4PerTokenHead});
  if (!spec.has_cache()) spec.config.kv_cache_dtype = KvCacheDType::kAuto;
  spec.config.batch_invariant = rng->chance(0.2);
  spec.announced_prefix_len = rng->chance(0.3) ? rng->uniform(1, 300) : 0;
  spec.alibi = rng->chance(0.2);
  spec.block_scale = rng->chance(0.2);
  if (spec.block_scale) spec.output_dtype = DType::kFloat8E4M3;
  return spec;
}

void run_wild_case(const AttentionBackend& backend, std::uint64_t index) {
  Rng rng(99, index);
  const CaseSpec spec = wild_spec(&rng);
  Case wild = build_case(spec);
  const double chance = rng.pick({0.05, 0.3, 1.0});
  for (const Tensor* tensor : {&wild.query_start_loc, &wild.seq_lens, &wild.block_table,
                               &wild.mm_prefix_range, &wild.visible_prefix_lens, &wild.kv_start_loc,
                               &wild.kv_offset, &wild.kv_stride, &wild.q_offset}) {
    if (rng.chance(0.5)) scribble(*tensor, chance, &rng);
  }
  Call call(std::move(wild), backend);
  call.run();
  EXPECT_EQ(call.on_device.damage(), "") << index << ": " << describe(spec);
}

class WildIndices : public testing::TestWithParam<const AttentionBackend*> {};

TEST_P(WildIndices, NeverLeaveTheBuffers) {
  const char* text = std::getenv("QUIRE_TEST_CASES");
  const std::int64_t count = text != nullptr ? std::strtoll(text, nullptr, 10) : 1500;
  for (std::int64_t index = 0; index < count; ++index) {
    run_wild_case(*GetParam(), static_cast<std::uint64_t>(index));
    if (testing::Test::HasFailure()) return;
  }
}

// Encoder attention whose row offsets claim keys up to 2^31: key indices past 32 bits once wrapped, and
// keys that do not exist were worked through for minutes.
TEST_P(WildIndices, EncoderLengthsThatNobodyHas) {
  const auto run = [&](std::int64_t num_rows, const std::vector<std::int32_t>& starts,
                       WindowKind window, bool keys_apart) {
    CaseSpec spec = Call::default_spec();
    spec.config.type = AttentionType::kEncoder;
    spec.model_dtype = spec.config.dtype = DType::kFloat16;
    spec.config.num_heads = 6;
    spec.config.num_kv_heads = 2;
    spec.config.head_size = 32;
    spec.config.mask.window = window;
    spec.config.mask.window_size = 5;
    spec.kv_start_loc = keys_apart;
    const auto num_seqs = static_cast<std::int64_t>(starts.size()) - 1;
    spec.sequences.assign(static_cast<std::size_t>(num_seqs), {0, 0});
    spec.sequences.front() = {num_rows, num_rows};
    Case wild = build_case(spec);
    const Tensor& tensor = keys_apart ? wild.kv_start_loc : wild.query_start_loc;
    for (std::int64_t s = 0; s <= num_seqs; ++s) tensor.set({s}, starts[s]);
    Call call(std::move(wild), *GetParam());
    const auto start = std::chrono::steady_clock::now();
    call.run();
    EXPECT_EQ(call.on_device.damage(), "");  // waits for the device
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5)) << starts[1];
  };
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  for (const bool keys_apart : {false, true}) {
    for (const WindowKind window : {WindowKind::kNone, WindowKind::kLeft, WindowKind::kBoth}) {
      run(84, {kMin, 2, 19, 84}, window, keys_apart);
      run(84, {0, kMax, kMin, kMax}, window, keys_apart);
      run(3, {0, 1 << 30}, window, keys_apart);
      run(300, {0, 1 << 30}, window, keys_apart);
      run(300, {0, 100, kMax}, window, keys_apart);
    }
  }
}

TEST_P(WildIndices, SlotsNeverLeaveTheCache) {
  for (std::uint64_t index = 0; index < 200; ++index) {
    Rng rng(7, index);
    CaseSpec spec = Call::default_spec();
    spec.config.kv_cache_dtype =
        rng.pick({KvCacheDType::kAuto, KvCacheDType::kFp8E5M2, KvCacheDType::kFp8E4M3PerTokenHead,
                  KvCacheDType::kInt4PerTokenHead});
    Case wild = build_case(spec);
    for (std::int64_t i = 0; i < wild.slot_mapping.shape[0]; ++i) {
      wild.slot_mapping.set_int64(
          i, rng.chance(0.5) ? static_cast<std::int64_t>(rng.next()) : rng.uniform(-50, 500));
    }
    Call call(std::move(wild), *GetParam());
    const Case& c = call.tensors;
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    write_kv_cache(buffers.view(c.key), buffers.view(c.value), call.args.kv_cache,
                   call.batch.slot_mapping);
    EXPECT_EQ(buffers.damage({&c.key_cache, &c.value_cache, &c.k_scale_cache, &c.v_scale_cache}),
              "");
  }
}

// Sequences end at the table's width: the result is that of the shorter sequence at the same
// positions, and nothing past the table is read.
TEST_P(WildIndices, TablesTooNarrowForTheirSequences) {
  Call call(Call::default_spec(), *GetParam());
  call.batch.block_table.shape[1] = 1;
  call.run();
  EXPECT_EQ(call.on_device.damage(), "");
}

QUIRE_ON_EVERY_DEVICE(WildIndices);

}  // namespace
}  // namespace quire
