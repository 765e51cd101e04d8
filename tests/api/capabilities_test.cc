// What a backend's capabilities lack is refused where the layer, the batch or the call is lowered,
// by name. Seen on a backend that can do less than any real one.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "api/lower.h"
#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;

class ReducedBackend final : public Backend {
 public:
  explicit ReducedBackend(BackendCapabilities caps) : caps_(std::move(caps)) {}

  const char* name() const override { return "reduced"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  int num_devices() const override { return 1; }
  std::string instruction_set() const override { return "none"; }
  const BackendCapabilities& capabilities() const override { return caps_; }
  std::unique_ptr<LayerPlan> make_plan(const LayerParams&) const override { return nullptr; }
  void cache_write(const CacheWriteParams&, const Context&) const override {}
  void merge(const MergeParams&, const Context&) const override {}

 private:
  BackendCapabilities caps_;
};

using Reduce = std::function<void(BackendCapabilities&)>;

BackendCapabilities reduced(const Reduce& reduce) {
  BackendCapabilities caps = full_capabilities();
  caps.graph_capture = true;
  reduce(caps);
  return caps;
}

Reduce without(bool BackendCapabilities::*flag) {
  return [flag](BackendCapabilities& caps) { caps.*flag = false; };
}

// The arguments that an unsupported layer's reasons name.
std::string reasons(const BackendCapabilities& caps, const AttentionConfig& config) {
  std::string names;
  for (const Unsupported& reason : ReducedBackend(caps).unsupported(config)) {
    names += (names.empty() ? "" : " ") + reason.argument;
  }
  return names;
}

TEST(Capabilities, OfTheLayer) {
  struct Case {
    const char* argument;
    Reduce reduce;
    std::function<void(AttentionConfig&)> ask;
  };
  static float values[4] = {};
  const TensorView heads(values, DType::kFloat32, {4});
  using Caps = BackendCapabilities;
  const std::vector<Case> cases{
      {"sinks", without(&Caps::sinks), [&](AttentionConfig& c) { c.score.sinks = heads; }},
      {"alibi_slopes", without(&Caps::alibi),
       [&](AttentionConfig& c) { c.score.alibi_slopes = heads; }},
      {"soft_cap", without(&Caps::soft_cap), [](AttentionConfig& c) { c.score.soft_cap = 30; }},
      {"window", without(&Caps::sliding_window),
       [](AttentionConfig& c) { c.mask = Mask::sliding_window(8); }},
      {"window", without(&Caps::chunked), [](AttentionConfig& c) { c.mask = Mask::chunked(8); }},
      {"type", without(&Caps::cross_attention),
       [](AttentionConfig& c) { c.type = AttentionType::kEncoderDecoder; }},
      {"type", without(&Caps::encoder_attention),
       [](AttentionConfig& c) { c.type = AttentionType::kEncoder; }},
      {"batch_invariant", without(&Caps::batch_invariant),
       [](AttentionConfig& c) { c.batch_invariant = true; }},
      {"dtype", [](Caps& caps) { caps.dtypes = {DType::kBFloat16}; },
       [](AttentionConfig& c) { c.dtype = DType::kFloat16; }},
      {"kv_cache_dtype", [](Caps& caps) { caps.kv_cache_dtypes = {KvCacheDType::kAuto}; },
       [](AttentionConfig& c) { c.kv_cache_dtype = KvCacheDType::kFp8E5M2; }},
      {"head_size", [](Caps& caps) { caps.head_size_multiple = 16; },
       [](AttentionConfig& c) { c.head_size = 24; }},
      {"head_size_v", [](Caps& caps) { caps.max_head_size = 128; },
       [](AttentionConfig& c) { c.head_size_v = 256; }},
      {"block_size", [](Caps& caps) { caps.block_size_multiple = 16; },
       [](AttentionConfig& c) { c.block_size = 24; }}};
  for (const Case& one : cases) {
    AttentionConfig config;
    config.num_heads = 4;
    config.num_kv_heads = 2;
    config.head_size = 64;
    EXPECT_EQ(reasons(reduced(one.reduce), config), "") << one.argument;
    one.ask(config);
    EXPECT_EQ(reasons(reduced([](Caps&) {}), config), "") << one.argument;
    EXPECT_EQ(reasons(reduced(one.reduce), config), one.argument);
  }
}

// A layer, its batch and its call, lowered for a backend with some capabilities.
class LoweredCall : public Call {
 public:
  using Call::Call;

