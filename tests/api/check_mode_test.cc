// Context::check_indices: what it finds in the data of index tensors and scales, and what it must
// not object to.
#include <gtest/gtest.h>

#include <limits>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::Case;
using conformance::CaseSpec;
using conformance::make_tensor;
using conformance::SequenceSpec;
using conformance::Tensor;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What the check mode names in the case that `change` made of `spec`; without the mode it is run
// too and must do no harm.
void expect_found(const char* argument, const CaseSpec& spec,
                  const std::function<void(const Case&)>& change) {
  for (const AttentionBackend* backend : best_backends()) {
    Case changed = conformance::build_case(spec);
    change(changed);
    Call call(std::move(changed), *backend);
    call.context.check_indices = true;
    EXPECT_EQ(argument_named_by([&] { call.run(); }), argument) << backend->name();
    call.context.check_indices = false;
    EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)") << backend->name();
  }
}

CaseSpec spec_of(const std::vector<SequenceSpec>& sequences, const Mask& mask = {}) {
  CaseSpec spec = Call::default_spec();  // blocks of 4
  spec.sequences = sequences;
  spec.config.mask = mask;
  return spec;
}

// Sets blocks [begin, end) of sequence 0 to -1, as servers do with blocks they take back.
std::function<void(const Case&)> freed(std::int64_t begin, std::int64_t end) {
  return [=](const Case& c) {
    for (std::int64_t b = begin; b < end; ++b) c.block_table.set({0, b}, -1);
  };
}

TEST(CheckMode, BlocksBehindEveryWindowMayBeGone) {
  // The query at 40 of a window of 6 sees keys 35 to 40: blocks 8, 9, 10.
  const CaseSpec decode = spec_of({{1, 41}, {1, 7}}, Mask::sliding_window(6));
  expect_found("(no error)", decode, freed(0, 8));
  expect_found("block_table[0][8]", decode, freed(0, 9));
  expect_found("block_table[0][0]", spec_of({{1, 41}, {1, 7}}), freed(0, 8));
  // Of 9 queries the first, at 32, sees keys from 27 on: block 6.
  const CaseSpec prefill = spec_of({{9, 41}, {1, 7}}, Mask::sliding_window(6));
  expect_found("(no error)", prefill, freed(0, 6));
  expect_found("block_table[0][6]", prefill, freed(0, 7));
  // Chunks of 16: the query at 40 sees keys from 32 on, or one chunk earlier.
  expect_found("(no error)", spec_of({{1, 41}}, Mask::chunked(16)), freed(0, 8));
  expect_found("block_table[0][8]", spec_of({{1, 41}}, Mask::chunked(16)), freed(0, 9));
  expect_found("block_table[0][4]", spec_of({{1, 41}}, Mask::chunked(16, 1)), freed(0, 5));
}

TEST(CheckMode, TheDeadMiddleBehindAVisiblePrefixMayBeGone) {
  CaseSpec spec = spec_of({{1, 41, true, {}, 5}, {1, 7}}, Mask::sliding_window(6));
  spec.visible_prefixes = true;  // of 5 keys: blocks 0 and 1
  expect_found("(no error)", spec, freed(2, 8));
  expect_found("block_table[0][1]", spec, freed(1, 8));
  expect_found("block_table[0][8]", spec, freed(2, 9));
}

TEST(CheckMode, RangesCount) {
  // The query at 40 lies in a range that begins at key 14: block 3.
  CaseSpec spec = spec_of({{1, 41, true, {{{14, 40}}}, 0}, {1, 7}}, Mask::sliding_window(6));
  spec.ranges = true;
  expect_found("(no error)", spec, freed(0, 3));
  expect_found("block_table[0][3]", spec, freed(0, 4));
}

TEST(CheckMode, SequencesWithoutRowsNeedNoBlocks) {
  expect_found("(no error)", spec_of({{0, 41}, {1, 7}}), freed(0, 11));
}

