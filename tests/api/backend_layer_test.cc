// The serving layer: metadata builder, forward(), profiling runs, KV sharing.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "conformance/number_format.h"
#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;
using conformance::Tensor;

// A step of one layer through forward(), K and V included.
class LayerCall : public Call {
 public:
  explicit LayerCall(const CaseSpec& spec = default_spec()) : Call(spec) {
    key = on_device.buffers().view(tensors.key);
    value = on_device.buffers().view(tensors.value);
    scales = {args.q_scale, tensors.k_scale(), tensors.v_scale()};
    // The cache as it was before this step.
    for (const Tensor* cache : caches()) {
      for (const auto& [buffer, earlier] : tensors.before) {
        if (*cache && buffer == cache->buffer) on_device.buffers().store(*cache, earlier.bytes);
      }
    }
  }

  std::vector<const Tensor*> caches() const {
    return {&tensors.key_cache, &tensors.value_cache, &tensors.k_scale_cache,
            &tensors.v_scale_cache};
  }

  void forward(const AttentionImpl& impl, const AttentionMetadata* metadata) {
    std::optional<Scale> output_scale;
    if (args.has_output_scale) output_scale = args.output_scale;
    const TensorView returned =
        impl.forward(scales, args.query, key, value, args.kv_cache, metadata, args.output,
                     output_scale, args.output_block_scale, args.lse, context);
    EXPECT_EQ(returned.data, args.output.data);
  }

  // Whether all caches hold what they held before this step, or what they must hold after it.
  bool caches_are(bool after) {
    for (const Tensor* cache : caches()) {
      if (!*cache) continue;
      std::vector<std::byte> wanted = cache->buffer->bytes;
      for (const auto& [buffer, earlier] : tensors.before) {
        if (!after && buffer == cache->buffer) wanted = earlier.bytes;
      }
      const auto problem =
          conformance::compare_bytes(caches(), on_device.buffers().download(*cache), wanted);
      if (!problem.empty()) return false;
    }
    return true;
  }

  bool output_is_untouched() {
    return on_device.buffers().download(tensors.output) == tensors.output.buffer->bytes;
  }

  TensorView key, value;
  LayerScales scales;
};

TEST(Forward, WritesTheCacheAndAttends) {
  for (const KvCacheDType dtype :
       {KvCacheDType::kAuto, KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead,
        KvCacheDType::kInt4PerTokenHead}) {
    CaseSpec spec = Call::default_spec();
    spec.config.kv_cache_dtype = dtype;
    LayerCall call(spec);
    AttentionMetadataBuilder builder(call.config);
    const AttentionImpl impl(call.config);
    const AttentionMetadata metadata = builder.build(0, call.batch);
    EXPECT_FALSE(metadata.use_cascade);
    call.forward(impl, &metadata);
    EXPECT_TRUE(call.caches_are(true));
    EXPECT_EQ(call.verdict(), "");
  }
}

TEST(Forward, ScalesOfTheLayerReplaceTheCaches) {
  CaseSpec spec = Call::default_spec();
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E5M2;
  LayerCall call(spec);
  call.args.kv_cache.k_scale = 123.0F;
  call.args.kv_cache.v_scale = 456.0F;
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  call.forward(AttentionImpl(call.config), &metadata);
  EXPECT_TRUE(call.caches_are(true));
  EXPECT_EQ(call.verdict(), "");
}

TEST(Forward, WithoutScalesOfTheLayerTheCachesCount) {
  CaseSpec spec = Call::default_spec();
  spec.config.kv_cache_dtype = KvCacheDType::kFp8E4M3;
  for (const bool separately : {false, true}) {
    LayerCall call(spec);
    ASSERT_NE(call.tensors.k_scale(), 1.0F);
    ASSERT_NE(call.tensors.v_scale(), 1.0F);
    call.scales = {};
    AttentionMetadataBuilder builder(call.config);
    const AttentionMetadata metadata = builder.build(0, call.batch);
    const AttentionImpl impl(call.config);
    if (separately) {
      impl.do_kv_cache_update({}, call.key, call.value, call.args.kv_cache,
                              call.batch.slot_mapping);
      EXPECT_TRUE(call.caches_are(true));
      call.key = call.value = {};
    }
    call.forward(impl, &metadata);
    EXPECT_TRUE(call.caches_are(true));
    EXPECT_EQ(call.verdict(), "");
  }
  // One of both: the other stays the cache's.
  LayerCall call(spec);
  call.scales = {.v = call.tensors.v_scale()};
  call.args.kv_cache.v_scale = 456.0F;
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  call.forward(AttentionImpl(call.config), &metadata);
  EXPECT_TRUE(call.caches_are(true));
  EXPECT_EQ(call.verdict(), "");
}

