// Tensor views: const memory, shapes from any range, and what counts as the same cache.
#include <gtest/gtest.h>

#include <array>
#include <list>
#include <span>
#include <type_traits>
#include <vector>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;

static_assert(std::is_convertible_v<TensorView, ConstTensorView>);
static_assert(!std::is_convertible_v<ConstTensorView, TensorView>);
static_assert(!std::is_constructible_v<TensorView, const float*, DType, Sizes>);
static_assert(std::is_constructible_v<ConstTensorView, const float*, DType, Sizes>);

TEST(TensorViews, ShapesFromAnyRange) {
  float data[24] = {};
  const std::vector<std::int64_t> shape{2, 3, 4};
  const std::array<int, 3> strides{12, 4, 1};
  const std::size_t sizes[] = {2, 3, 4};
  const std::list<short> list{2, 3, 4};
  const TensorView expected(data, DType::kFloat32, {2, 3, 4}, {12, 4, 1});
  for (const TensorView& view :
       {TensorView(data, DType::kFloat32, shape), TensorView(data, DType::kFloat32, sizes),
        TensorView(data, DType::kFloat32, list),
        TensorView(data, DType::kFloat32, std::span(shape)),
        TensorView(data, DType::kFloat32, shape, strides),
        TensorView(data, DType::kFloat32, {2, 3, 4}, std::span(strides)),
        TensorView(data, DType::kFloat32, {2, 3, 4}, Device{})}) {
    EXPECT_EQ(view.ndim, 3);
    EXPECT_EQ(view.shape, expected.shape);
    EXPECT_EQ(view.strides, expected.strides);
  }
  EXPECT_EQ(TensorView(data, DType::kFloat32, std::vector<int>()).ndim, 0);
  const std::vector<int> too_many(7, 1);
  EXPECT_EQ(argument_named_by([&] { TensorView(data, DType::kFloat32, too_many); }), "shape");
  EXPECT_EQ(argument_named_by([&] { TensorView(data, DType::kFloat32, shape, too_many); }),
            "shape");
  EXPECT_EQ(argument_named_by([&] {
              TensorView(data, DType::kFloat32, shape, std::vector<int>{1, 1});
            }),
            "strides");
}

TEST(TensorViews, OfConstMemory) {
  const std::vector<float> data(24);
  const ConstTensorView view(data.data(), DType::kFloat32, {2, 3, 4});
  EXPECT_EQ(view.select(0, 1).data, data.data() + 12);
  EXPECT_EQ(view.slice(1, 1, 2).data, data.data() + 4);
  EXPECT_EQ(view.transpose(0, 2).shape[0], 4);
  const TensorView writable(nullptr, DType::kBFloat16, {4}, {2}, {DeviceType::kCuda, 1});
  const ConstTensorView same = writable;
  EXPECT_EQ(same.to_string(), writable.to_string());
}

// Everything that a step reads, const. Compiling is most of the test.
TEST(TensorViews, AStepOverConstInputs) {
  const std::vector<std::int32_t> query_start_loc{0, 2}, seq_lens{2}, block_table{0};
  const std::vector<std::int64_t> slots{0, 1};
  const std::vector<float> query(2 * 8, 1.0F), key(2 * 8, 1.0F), value(2 * 8, 3.0F), sinks(1, -99);
  std::vector<float> cache_memory(2 * 4 * 8), output(2 * 8);
  using enum DType;
  CommonAttentionMetadata batch;
  batch.query_start_loc = {query_start_loc.data(), kInt32, {2}};
  batch.seq_lens = {seq_lens.data(), kInt32, {1}};
  batch.block_table = {block_table.data(), kInt32, {1, 1}};
  batch.num_actual_tokens = 2;
  Plan plan({.dtype = kFloat32,
             .num_heads = 1,
             .num_kv_heads = 1,
             .head_size = 8,
             .score = {.sinks = {sinks.data(), kFloat32, {1}}},
             .block_size = 4});
  plan.update(batch);
  const auto cache = PagedKvCache::from_combined({cache_memory.data(), kFloat32, {1, 2, 4, 1, 8}});
  write_kv_cache({key.data(), kFloat32, {2, 1, 8}}, {value.data(), kFloat32, {2, 1, 8}}, cache,
                 {slots.data(), kInt64, {2}});
  attention(plan, {.query = {query.data(), kFloat32, {2, 1, 8}},
                   .kv_cache = cache,
                   .output = {output.data(), kFloat32, {2, 8}}});
  for (const float x : output) EXPECT_NEAR(x, 3.0F, 1e-5F);
}