TEST(CheckMode, OffsetsOfKeys) {
  CaseSpec spec = spec_of({{3, 10}, {5, 7}});
  spec.config.type = AttentionType::kEncoder;
  spec.kv_start_loc = true;
  expect_found("(no error)", spec, [](const Case&) {});
  expect_found("kv_start_loc[0]", spec, [](const Case& c) { c.kv_start_loc.set({0}, -1); });
  expect_found("kv_start_loc[2]", spec, [](const Case& c) { c.kv_start_loc.set({2}, 9); });
  expect_found("kv_start_loc[2]", spec, [](const Case& c) { c.kv_start_loc.set({2}, 1 << 20); });
}

// One token per entry of `slots`, written on the CPU in check mode.
std::string written_to(const std::vector<std::int64_t>& slots) {
  const auto count = static_cast<std::int64_t>(slots.size());
  const std::vector<float> rows(slots.size() * 8);
  std::vector<float> memory(2 * 16 * 8);
  const auto cache = PagedKvCache::from_combined({memory.data(), DType::kFloat32, {4, 2, 4, 1, 8}});
  const ConstTensorView row_view(rows.data(), DType::kFloat32, {count, 1, 8});
  Context context;
  context.check_indices = true;
  try {
    write_kv_cache(row_view, row_view, cache, {slots.data(), DType::kInt64, {count}}, context);
  } catch (const Error& error) {
    for (const float x : memory) EXPECT_EQ(x, 0.0F);
    return error.what();
  }
  return "(no error)";
}

TEST(CheckMode, SlotsOfTwoTokens) {
  EXPECT_EQ(written_to({3, -1, 7, -1, 2}), "(no error)");
  EXPECT_EQ(written_to({3, -1, 7, 3, 2, 7}),
            "slot_mapping[3]: expected a slot that no other token has, got 3, the same as "
            "slot_mapping[0]");
  EXPECT_EQ(written_to({9, 5, 5, 9, 5}),
            "slot_mapping[2]: expected a slot that no other token has, got 5, the same as "
            "slot_mapping[1]");
  EXPECT_EQ(written_to({3, 3, 16}).rfind("slot_mapping[2]: expected a slot below 16", 0), 0U);
}

CaseSpec scales_in_memory() {
  CaseSpec spec = Call::default_spec();
  spec.model_dtype = DType::kBFloat16;
  spec.config.dtype = spec.output_dtype = DType::kFloat8E4M3;
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
  spec.scales_in_memory = true;
  return spec;
}

TEST(CheckMode, ScalesInMemory) {
  const char* names[] = {"q_scale", "kv_cache.k_scale", "kv_cache.v_scale", "output_scale"};
  for (std::int64_t i = 0; i < 4; ++i) {
    for (const double bad : {0.0, -1.0, kNan, kInfinity}) {
      expect_found(names[i], scales_in_memory(), [&](const Case& c) { c.scales.set({i}, bad); });
    }
    expect_found("(no error)", scales_in_memory(),
                 [&](const Case& c) { c.scales.set({i}, 1e-39); });
  }
}

TEST(CheckMode, ScalesInMemoryOfAWrite) {
  for (const AttentionBackend* backend : best_backends()) {
    for (std::int64_t i = 1; i < 3; ++i) {
      const Case c = conformance::build_case(scales_in_memory());
      c.scales.set({i}, kNan);
      Call call(c, *backend);
      call.context.check_indices = true;
      EXPECT_EQ(argument_named_by([&] {
                  write_kv_cache(call.on_device.buffers().view(c.key),
                                 call.on_device.buffers().view(c.value), call.args.kv_cache,
                                 call.batch.slot_mapping, call.context);
                }),
                i == 1 ? "kv_cache.k_scale" : "kv_cache.v_scale");
      EXPECT_EQ(call.damage(), "");
    }
  }
}

}  // namespace
}  // namespace quire