TEST(Forward, Fp8OutputsStaticAndPerGroup) {
  for (const bool block_scale : {false, true}) {
    CaseSpec spec = Call::default_spec();
    spec.output_dtype = DType::kFloat8E4M3;
    spec.block_scale = block_scale;
    LayerCall call(spec);
    AttentionMetadataBuilder builder(call.config);
    const AttentionMetadata metadata = builder.build(0, call.batch);
    call.forward(AttentionImpl(call.config), &metadata);
    EXPECT_EQ(call.verdict(), "");
  }
}

TEST(Forward, ProfilingRunFillsTheOutputWithZeros) {
  for (const bool three_dimensions : {false, true}) {
    CaseSpec spec = Call::default_spec();
    spec.output_3d = three_dimensions;
    spec.output_strided = true;
    LayerCall call(spec);
    call.forward(AttentionImpl(call.config), nullptr);
    EXPECT_TRUE(call.caches_are(false));
    std::vector<std::byte> now = call.on_device.buffers().download(call.tensors.output);
    std::int64_t wrong = 0;
    const std::vector<std::byte>& poison = call.tensors.output.buffer->bytes;
    call.tensors.output.for_each_element([&](std::int64_t offset) {
      wrong += conformance::decode(DType::kFloat32, &now[offset]) != 0 ? 1 : 0;
      std::copy_n(poison.begin() + offset, 4, now.begin() + offset);
    });
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(now == poison) << "wrote between the elements";
  }
}

TEST(Forward, ProfilingRunRefusesWhatIsNoOutput) {
  LayerCall call;
  const AttentionImpl impl(call.config);
  const auto error_of = [&](const TensorView& output) {
    return argument_named_by([&] {
      impl.forward({}, call.args.query, call.key, call.value, call.args.kv_cache, nullptr, output);
    });
  };
  EXPECT_EQ(error_of({}), "output");
  TensorView null_data = call.args.output;
  null_data.data = nullptr;
  EXPECT_EQ(error_of(null_data), "output");
  TensorView no_dimensions = call.args.output;
  no_dimensions.ndim = 0;
  EXPECT_EQ(error_of(no_dimensions), "output");
  TensorView strided = call.args.output;
  strided.strides[1] = 2;
  EXPECT_EQ(error_of(strided), "output");
  TensorView elsewhere = call.args.output;
  elsewhere.device = {DeviceType::kCuda, 0};
  EXPECT_EQ(error_of(elsewhere), "output");
  EXPECT_TRUE(call.output_is_untouched());
}

TEST(Forward, LayerThatSharesAnothersCacheNeverWritesIt) {
  LayerCall call;
  AttentionMetadataBuilder builder(call.config);
  const AttentionImpl impl(call.config, "model.layers.3.attn");
  const AttentionMetadata metadata = builder.build(0, call.batch);
  call.forward(impl, &metadata);
  EXPECT_TRUE(call.caches_are(false));
  impl.do_kv_cache_update(call.scales, call.key, call.value, call.args.kv_cache,
                          call.batch.slot_mapping);
  EXPECT_TRUE(call.caches_are(false));
}

TEST(Forward, SeparateCacheUpdate) {
  LayerCall call;
  AttentionMetadataBuilder builder(call.config);
  const AttentionImpl impl(call.config);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  impl.do_kv_cache_update(call.scales, call.key, call.value, call.args.kv_cache,
                          call.batch.slot_mapping);
  EXPECT_TRUE(call.caches_are(true));
  call.key = call.value = {};
  call.forward(impl, &metadata);
  EXPECT_EQ(call.verdict(), "");
}