CaseSpec spec_of(DType model_dtype, KvCacheDType kv_cache_dtype) {
  CaseSpec spec = Call::default_spec();
  spec.model_dtype = spec.config.dtype = model_dtype;
  spec.config.kv_cache_dtype = kv_cache_dtype;
  return spec;
}

TEST(CacheKinds, ADTypeSpelledOutIsAutoOfThatDType) {
  for (const auto& [model, spelled] : {std::pair{DType::kFloat16, KvCacheDType::kFloat16},
                                       {DType::kBFloat16, KvCacheDType::kBFloat16},
                                       {DType::kFloat32, KvCacheDType::kFloat32}}) {
    for (const AttentionBackend* backend : best_backends()) {
      for (const bool plan_spells : {false, true}) {
        Call call(spec_of(model, KvCacheDType::kAuto), *backend);
        call.config.kv_cache_dtype = plan_spells ? spelled : KvCacheDType::kAuto;
        call.args.kv_cache.dtype = plan_spells ? KvCacheDType::kAuto : spelled;
        call.run();
        EXPECT_EQ(call.verdict(), "") << backend->name();
        // Layers and their metadata too.
        AttentionMetadataBuilder builder(call.config);
        AttentionConfig other = call.config;
        other.kv_cache_dtype = call.args.kv_cache.dtype;
        const AttentionMetadata metadata = builder.build(0, call.batch);
        AttentionImpl(other).forward({}, call.args.query, {}, {}, call.args.kv_cache, &metadata,
                                     call.args.output);
      }
    }
  }
  // A cache of another float type is another kind, whichever side says it.
  Call call(spec_of(DType::kBFloat16, KvCacheDType::kAuto));
  call.config.kv_cache_dtype = KvCacheDType::kFloat16;
  EXPECT_EQ(argument_named_by([&] { call.run(); }), "kv_cache.key");
  call.config.kv_cache_dtype = KvCacheDType::kAuto;
  call.args.kv_cache.dtype = KvCacheDType::kFloat16;
  EXPECT_EQ(argument_named_by([&] { call.run(); }), "kv_cache.key");  // it holds bf16
  call.args.kv_cache.key.dtype = call.args.kv_cache.value.dtype = DType::kFloat16;
  EXPECT_EQ(argument_named_by([&] { call.run(); }), "kv_cache.dtype");
  EXPECT_EQ(call.damage(), "");
}

TEST(CacheKinds, BytesStandForFp8AndInt8) {
  for (const KvCacheDType dtype :
       {KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E5M2, KvCacheDType::kInt8PerTokenHead,
        KvCacheDType::kFp8E4M3PerTokenHead}) {
    for (const AttentionBackend* backend : best_backends()) {
      // Attention over key and value views of bytes.
      Call call(spec_of(DType::kFloat32, dtype), *backend);
      PagedKvCache& cache = call.args.kv_cache;
      cache.key.dtype = cache.value.dtype = DType::kUInt8;
      call.run();
      EXPECT_EQ(call.verdict(), "") << to_string(dtype) << " on " << backend->name();
      // The write into them: the same step again leaves what is there.
      auto& buffers = call.on_device.buffers();
      write_kv_cache(buffers.view(call.tensors.key), buffers.view(call.tensors.value), cache,
                     call.batch.slot_mapping);
      EXPECT_EQ(buffers.download(call.tensors.key_cache), call.tensors.key_cache.buffer->bytes);
      EXPECT_EQ(buffers.download(call.tensors.value_cache), call.tensors.value_cache.buffer->bytes);
      // One of both is enough, and bytes are not another kind's elements.
      cache.key.dtype = storage_dtype(dtype, DType::kNone);
      EXPECT_EQ(argument_named_by([&] { call.run(); }), "(no error)");
      cache.dtype = KvCacheDType::kAuto;
      cache.key.dtype = DType::kUInt8;
      EXPECT_EQ(argument_named_by([&] { call.run(); }), "kv_cache.key");
    }
  }
}

}  // namespace
}  // namespace quire
