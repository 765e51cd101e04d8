// What an AttentionBackend answers for vLLM's class methods: dtypes, head sizes, cache shapes, a
// builder and a layer; and caches with inline scales, which the shapes are of.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;
using conformance::make_tensor;
using conformance::Tensor;
using testing::ElementsAre;

class ClassMethods : public testing::TestWithParam<const AttentionBackend*> {};

TEST_P(ClassMethods, DTypes) {
  const AttentionBackend& backend = *GetParam();
  EXPECT_EQ(backend.supported_dtypes(), backend.capabilities().dtypes);
  EXPECT_THAT(backend.supported_dtypes(), testing::Contains(DType::kBFloat16));
  EXPECT_EQ(backend.supported_kv_cache_dtypes(), backend.capabilities().kv_cache_dtypes);
}

TEST_P(ClassMethods, HeadSizes) {
  const AttentionBackend& backend = *GetParam();
  for (const std::int64_t good : {8, 80, 128, 576}) backend.validate_head_size(good);
  for (const std::int64_t bad : {-1, 0, 7, 577}) {
    EXPECT_EQ(argument_named_by([&] { backend.validate_head_size(bad); }), "head_size");
  }
  EXPECT_THAT([&] { backend.validate_head_size(7); },
              testing::ThrowsMessage<Error>("head_size: expected 8 to 576, got 7"));
}

TEST_P(ClassMethods, CacheShapes) {
  const AttentionBackend& backend = *GetParam();
  for (const char* name : {"auto", "bfloat16", "fp8", "fp8_e5m2"}) {
    EXPECT_THAT(backend.kv_cache_shape(10, 16, 8, 130, name), ElementsAre(10, 2, 16, 8, 130));
  }
  for (const char* name : {"int8_per_token_head", "fp8_per_token_head"}) {
    EXPECT_THAT(backend.kv_cache_shape(10, 16, 8, 128, name), ElementsAre(10, 2, 16, 8, 132));
    EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 16, 8, 130, name); }),
              "head_size");
  }
  EXPECT_THAT(backend.kv_cache_shape(10, 16, 8, 128, "int4_per_token_head"),
              ElementsAre(10, 2, 16, 8, 68));
  EXPECT_THAT([&] { backend.kv_cache_shape(10, 16, 8, 132, "int4_per_token_head"); },
              testing::ThrowsMessage<Error>(
                  "head_size: expected a multiple of 8 with inline scales, got 132"));
  EXPECT_THAT(backend.kv_cache_shape(10, 16, 8, 128), ElementsAre(10, 2, 16, 8, 128));
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(-1, 16, 8, 128); }), "num_blocks");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(0, 16, 8, 128); }), "num_blocks");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 0, 8, 128); }), "block_size");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 1 << 21, 8, 128); }), "block_size");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 16, 0, 128); }), "num_kv_heads");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 16, 8, 0); }), "head_size");
  EXPECT_EQ(argument_named_by([&] { backend.kv_cache_shape(10, 16, 8, 128, "fp4"); }),
            "cache_dtype_str");
}

TEST(AdvisedBlockBytes, KeepsClearOfSlowDistances) {
  constexpr std::int64_t kKiB = 1024;
  EXPECT_EQ(advised_block_bytes(64 * kKiB), 64 * kKiB);
  for (const std::int64_t slow : {320 * kKiB, 640 * kKiB, 752 * kKiB, 3008 * kKiB, 3760 * kKiB}) {
    EXPECT_EQ(advised_block_bytes(slow), slow + 4 * kKiB);
    EXPECT_EQ(advised_block_bytes(slow, 256), slow + 4 * kKiB);
    EXPECT_EQ(advised_block_bytes(slow, 8 * kKiB), slow + 8 * kKiB);
    EXPECT_EQ(advised_block_bytes(slow - 4 * kKiB), slow - 4 * kKiB);
  }
  // 640 + 112 is the next slow one.
  EXPECT_EQ(advised_block_bytes(640 * kKiB, 112 * kKiB), (640 + 2 * 112) * kKiB);
  EXPECT_EQ(advised_block_bytes(320 * kKiB, 320 * kKiB), 320 * kKiB) << "nothing would help";
  EXPECT_EQ(argument_named_by([] { advised_block_bytes(0); }), "block_bytes");
  EXPECT_EQ(argument_named_by([] { advised_block_bytes(1, 0); }), "step");
  EXPECT_EQ(argument_named_by([] { advised_block_bytes(1, std::int64_t{1} << 62); }), "step");
}