TEST(Forward, EverythingIsCheckedBeforeTheCacheIsWritten) {
  struct Wrong {
    const char* argument;
    std::function<void(LayerCall&)> spoil;
  };
  const std::vector<Wrong> wrongs{
      {"query", [](LayerCall& c) { c.args.query.shape[2] = 8; }},
      {"output", [](LayerCall& c) { c.args.output.shape[1] = 3; }},
      {"output", [](LayerCall& c) { c.args.output = {}; }},
      {"lse", [](LayerCall& c) { c.args.lse.dtype = DType::kInt32; }},
      {"output_scale", [](LayerCall& c) { c.args.has_output_scale = true; }},
      {"key", [](LayerCall& c) { c.key = {}; }},
      {"value", [](LayerCall& c) { c.value = {}; }},
      {"key", [](LayerCall& c) { c.key.shape[1] = 1; }},
      {"value", [](LayerCall& c) { c.value.dtype = DType::kFloat16; }},
      {"kv_cache.value", [](LayerCall& c) { c.args.kv_cache.value.shape[3] = 8; }},
      {"kv_cache", [](LayerCall& c) { c.args.kv_cache = {}; }},
      {"kv_cache.key", [](LayerCall& c) { c.args.kv_cache.dtype = KvCacheDType::kFp8E4M3; }}};
  for (const Wrong& wrong : wrongs) {
    LayerCall call;
    AttentionMetadataBuilder builder(call.config);
    const AttentionImpl impl(call.config);
    const AttentionMetadata metadata = builder.build(0, call.batch);
    wrong.spoil(call);
    EXPECT_EQ(argument_named_by([&] { call.forward(impl, &metadata); }), wrong.argument);
    EXPECT_TRUE(call.caches_are(false)) << wrong.argument;
    EXPECT_TRUE(call.output_is_untouched()) << wrong.argument;
  }
}

TEST(Forward, BadIndicesAreFoundBeforeTheCacheIsWritten) {
  for (const bool in_table : {true, false}) {
    LayerCall call;
    call.context.check_indices = true;
    AttentionMetadataBuilder builder(call.config);
    const AttentionMetadata metadata = builder.build(0, call.batch);
    if (in_table) {
      const ConstTensorView& table = call.batch.block_table;
      const_cast<std::int32_t*>(static_cast<const std::int32_t*>(table.data))[1] = 1 << 20;
    } else {
      const ConstTensorView& slots = call.batch.slot_mapping;
      const_cast<std::int64_t*>(static_cast<const std::int64_t*>(slots.data))[2] = 1 << 20;
    }
    EXPECT_EQ(argument_named_by([&] { call.forward(AttentionImpl(call.config), &metadata); }),
              in_table ? "block_table[0][1]" : "slot_mapping[2]");
    EXPECT_TRUE(call.caches_are(false));
    EXPECT_TRUE(call.output_is_untouched());
  }
}

TEST(Forward, MetadataOfAnotherLayerIsRefused) {
  LayerCall call;
  AttentionConfig other = call.config;
  other.head_size_v = 32;
  AttentionMetadataBuilder builder(other);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  EXPECT_EQ(argument_named_by([&] { call.forward(AttentionImpl(call.config), &metadata); }),
            "metadata");
  const AttentionMetadata empty;
  EXPECT_EQ(argument_named_by([&] { call.forward(AttentionImpl(call.config), &empty); }),
            "scheduler_metadata");
}

