// Layers and batches that cannot be: Plan's constructor and update(), supports(), lookups.
#include <gtest/gtest.h>

#include <limits>

#include "tests/api/misuse.h"

namespace quire {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The reasons that backend "cpu" gives must name what is wrong, and Plan must refuse with them.
void expect_unsupported(const char* argument, const std::function<void(AttentionConfig&)>& spoil) {
  Call call;
  spoil(call.config);
  const std::vector<std::string> reasons = attention_backend("cpu").supports(call.config);
  ASSERT_FALSE(reasons.empty()) << argument;
  EXPECT_EQ(reasons.front().rfind(std::string(argument) + ": expected ", 0), 0U) << reasons.front();
  EXPECT_EQ(argument_named_by([&] { Plan plan(call.config); }), argument);
  EXPECT_EQ(argument_named_by([&] { AttentionMetadataBuilder builder(call.config); }), argument);
  EXPECT_EQ(argument_named_by([&] { AttentionImpl impl(call.config); }), argument);
}

std::string text_of_error(const AttentionConfig& config) {
  try {
    Plan plan(config);
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

TEST(PlanMisuse, Sizes) {
  for (const std::int64_t bad : {0, -4, 65537}) {
    expect_unsupported("num_heads", [bad](AttentionConfig& c) { c.num_heads = bad; });
  }
  expect_unsupported("num_kv_heads", [](AttentionConfig& c) { c.num_heads = 5; });
  for (const std::int64_t bad : {0, -1, 3, 8}) {
    expect_unsupported("num_kv_heads", [bad](AttentionConfig& c) { c.num_kv_heads = bad; });
  }
  for (const std::int64_t bad : {0, -16, 7, 577, 1 << 20}) {
    expect_unsupported("head_size", [bad](AttentionConfig& c) { c.head_size = bad; });
  }
  for (const std::int64_t bad : {-16, 7, 577}) {
    expect_unsupported("head_size_v", [bad](AttentionConfig& c) { c.head_size_v = bad; });
  }
  for (const std::int64_t bad : {0, -1, (1 << 20) + 1}) {
    expect_unsupported("block_size", [bad](AttentionConfig& c) { c.block_size = bad; });
  }
}

TEST(PlanMisuse, DTypes) {
  for (const DType bad : {DType::kNone, DType::kInt8, DType::kFloat8E5M2, DType::kInt64}) {
    expect_unsupported("dtype", [bad](AttentionConfig& c) { c.dtype = bad; });
  }
  expect_unsupported("kv_cache_dtype",
                     [](AttentionConfig& c) { c.kv_cache_dtype = static_cast<KvCacheDType>(200); });
  // int4 has two elements in a byte.
  const auto int4 = [](AttentionConfig& c, std::int64_t head_size, std::int64_t head_size_v) {
    c.kv_cache_dtype = KvCacheDType::kInt4PerTokenHead;
    c.head_size = head_size;
    c.head_size_v = head_size_v;
  };
  expect_unsupported("head_size", [&](AttentionConfig& c) { int4(c, 33, 32); });
  expect_unsupported("head_size_v", [&](AttentionConfig& c) { int4(c, 32, 33); });
  // An fp8 query needs an fp8 cache.
  expect_unsupported("kv_cache_dtype", [](AttentionConfig& c) { c.dtype = DType::kFloat8E4M3; });
  expect_unsupported("dtype", [](AttentionConfig& c) {
    c.dtype = DType::kFloat8E4M3;
    c.kv_cache_dtype = KvCacheDType::kFp8E4M3;
    c.type = AttentionType::kEncoder;
  });
}

TEST(PlanMisuse, Masks) {
  for (const WindowKind kind : {WindowKind::kLeft, WindowKind::kBoth, WindowKind::kChunked}) {
    for (const std::int64_t bad : {0, -1}) {
      expect_unsupported("window_size", [&](AttentionConfig& c) {
        c.mask.window = kind;
        c.mask.window_size = bad;
      });
    }
  }
  expect_unsupported("chunk_lookback", [](AttentionConfig& c) { c.mask = Mask::chunked(8, -1); });
  expect_unsupported("clamp_ranges", [](AttentionConfig& c) {
    c.mask = Mask::chunked(8);
    c.mask.clamp_ranges = true;
  });
  expect_unsupported("window",
                     [](AttentionConfig& c) { c.mask.window = static_cast<WindowKind>(9); });
  expect_unsupported("type", [](AttentionConfig& c) { c.type = static_cast<AttentionType>(9); });
}

TEST(PlanMisuse, TextsCanBeRead) {
  Call call;
  call.config.num_heads = 0;
  EXPECT_EQ(text_of_error(call.config), "num_heads: expected 1 to 65536, got 0");
  call.config.num_heads = 4;
  call.config.block_size = std::int64_t{1} << 21;
  EXPECT_EQ(text_of_error(call.config), "block_size: expected 1 to 1048576, got 2097152");
  call.config.block_size = 16;
  call.config.score.soft_cap = -1e-39F;
  EXPECT_EQ(text_of_error(call.config),
            "soft_cap: expected a finite cap of at least 0, got -1e-39");
  // Several mistakes: the first is named, the others are told.
  call.config.head_size = 4;
  EXPECT_EQ(text_of_error(call.config),
            "head_size: expected 8 to 576, got 4; "
            "soft_cap: expected a finite cap of at least 0, got -1e-39");
}

TEST(PlanMisuse, Scores) {
  for (const float bad : {kNan, -1.0F, std::numeric_limits<float>::infinity()}) {
    expect_unsupported("soft_cap", [bad](AttentionConfig& c) { c.score.soft_cap = bad; });
  }
  expect_unsupported("softmax_scale", [](AttentionConfig& c) { c.score.softmax_scale = kNan; });
  expect_unsupported("alibi_slopes", [](AttentionConfig& c) { c.score.alibi_sqrt = true; });
}

TEST(PlanMisuse, TensorsOfTheScore) {
  static float values[8] = {};
  const auto refused = [](const char* argument, ConstTensorView Score::*member,
                          const TensorView& view) {
    Call call;
    call.config.score.*member = view;
    EXPECT_EQ(argument_named_by([&] { Plan plan(call.config); }), argument);
  };
  for (const auto& [argument, member] :
       {std::pair{"sinks", &Score::sinks}, std::pair{"alibi_slopes", &Score::alibi_slopes}}) {
    refused(argument, member, TensorView(values, DType::kFloat32, {3}));
    refused(argument, member, TensorView(values, DType::kFloat32, {4, 1}));
    refused(argument, member, TensorView(values, DType::kBFloat16, {4}));
    refused(argument, member, TensorView(values, DType::kFloat32, {4}, {2}));
    refused(argument, member, TensorView(nullptr, DType::kFloat32, {4}));
    refused(argument, member, TensorView(values, DType::kFloat32, {4}, {DeviceType::kCuda, 0}));
  }
}

TEST(PlanMisuse, BackendsAndDevices) {
  Call call;
  call.config.backend = "no such backend";
  EXPECT_EQ(argument_named_by([&] { Plan plan(call.config); }), "backend");
  call.config.backend = "cpu";
  call.config.device = {DeviceType::kCuda, 0};
  EXPECT_EQ(argument_named_by([&] { Plan plan(call.config); }), "device");
  EXPECT_EQ(argument_named_by([] { attention_backend("no such backend"); }), "name");
  EXPECT_EQ(argument_named_by([] { make_thread_pool(0); }), "num_threads");
}

TEST(PlanMisuse, DevicesThatDoNotExist) {
  for (const AttentionBackend* backend : attention_backends()) {
    if (!backend->available()) continue;
    for (const int index : {-1, 99, std::numeric_limits<int>::max()}) {
      Call call;
      call.config.backend = backend->name();
      call.config.device = {backend->device_type(), index};
      EXPECT_EQ(argument_named_by([&] { Plan plan(call.config); }), "device");
      const std::vector<std::string> reasons = backend->supports(call.config);
      ASSERT_FALSE(reasons.empty()) << backend->name() << " " << index;
      EXPECT_EQ(reasons.front().rfind("device: expected one of the ", 0), 0U) << reasons.front();
    }
  }
}

// Without a GPU: the error says why CUDA cannot serve, or how to build it.
TEST(PlanMisuse, DeviceWithoutABackend) {
  std::string reason = "QUIRE_CUDA=ON";
  for (const AttentionBackend* backend : attention_backends()) {
    if (backend->device_type() != DeviceType::kCuda) continue;
    if (backend->available()) return;
    reason = backend->instruction_set();
  }
  Call call;
  call.config.backend.clear();
  call.config.device = {DeviceType::kCuda, 0};
  try {
    Plan plan(call.config);
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.argument(), "device");
    EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
  }
}

TEST(PlanMisuse, LengthsOfTheBatch) {
  const auto starts = [](Call & call) -> auto& { return call.batch.query_start_loc; };
  const auto lens = [](Call & call) -> auto& { return call.batch.seq_lens; };
  const auto table = [](Call & call) -> auto& { return call.batch.block_table; };
  expect_named(mistakes_of_a_tensor("query_start_loc", starts, DType::kInt64));
  expect_named(mistakes_of_a_tensor("seq_lens", lens, DType::kInt64));
  expect_named(mistakes_of_a_tensor("block_table", table, DType::kInt64));
  expect_named({{"no offsets at all", "query_start_loc",
                 [](Call& call) { call.batch.query_start_loc.shape[0] = 0; }},
                wrong_size("seq_lens", lens, 0, -1),
                wrong_size("block_table", table, 0, -1)});
}

TEST(PlanMisuse, NumbersOfTheBatch) {
  expect_named(
      {{"negative tokens", "num_actual_tokens",
        [](Call& call) { call.batch.num_actual_tokens = -1; }},
       {"absurdly many tokens", "num_actual_tokens",
        [](Call& call) { call.batch.num_actual_tokens = std::int64_t{1} << 40; }},
       {"more tokens than rows", "query", [](Call& call) { ++call.batch.num_actual_tokens; }},
       {"negative maximum", "max_query_len", [](Call& call) { call.batch.max_query_len = -1; }},
       {"negative maximum", "max_seq_len", [](Call& call) { call.batch.max_seq_len = -1; }},
       {"negative prefix", "common_prefix_len", [](Call& call) { call.common_prefix_len = -16; }}});
}

// max_seq_len is an upper bound, and may be that of the model.
TEST(PlanMisuse, MaximaMayLieAboveTheTable) {
  for (const AttentionBackend* backend : best_backends()) {
    Call call(Call::default_spec(), *backend);
    call.batch.max_seq_len = std::int64_t{1} << 40;
    call.batch.max_query_len = std::int64_t{1} << 40;
    call.run();
    EXPECT_EQ(call.verdict(), "") << backend->name();
  }
}

TEST(PlanMisuse, PlansThatWereMovedFrom) {
  Call call;
  Plan plan(call.config);
  plan.update(call.batch);
  Plan to(std::move(plan));
  // NOLINTBEGIN(bugprone-use-after-move): what this is about
  for (const std::function<void()>& use : std::vector<std::function<void()>>{
           [&] { plan.update(call.batch); }, [&] { attention(plan, call.args); },
           [&] { plan.config(); }, [&] { plan.batch(); }, [&] { plan.backend_name(); },
           [&] { plan.workspace_bytes(); }, [&] { plan.to_string(); }}) {
    EXPECT_EQ(argument_named_by(use), "plan");
  }
  EXPECT_EQ(call.damage(), "");
  plan = std::move(to);
  attention(plan, call.args);
  EXPECT_EQ(call.verdict(), "");
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadataBuilder taken(std::move(builder));
  EXPECT_EQ(argument_named_by([&] { builder.build(0, call.batch); }), "plan");
  // NOLINTEND(bugprone-use-after-move)
}

TEST(PlanMisuse, MasksOfTheBatch) {
  conformance::CaseSpec spec = Call::default_spec();
  spec.causal_flags = spec.ranges = spec.visible_prefixes = true;
  spec.qq_bias_size = 3;
  const auto drop_absent = [](std::vector<Mistake> mistakes) {
    mistakes.erase(mistakes.begin());
    return mistakes;
  };
  const auto causal = [](Call & call) -> auto& { return call.batch.causal; };
  const auto ranges = [](Call & call) -> auto& { return call.batch.mm_prefix_range; };
  const auto prefixes = [](Call & call) -> auto& { return call.batch.visible_prefix_lens; };
  const auto bias = [](Call & call) -> auto& { return call.batch.qq_bias; };
  expect_named(drop_absent(mistakes_of_a_tensor("causal", causal, DType::kInt32)), spec);
  expect_named(drop_absent(mistakes_of_a_tensor("mm_prefix_range", ranges, DType::kInt64)), spec);
  expect_named(drop_absent(mistakes_of_a_tensor("visible_prefix_lens", prefixes, DType::kInt64)),
               spec);
  expect_named(drop_absent(mistakes_of_a_tensor("qq_bias", bias, DType::kFloat16)), spec);
  expect_named({wrong_size("causal", causal, 0, -1),
                wrong_size("mm_prefix_range", ranges, 0, -1),
                wrong_size("mm_prefix_range", ranges, 2, -1),
                wrong_size("visible_prefix_lens", prefixes, 0, -1),
                wrong_size("qq_bias", bias, 0, -1),
                {"one dimension", "qq_bias", [](Call& call) { call.batch.qq_bias.ndim = 1; }}},
               spec);
  spec.qq_bias_per_sequence = true;
  expect_named({wrong_size("qq_bias", bias, 0, -1), wrong_size("qq_bias", bias, 2, -1)}, spec);
}

TEST(PlanMisuse, PositionsOfTheBatch) {
  conformance::CaseSpec spec = Call::default_spec();
  spec.kv_offsets = spec.kv_strides = spec.q_offsets = true;
  const std::pair<const char*, ConstTensorView CommonAttentionMetadata::*> tensors[] = {
      {"kv_offset", &CommonAttentionMetadata::kv_offset},
      {"kv_stride", &CommonAttentionMetadata::kv_stride},
      {"q_offset", &CommonAttentionMetadata::q_offset}};
  for (const auto& [name, member] : tensors) {
    const auto view = [member = member](Call & call) -> auto& { return call.batch.*member; };
    std::vector<Mistake> mistakes = mistakes_of_a_tensor(name, view, DType::kInt64);
    mistakes.front() = wrong_size(name, view, 0, -1);  // absent is no mistake
    expect_named(mistakes, spec);
  }
}

TEST(PlanMisuse, KeysOfTheEncoder) {
  conformance::CaseSpec spec = Call::default_spec();
  spec.config.type = AttentionType::kEncoder;
  spec.kv_start_loc = true;
  const auto starts = [](Call & call) -> auto& { return call.batch.kv_start_loc; };
  std::vector<Mistake> mistakes = mistakes_of_a_tensor("kv_start_loc", starts, DType::kInt64);
  mistakes.erase(mistakes.begin());
  expect_named(mistakes, spec);
  expect_named({wrong_size("kv_start_loc", starts, 0, -1)}, spec);
}

TEST(PlanMisuse, IndicesWhenAskedToLook) {
  using conformance::Case;
  conformance::CaseSpec spec = Call::default_spec();
  const auto spoil = [&](const char* argument, const std::function<void(const Case&)>& change) {
    for (const AttentionBackend* backend : best_backends()) {
      Case spoilt = conformance::build_case(spec);
      change(spoilt);
      Call call(std::move(spoilt), *backend);
      call.context.check_indices = true;
      EXPECT_EQ(argument_named_by([&] { call.run(); }), argument) << backend->name();
      call.context.check_indices = false;  // harmless
      EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)") << backend->name();
    }
  };
  spoil("query_start_loc[2]", [](const Case& c) { c.query_start_loc.set({2}, 1); });
  spoil("query_start_loc[0]", [](const Case& c) { c.query_start_loc.set({0}, 1); });
  spoil("seq_lens[1]", [](const Case& c) { c.seq_lens.set({1}, -3); });
  spoil("seq_lens[0]", [](const Case& c) { c.seq_lens.set({0}, 2); });
  spoil("seq_lens[1]", [](const Case& c) { c.seq_lens.set({1}, 1 << 30); });
  spoil("block_table[1][0]", [](const Case& c) { c.block_table.set({1, 0}, 1 << 20); });
  spoil("block_table[0][2]", [](const Case& c) { c.block_table.set({0, 2}, -1); });
  spec.kv_offsets = spec.kv_strides = spec.q_offsets = true;
  spoil("kv_offset[1]", [](const Case& c) { c.kv_offset.set({1}, -1); });
  spoil("kv_offset[0]", [](const Case& c) { c.kv_offset.set({0}, INT32_MAX); });
  spoil("kv_stride[0]", [](const Case& c) { c.kv_stride.set({0}, 0); });
  spoil("q_offset[1]", [](const Case& c) { c.q_offset.set({1}, -5); });
  spoil("q_offset[0]", [](const Case& c) { c.q_offset.set({0}, INT32_MAX); });
}

// A shard that holds none of this step's tokens.
TEST(PlanMisuse, MoreQueriesThanKeysWhereQueriesHavePositions) {
  conformance::CaseSpec spec = Call::default_spec();
  spec.write = false;
  spec.sequences = {{5, 2}, {1, 7}};
  spec.q_offsets = true;
  spec.sequences[0].q_offset = 40;
  for (const AttentionBackend* backend : best_backends()) {
    Call call(spec, *backend);
    call.context.check_indices = true;
    EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)") << backend->name();
  }
}

TEST(PlanMisuse, PaddingOfTheTableIsNotLookedAt) {
  Call call;  // its padding is wild
  call.context.check_indices = true;
  EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)");
}

}  // namespace
}  // namespace quire