  std::string refused(const BackendCapabilities& caps) {
    return argument_named_by([&] {
      const LayerParams layer = api::lower_layer(config, caps);
      const BatchParams params = api::lower_batch(config, caps, batch, common_prefix_len);
      api::lower_attention(config, caps, layer, params, args);
    });
  }
};

TEST(Capabilities, OfTheBatchAndTheCall) {
  struct Case {
    const char* argument;
    Reduce reduce;
    std::function<void(CaseSpec&)> ask;
  };
  using Caps = BackendCapabilities;
  const std::vector<Case> cases{
      {"mm_prefix_range", without(&Caps::bidirectional_ranges),
       [](CaseSpec& s) { s.ranges = true; }},
      {"visible_prefix_lens", without(&Caps::visible_prefix),
       [](CaseSpec& s) { s.visible_prefixes = true; }},
      {"qq_bias", without(&Caps::qq_bias), [](CaseSpec& s) { s.qq_bias_size = 3; }},
      {"lse", without(&Caps::lse), [](CaseSpec& s) { s.lse = true; }},
      {"output", without(&Caps::fp8_output),
       [](CaseSpec& s) { s.output_dtype = DType::kFloat8E4M3; }},
      {"output_block_scale", without(&Caps::block_scale_output),
       [](CaseSpec& s) {
         s.output_dtype = DType::kFloat8E4M3;
         s.block_scale = true;
       }},
      {"output", [](Caps& caps) { caps.output_dtypes = {DType::kFloat32}; },
       [](CaseSpec& s) { s.output_dtype = DType::kFloat16; }},
      {"output", [](Caps& caps) { caps.output_dtypes = {DType::kFloat32}; },
       [](CaseSpec& s) {
         s.output_dtype = DType::kFloat16;
         s.output_3d = true;
       }}};
  for (const Case& one : cases) {
    CaseSpec spec = Call::default_spec();
    spec.lse = false;
    EXPECT_EQ(LoweredCall(spec).refused(reduced(one.reduce)), "(no error)") << one.argument;
    one.ask(spec);
    EXPECT_EQ(LoweredCall(spec).refused(full_capabilities()), "(no error)") << one.argument;
    EXPECT_EQ(LoweredCall(spec).refused(reduced(one.reduce)), one.argument);
  }
}

TEST(Capabilities, OfTheScoreThatACallBrings) {
  static float values[4] = {};
  Score score;
  LoweredCall call;
  call.args.score = &score;
  const auto expect = [&](const char* argument, bool BackendCapabilities::*flag) {
    EXPECT_EQ(call.refused(full_capabilities()), "(no error)") << argument;
    EXPECT_EQ(call.refused(reduced(without(flag))), argument);
    score = Score();
    EXPECT_EQ(call.refused(reduced(without(flag))), "(no error)") << argument;
  };
  score.sinks = TensorView(values, DType::kFloat32, {4});
  expect("sinks", &BackendCapabilities::sinks);
  score.alibi_slopes = TensorView(values, DType::kFloat32, {4});
  expect("alibi_slopes", &BackendCapabilities::alibi);
  score.soft_cap = 30;
  expect("soft_cap", &BackendCapabilities::soft_cap);
}

TEST(Capabilities, Cascade) {
  const BackendCapabilities plain = reduced(without(&BackendCapabilities::cascade));
  LoweredCall call;
  EXPECT_TRUE(api::lower_layer(call.config, full_capabilities()).auto_cascade);
  EXPECT_FALSE(api::lower_layer(call.config, plain).auto_cascade);
  EXPECT_EQ(call.refused(plain), "(no error)");
  call.common_prefix_len = 4;
  EXPECT_EQ(call.refused(full_capabilities()), "(no error)");
  EXPECT_EQ(call.refused(plain), "common_prefix_len");
}

TEST(Capabilities, OfCacheWrites) {
  CaseSpec spec = Call::default_spec();
  const auto refused = [&](const BackendCapabilities& caps) {
    Call call(spec);
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    return argument_named_by([&] {
      api::lower_cache_write(caps, buffers.view(call.tensors.key), buffers.view(call.tensors.value),
                             call.args.kv_cache, buffers.view(call.tensors.slot_mapping));
    });
  };
  EXPECT_EQ(refused(full_capabilities()), "(no error)");
  EXPECT_EQ(refused(reduced([](auto& caps) { caps.dtypes = {DType::kFloat16}; })), "key");
  const BackendCapabilities plain =
      reduced([](auto& caps) { caps.kv_cache_dtypes = {KvCacheDType::kFloat32}; });
  EXPECT_EQ(refused(plain), "(no error)");
  spec.config.kv_cache_dtype = KvCacheDType::kInt8PerTokenHead;
  EXPECT_EQ(refused(full_capabilities()), "(no error)");
  EXPECT_EQ(refused(plain), "kv_cache.dtype");
}

TEST(Capabilities, OfMerges) {
  float o[8] = {}, lse[1] = {};
  const TensorView part(o, DType::kFloat32, {1, 1, 8}), sums(lse, DType::kFloat32, {1, 1});
  const auto refused = [&](const BackendCapabilities& caps) {
    return argument_named_by([&] { api::lower_merge(caps, part, sums, part, sums, part, sums); });
  };
  EXPECT_EQ(refused(full_capabilities()), "(no error)");
  EXPECT_EQ(refused(reduced([](auto& caps) { caps.output_dtypes = {DType::kFloat16}; })), "o_a");
}

TEST(Capabilities, OfGraphs) {
  for (const AttentionBackend* backend : conformance::available_backends()) {
    Call call(Call::default_spec(), *backend);
    AttentionMetadataBuilder builder(call.config);
    EXPECT_EQ(argument_named_by([&] { builder.build_for_cudagraph_capture(call.batch); }),
              backend->capabilities().graph_capture ? "(no error)" : "backend");
  }
}

}  // namespace
}  // namespace quire