TEST_P(ClassMethods, BuilderAndLayer) {
  const AttentionBackend& backend = *GetParam();
  Call call(Call::default_spec(), backend);
  call.config.backend.clear();
  AttentionMetadataBuilder builder = backend.make_builder(call.config);
  const AttentionImpl impl = backend.make_impl(call.config);
  EXPECT_EQ(impl.config().backend, backend.name());
  const AttentionMetadata metadata = builder.build(0, call.batch);
  EXPECT_STREQ(metadata.scheduler_metadata->backend_name(), backend.name());
  const auto run = [&](const AttentionImpl& layer) {
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    layer.forward({}, call.args.query, buffers.view(call.tensors.key),
                  buffers.view(call.tensors.value), call.args.kv_cache, &metadata, call.args.output,
                  std::nullopt, {}, call.args.lse);
  };
  run(impl);
  EXPECT_EQ(call.verdict(), "");

  // A layer that shares another's cache does not write it.
  conformance::DeviceBuffers& buffers = call.on_device.buffers();
  const std::vector<std::byte> zeros(call.tensors.key_cache.buffer->bytes.size());
  buffers.store(call.tensors.key_cache, zeros);
  run(backend.make_impl(call.config, "model.layers.3.attn"));
  EXPECT_TRUE(buffers.download(call.tensors.key_cache) == zeros);

  call.config.backend = std::string(backend.name()) == "cpu" ? "reference" : "cpu";
  EXPECT_EQ(argument_named_by([&] { backend.make_builder(call.config); }), "backend");
  EXPECT_EQ(argument_named_by([&] { backend.make_impl(call.config); }), "backend");
  call.config.backend.clear();
  call.config.head_size = 7;
  EXPECT_EQ(argument_named_by([&] { backend.make_builder(call.config); }), "head_size");
  EXPECT_EQ(argument_named_by([&] { backend.make_impl(call.config); }), "head_size");
}

// One tensor for a call's cache, scales behind their rows.
class InlineCache {
 public:
  InlineCache(Call& call, const AttentionBackend& backend, bool packed) {
    const AttentionConfig& config = call.config;
    const std::int64_t num_blocks = call.args.kv_cache.num_blocks();
    const KvCacheDType dtype = config.kv_cache_dtype;
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    if (packed) {
      const std::int64_t row = stored_head_size(dtype, config.head_size) + 4 +
                               stored_head_size(dtype, config.value_head_size()) + 4;
      whole_ =
          make_tensor(DType::kUInt8, {num_blocks, config.num_kv_heads, config.block_size, row});
      cache = PagedKvCache::from_packed(buffers.view(whole_), config.head_size, dtype,
                                        ScaleLayout::kInline);
    } else {
      whole_ = make_tensor(
          DType::kUInt8, backend.kv_cache_shape(num_blocks, config.block_size, config.num_kv_heads,
                                                config.head_size, to_string(dtype)));
      cache = PagedKvCache::from_combined(buffers.view(whole_), dtype, ScaleLayout::kInline);
    }
  }

  // Row (block, slot, head) of K or V, its scale behind it; rows of K have `key_bytes`.
  std::byte* row(bool value, std::int64_t block, std::int64_t slot, std::int64_t head,
                 std::int64_t key_bytes) const {
    if (whole_.shape.size() == 5) return whole_.at({block, value ? 1 : 0, slot, head, 0});
    return whole_.at({block, head, slot, value ? key_bytes + 4 : 0});
  }
  // Calls visit(value?, block, slot, head) for each row of a call's cache.
  template <class Visit>
  static void for_each_row(const Call& call, Visit visit) {
    for (std::int64_t block = 0; block < call.args.kv_cache.num_blocks(); ++block) {
      for (std::int64_t slot = 0; slot < call.config.block_size; ++slot) {
        for (std::int64_t head = 0; head < call.config.num_kv_heads; ++head) {
          for (const bool value : {false, true}) visit(value, block, slot, head);
        }
      }
    }
  }
  const Tensor& whole() const { return whole_; }

  PagedKvCache cache;

 private:
  Tensor whole_;
};

