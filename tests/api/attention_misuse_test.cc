// attention() and Plan with wrong arguments.
#include <gtest/gtest.h>

#include <limits>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(AttentionMisuse, Query) {
  const auto query = [](Call & call) -> auto& { return call.args.query; };
  expect_named(mistakes_of_a_tensor("query", query, DType::kFloat16));
  expect_named({wrong_size("query", query, 0, -1), wrong_size("query", query, 1, 1),
                wrong_size("query", query, 2, -8)});
}

TEST(AttentionMisuse, CacheKey) {
  const auto key = [](Call & call) -> auto& { return call.args.kv_cache.key; };
  expect_named(mistakes_of_a_tensor("kv_cache.key", key, DType::kInt32));
  expect_named({wrong_size("kv_cache.key", key, 3, -8)});
  expect_named({{"both with another dtype than the plan's", "kv_cache.key",
                 [](Call& call) {
                   call.args.kv_cache.key.dtype = DType::kBFloat16;
                   call.args.kv_cache.value.dtype = DType::kBFloat16;
                 }},
                {"both with another block size", "kv_cache.key",
                 [](Call& call) {
                   call.args.kv_cache.key.shape[1] = 2;
                   call.args.kv_cache.value.shape[1] = 2;
                 }},
                {"both with other heads", "kv_cache.key", [](Call& call) {
                   call.args.kv_cache.key.shape[2] = 1;
                   call.args.kv_cache.value.shape[2] = 1;
                 }}});
}

TEST(AttentionMisuse, CacheValue) {
  const auto value = [](Call & call) -> auto& { return call.args.kv_cache.value; };
  expect_named(mistakes_of_a_tensor("kv_cache.value", value, DType::kFloat16));
  expect_named(
      {wrong_size("kv_cache.value", value, 0, -1), wrong_size("kv_cache.value", value, 1, -1),
       wrong_size("kv_cache.value", value, 2, -1), wrong_size("kv_cache.value", value, 3, -8)});
}

TEST(AttentionMisuse, NoCacheAtAll) {
  const std::vector<Mistake> none{
      {"no cache", "kv_cache", [](Call& call) { call.args.kv_cache = {}; }}};
  expect_named(none);
  CaseSpec spec = Call::default_spec();
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
  expect_named(none, spec);
}

TEST(AttentionMisuse, CacheDTypeIsThePlans) {
  expect_named({{"another kind", "kv_cache.dtype", [](Call& call) {
                   PagedKvCache& cache = call.args.kv_cache;
                   cache.dtype = KvCacheDType::kFp8E4M3;
                   cache.key.dtype = cache.value.dtype = DType::kFloat8E4M3;
                 }}});
  expect_named({{"what does not go with its own elements", "kv_cache.key",
                 [](Call& call) { call.args.kv_cache.dtype = KvCacheDType::kFp8E4M3; }}});
}

TEST(AttentionMisuse, ScalesOfTensors) {
  CaseSpec spec = Call::default_spec();
  spec.model_dtype = DType::kBFloat16;
  spec.config.dtype = DType::kFloat8E4M3;
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
  for (const float bad : {0.0F, -1.0F, kNan, kInfinity}) {
    expect_named(
        {{"k_scale", "kv_cache.k_scale", [bad](Call& call) { call.args.kv_cache.k_scale = bad; }},
         {"v_scale", "kv_cache.v_scale", [bad](Call& call) { call.args.kv_cache.v_scale = bad; }},
         {"q_scale", "q_scale", [bad](Call& call) { call.args.q_scale = bad; }}},
        spec);
  }
}

TEST(AttentionMisuse, TextsOfScalesCanBeRead) {
  CaseSpec spec = Call::default_spec();
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
  Call call(spec);
  call.args.kv_cache.k_scale = 1e-39F;  // denormal, and legal
  EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)");
  call.args.kv_cache.k_scale = -1e-39F;
  try {
    call.run();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "kv_cache.k_scale: expected a finite scale above 0, got -1e-39");
  }
}

TEST(AttentionMisuse, ScalesOfTokens) {
  CaseSpec spec = Call::default_spec();
  for (const KvCacheDType dtype :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead,
        KvCacheDType::kInt4PerTokenHead}) {
    spec.config.kv_cache_dtype = dtype;
    const auto k = [](Call & call) -> auto& { return call.args.kv_cache.k_scale_cache; };
    const auto v = [](Call & call) -> auto& { return call.args.kv_cache.v_scale_cache; };
    expect_named(mistakes_of_a_tensor("kv_cache.k_scale_cache", k, DType::kFloat16, false), spec);
    expect_named(mistakes_of_a_tensor("kv_cache.v_scale_cache", v, DType::kFloat16, false), spec);
    for (int dim = 0; dim < 3; ++dim) {
      expect_named({wrong_size("kv_cache.k_scale_cache", k, dim, -1),
                    wrong_size("kv_cache.v_scale_cache", v, dim, -1)},
                   spec);
    }
  }
}