TEST(Forward, MetadataOfAnEarlierBuildIsRefused) {
  LayerCall call;
  const AttentionImpl impl(call.config);
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata first = builder.build(0, call.batch);
  const AttentionMetadata copy = first;
  const auto refused = [&](const AttentionMetadata& metadata) {
    return argument_named_by([&] { call.forward(impl, &metadata); });
  };
  // Another batch: one sequence instead of two.
  CommonAttentionMetadata other = call.batch;
  other.query_start_loc = other.query_start_loc.slice(0, 0, 2);
  other.seq_lens = other.seq_lens.slice(0, 0, 1);
  const AttentionMetadata second = builder.build(0, other);
  EXPECT_EQ(refused(first), "metadata");
  EXPECT_EQ(refused(copy), "metadata");
  // The same batch again: the older one stays old.
  const AttentionMetadata third = builder.build(0, call.batch);
  EXPECT_EQ(refused(first), "metadata");
  EXPECT_EQ(refused(second), "metadata");
  const AttentionMetadata fourth = builder.build(0, call.batch, true);
  EXPECT_EQ(refused(third), "metadata");
  // Nor is a plan's own update, or another builder's that is a copy, passed over.
  AttentionMetadataBuilder twin = builder;
  const AttentionMetadata of_twin = twin.build(0, call.batch);
  EXPECT_EQ(refused(fourth), "metadata");
  of_twin.scheduler_metadata->update(call.batch);
  EXPECT_EQ(refused(of_twin), "metadata");
  EXPECT_TRUE(call.caches_are(false));
  EXPECT_TRUE(call.output_is_untouched());
  // A build that fails leaves the last one good.
  const AttentionMetadata last = builder.build(0, call.batch);
  other.seq_lens = {};
  EXPECT_EQ(argument_named_by([&] { builder.build(0, other); }), "seq_lens");
  const AttentionMetadata copy_of_last = last;
  call.forward(impl, &copy_of_last);
  EXPECT_EQ(call.verdict(), "");
}

TEST(Forward, MetadataThatDoesNotKeepBatchInvarianceIsRefused) {
  LayerCall call;
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  call.config.batch_invariant = true;
  EXPECT_EQ(argument_named_by([&] { call.forward(AttentionImpl(call.config), &metadata); }),
            "metadata");
  AttentionMetadataBuilder invariant(call.config);
  const AttentionMetadata kept = invariant.build(0, call.batch);
  call.config.batch_invariant = false;
  call.forward(AttentionImpl(call.config), &kept);
  EXPECT_EQ(call.verdict(), "");
}

TEST(Forward, EncoderReadsKeyAndValue) {
  CaseSpec spec = Call::default_spec();
  spec.config.type = AttentionType::kEncoder;
  spec.sequences = {{3, 3}, {5, 5}};
  LayerCall call(spec);
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata metadata = builder.build(0, call.batch);
  call.forward(AttentionImpl(call.config), &metadata);
  EXPECT_EQ(call.verdict(), "");
}

TEST(Builder, Cascade) {
  CaseSpec spec = Call::default_spec();
  spec.sequences = {{1, 40}, {1, 50}, {2, 45}};
  spec.shared_prefix_len = 36;
  LayerCall call(spec);
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata metadata = builder.build(36, call.batch);
  EXPECT_TRUE(metadata.use_cascade);
  EXPECT_EQ(metadata.common_prefix_len, 36);
  call.forward(AttentionImpl(call.config), &metadata);
  EXPECT_EQ(call.verdict(), "");
  call.config.batch_invariant = true;
  EXPECT_FALSE(AttentionMetadataBuilder(call.config).build(36, call.batch).use_cascade);
}

TEST(Backends, SayWhatTheyCanDo) {
  const std::vector<const AttentionBackend*>& backends = attention_backends();
  ASSERT_FALSE(backends.empty());
  for (const AttentionBackend* backend : backends) {
    EXPECT_EQ(&attention_backend(backend->name()), backend);
    EXPECT_FALSE(backend->instruction_set().empty());
    const BackendCapabilities& caps = backend->capabilities();
    EXPECT_LE(caps.min_head_size, 8);
    EXPECT_GE(caps.max_head_size, 576);
    EXPECT_EQ(caps.kv_cache_dtypes.size(), 9U);
    if (!backend->available()) continue;
    Call call;
    call.config.backend = backend->name();
    call.config.device = {backend->device_type(), 0};
    EXPECT_TRUE(backend->supports(call.config).empty());
  }
}

}  // namespace
}  // namespace quire