TEST_P(ClassMethods, CachesWithInlineScales) {
  for (const KvCacheDType dtype :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead,
        KvCacheDType::kInt4PerTokenHead}) {
    for (const bool packed : {false, true}) {
      CaseSpec spec = Call::default_spec();
      spec.config.kv_cache_dtype = dtype;
      if (packed) spec.config.head_size_v = 24;
      Call call(spec, *GetParam());
      const std::int64_t sizes[] = {stored_head_size(dtype, spec.config.head_size),
                                    stored_head_size(dtype, spec.config.value_head_size())};
      InlineCache made(call, *GetParam(), packed);
      conformance::DeviceBuffers& buffers = call.on_device.buffers();
      // Attention reads rows and scales out of the one tensor.
      InlineCache::for_each_row(call, [&](bool value, std::int64_t block, std::int64_t slot,
                                          std::int64_t head) {
        const Tensor& from = value ? call.tensors.value_cache : call.tensors.key_cache;
        const Tensor& scales = value ? call.tensors.v_scale_cache : call.tensors.k_scale_cache;
        std::byte* row = made.row(value, block, slot, head, sizes[0]);
        std::memcpy(row, from.at({block, slot, head, 0}), static_cast<std::size_t>(sizes[value]));
        std::memcpy(row + sizes[value], scales.at({block, slot, head}), 4);
      });
      buffers.restore(made.whole());
      const PagedKvCache separate = call.args.kv_cache;
      call.args.kv_cache = made.cache;
      call.run();
      EXPECT_EQ(call.verdict(), "") << to_string(dtype) << " packed " << packed;

      // A write stores the same bytes as into separate tensors, and changes no others.
      Context context;
      context.backend = GetParam()->name();
      write_kv_cache(buffers.view(call.tensors.key), buffers.view(call.tensors.value), separate,
                     call.batch.slot_mapping, context);
      write_kv_cache(buffers.view(call.tensors.key), buffers.view(call.tensors.value), made.cache,
                     call.batch.slot_mapping, context);
      EXPECT_TRUE(buffers.download(made.whole()) == made.whole().buffer->bytes);
      EXPECT_EQ(call.on_device.damage(), "");
      // Of zeros, too: what was there before does not help.
      buffers.store(made.whole(), std::vector<std::byte>(made.whole().buffer->bytes.size()));
      write_kv_cache(buffers.view(call.tensors.key), buffers.view(call.tensors.value), made.cache,
                     call.batch.slot_mapping, context);
      const std::vector<std::byte> written = buffers.download(made.whole());
      std::int64_t rows = 0;
      InlineCache::for_each_row(
          call, [&](bool value, std::int64_t block, std::int64_t slot, std::int64_t head) {
            const std::byte* wanted = made.row(value, block, slot, head, sizes[0]);
            const std::byte* got = written.data() + (wanted - made.whole().buffer->bytes.data());
            const auto bytes = static_cast<std::size_t>(sizes[value] + 4);
            rows += std::memcmp(got, wanted, bytes) == 0 ? 1 : 0;
          });
      // Four tokens of two heads, K and V.
      EXPECT_EQ(rows, 16) << to_string(dtype) << " packed " << packed;
    }
  }
}

TEST(InlineScales, WrongTensorsAreRefused) {
  alignas(16) static char memory[4096];
  const KvCacheDType int8 = KvCacheDType::kInt8PerTokenHead;
  const auto combined = [&](const TensorView& view, KvCacheDType dtype) {
    return argument_named_by(
        [&] { PagedKvCache::from_combined(view, dtype, ScaleLayout::kInline); });
  };
  const auto packed = [&](const TensorView& view, std::int64_t head_size) {
    return argument_named_by(
        [&] { PagedKvCache::from_packed(view, head_size, int8, ScaleLayout::kInline); });
  };
  const auto bytes = [](const Sizes& shape, int offset = 0) {
    return TensorView(memory + offset, DType::kInt8, shape);
  };
  EXPECT_EQ(combined(bytes({2, 2, 4, 2, 20}), int8), "(no error)");
  EXPECT_EQ(combined(bytes({2, 2, 4, 2, 20}), KvCacheDType::kFp8E4M3), "kv_cache");
  EXPECT_EQ(combined(TensorView(memory, DType::kUInt8, {2, 2, 4, 2, 20}), KvCacheDType::kFp8E4M3),
            "scales");
  EXPECT_EQ(combined(TensorView(memory, DType::kFloat32, {2, 2, 4, 2, 20}), KvCacheDType::kAuto),
            "scales");
  EXPECT_EQ(combined(bytes({2, 2, 4, 2, 4}), int8), "kv_cache");   // no room for a row
  EXPECT_EQ(combined(bytes({2, 2, 4, 2, 21}), int8), "kv_cache");  // 17 elements before the scale
  EXPECT_EQ(combined(bytes({2, 2, 4, 2, 20}, 1), int8), "kv_cache");
  const TensorView apart(memory, DType::kInt8, {2, 2, 4, 2, 20}, {352, 176, 44, 22, 1});
  EXPECT_EQ(combined(apart, int8), "kv_cache");  // every other head's scale
  EXPECT_EQ(packed(bytes({2, 2, 4, 40}), 16), "(no error)");
  EXPECT_EQ(packed(bytes({2, 2, 4, 40}), 32), "head_size");
  EXPECT_EQ(packed(bytes({2, 2, 4, 40}), 0), "head_size");
  EXPECT_EQ(packed(bytes({2, 2, 4, 40}), 14), "kv_cache");
  EXPECT_EQ(packed(bytes({2, 2, 4, 42}), 16), "kv_cache");
}

INSTANTIATE_TEST_SUITE_P(Backends, ClassMethods,
                         testing::ValuesIn(conformance::available_backends()),
                         conformance::backend_name);

}  // namespace
}  // namespace quire