TEST(AttentionMisuse, Output) {
  const auto output = [](Call & call) -> auto& { return call.args.output; };
  expect_named(mistakes_of_a_tensor("output", output, DType::kInt8));
  expect_named({wrong_size("output", output, 0, -1),
                wrong_size("output", output, 1, 1),
                {"one dimension", "output", [](Call& call) { call.args.output.ndim = 1; }}});
  CaseSpec spec = Call::default_spec();
  spec.output_3d = true;
  expect_named(mistakes_of_a_tensor("output", output, DType::kFloat8E5M2), spec);
  expect_named({wrong_size("output", output, 0, -1), wrong_size("output", output, 1, -1),
                wrong_size("output", output, 2, -1)},
               spec);
}

TEST(AttentionMisuse, Lse) {
  const auto lse = [](Call & call) -> auto& { return call.args.lse; };
  std::vector<Mistake> mistakes = mistakes_of_a_tensor("lse", lse, DType::kFloat16, false);
  mistakes.erase(mistakes.begin());  // absent is fine
  expect_named(mistakes);
  expect_named({wrong_size("lse", lse, 0, -1), wrong_size("lse", lse, 1, -1)});
}

TEST(AttentionMisuse, OutputScales) {
  expect_named({{"static scale without fp8", "output_scale",
                 [](Call& call) { call.args.has_output_scale = true; }},
                {"block scale without fp8", "output_block_scale",
                 [](Call& call) { call.args.output_block_scale = call.args.lse; }}});
  CaseSpec spec = Call::default_spec();
  spec.output_dtype = DType::kFloat8E4M3;
  expect_named(
      {{"no scale", "output_scale", [](Call& call) { call.args.has_output_scale = false; }},
       {"zero", "output_scale", [](Call& call) { call.args.output_scale = 0.0F; }},
       {"NaN", "output_scale", [](Call& call) { call.args.output_scale = kNan; }},
       {"both", "output_block_scale",
        [](Call& call) { call.args.output_block_scale = call.args.lse; }}},
      spec);
  spec.block_scale = true;
  const auto scales = [](Call & call) -> auto& { return call.args.output_block_scale; };
  std::vector<Mistake> mistakes =
      mistakes_of_a_tensor("output_block_scale", scales, DType::kFloat16, false);
  mistakes.front().argument = "output_scale";  // absent: then a static one is missing
  expect_named(mistakes, spec);
  expect_named({wrong_size("output_block_scale", scales, 0, -1),
                wrong_size("output_block_scale", scales, 1, 1)},
               spec);
}

TEST(AttentionMisuse, EncoderKeyAndValue) {
  CaseSpec spec = Call::default_spec();
  spec.config.type = AttentionType::kEncoder;
  spec.sequences = {{3, 3}, {5, 5}};
  const auto key = [](Call & call) -> auto& { return call.args.key; };
  const auto value = [](Call & call) -> auto& { return call.args.value; };
  expect_named(mistakes_of_a_tensor("key", key, DType::kFloat16), spec);
  expect_named(mistakes_of_a_tensor("value", value, DType::kFloat16), spec);
  expect_named({wrong_size("key", key, 1, -1),
                wrong_size("key", key, 2, -1),
                wrong_size("value", value, 0, -1),
                wrong_size("value", value, 1, -1),
                wrong_size("value", value, 2, -1),
                {"fewer rows than the query", "key",
                 [](Call& call) {
                   call.args.key.shape[0] = 2;
                   call.args.value.shape[0] = 2;
                 }}},
               spec);
}

TEST(AttentionMisuse, ScoreOfTheCall) {
  static float values[4] = {};
  static Score score;
  const auto with = [](auto change) {
    return [change](Call& call) {
      score = Score();
      change();
      call.args.score = &score;
    };
  };
  expect_named(
      {{"slopes of another size", "alibi_slopes",
        with([] { score.alibi_slopes = TensorView(values, DType::kFloat32, {3}); })},
       {"sinks of another dtype", "sinks",
        with([] { score.sinks = TensorView(values, DType::kFloat16, {4}); })},
       {"strided sinks", "sinks",
        with([] { score.sinks = TensorView(values, DType::kFloat32, {4}, {2}); })},
       {"null slopes", "alibi_slopes",
        with([] { score.alibi_slopes = TensorView(nullptr, DType::kFloat32, {4}); })},
       {"NaN cap", "soft_cap", with([] { score.soft_cap = kNan; })},
       {"infinite scale", "softmax_scale", with([] { score.softmax_scale = kInfinity; })},
       {"square root without slopes", "alibi_slopes", with([] { score.alibi_sqrt = true; })}});
}

TEST(AttentionMisuse, PlanWithoutABatch) {
  Call call;
  const Plan plan(call.config);
  EXPECT_EQ(argument_named_by([&] { attention(plan, call.args); }), "plan");
  EXPECT_EQ(call.damage(), "");
}

TEST(AttentionMisuse, BatchThatFailsLeavesThePlanAsItWas) {
  Call call;
  Plan plan(call.config);
  plan.update(call.batch);
  CommonAttentionMetadata bad = call.batch;
  bad.seq_lens.shape[0] = 1;
  EXPECT_EQ(argument_named_by([&] { plan.update(bad); }), "seq_lens");
  attention(plan, call.args);
  EXPECT_EQ(call.verdict(), "");
}

}  // namespace
}  // namespace quire
