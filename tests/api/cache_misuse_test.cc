// write_kv_cache(), merge_states(), cache views and tensor views with wrong arguments.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::DeviceBuffers;
using conformance::make_tensor;
using conformance::memory_of;
using conformance::Tensor;

class WriteCall {
 public:
  explicit WriteCall(KvCacheDType dtype = KvCacheDType::kAuto, DeviceType device = DeviceType::kCpu)
      : buffers_(&memory_of(device)) {
    const DType storage = storage_dtype(dtype, DType::kFloat32);
    key = buffers_.view(make_tensor(DType::kFloat32, {3, 2, 8}));
    value = buffers_.view(make_tensor(DType::kFloat32, {3, 2, 12}));
    cache.dtype = dtype;
    cache.key = buffers_.view(make_tensor(storage, {4, 4, 2, stored_head_size(dtype, 8)}));
    cache.value = buffers_.view(make_tensor(storage, {4, 4, 2, stored_head_size(dtype, 12)}));
    if (is_per_token_head(dtype)) {
      cache.k_scale_cache = buffers_.view(make_tensor(DType::kFloat32, {4, 4, 2}));
      cache.v_scale_cache = buffers_.view(make_tensor(DType::kFloat32, {4, 4, 2}));
    }
    Tensor slots = make_tensor(DType::kInt64, {3});
    for (std::int64_t i = 0; i < 3; ++i) slots.set_int64(i, i);
    slot_mapping = buffers_.view(slots);
  }

  std::string run() {
    return argument_named_by([&] { write_kv_cache(key, value, cache, slot_mapping, context); });
  }
  std::string damage() { return buffers_.damage({}); }

  TensorView key, value, slot_mapping;
  PagedKvCache cache;
  Context context;

 private:
  DeviceBuffers buffers_;
};

using Spoil = std::function<void(WriteCall&)>;

void expect_write_error(const char* argument, const Spoil& spoil,
                        KvCacheDType dtype = KvCacheDType::kAuto) {
  for (const AttentionBackend* backend : best_backends()) {
    WriteCall call(dtype, backend->device_type());
    spoil(call);
    EXPECT_EQ(call.run(), argument) << backend->name();
    EXPECT_EQ(call.damage(), "") << argument << " on " << backend->name();
  }
}

// The mistakes that every tensor can have.
void expect_tensor_errors(const char* argument, const std::function<TensorView&(WriteCall&)>& view,
                          DType bad, KvCacheDType dtype = KvCacheDType::kAuto,
                          bool unit_last_stride = true) {
  expect_write_error(
      argument, [&](WriteCall& c) { view(c) = {}; }, dtype);
  expect_write_error(
      argument, [&](WriteCall& c) { view(c).dtype = bad; }, dtype);
  expect_write_error(
      argument, [&](WriteCall& c) { --view(c).ndim; }, dtype);
  expect_write_error(
      argument, [&](WriteCall& c) { view(c).shape[0] = -2; }, dtype);
  expect_write_error(
      argument, [&](WriteCall& c) { view(c).data = nullptr; }, dtype);
  for (const std::size_t other : {0U, 1U}) {
    expect_write_error(
        argument, [&](WriteCall& c) { view(c).device = other_devices(c.cache.key.device)[other]; },
        dtype);
  }
  if (!unit_last_stride) return;
  expect_write_error(
      argument, [&](WriteCall& c) { view(c).strides[view(c).ndim - 1] = 3; }, dtype);
}

TEST(WriteMisuse, CorrectCallWrites) {
  for (const AttentionBackend* backend : best_backends()) {
    for (int kind = 0; kind <= static_cast<int>(KvCacheDType::kInt4PerTokenHead); ++kind) {
      WriteCall call(static_cast<KvCacheDType>(kind), backend->device_type());
      EXPECT_EQ(call.run(), "(no error)") << backend->name();
    }
  }
}

TEST(WriteMisuse, DeviceThatDoesNotExist) {
  expect_write_error("kv_cache.key", [](WriteCall& c) {
    for (TensorView* view : {&c.key, &c.value, &c.cache.key, &c.cache.value, &c.slot_mapping}) {
      view->device.index = 99;
    }
  });
}

TEST(WriteMisuse, KeyAndValue) {
  expect_tensor_errors(
      "key", [](WriteCall& c) -> TensorView& { return c.key; }, DType::kInt8);
  expect_tensor_errors(
      "value", [](WriteCall& c) -> TensorView& { return c.value; }, DType::kFloat16);
  for (const int dim : {0, 1, 2}) {
    expect_write_error("key", [dim](WriteCall& c) { --c.key.shape[dim]; });
    expect_write_error("value", [dim](WriteCall& c) { --c.value.shape[dim]; });
  }
}

TEST(WriteMisuse, Slots) {
  expect_tensor_errors(
      "slot_mapping", [](WriteCall& c) -> TensorView& { return c.slot_mapping; }, DType::kInt32,
      KvCacheDType::kAuto, true);
  expect_write_error("key", [](WriteCall& c) { c.slot_mapping.shape[0] = 4; });
}

TEST(WriteMisuse, Cache) {
  // Of a cache that is not there, nobody can say on which device.
  for (const bool is_key : {true, false}) {
    const char* argument = is_key ? "kv_cache.key" : "kv_cache.value";
    const auto view = [is_key](WriteCall& c) -> TensorView& {
      return is_key ? c.cache.key : c.cache.value;
    };
    expect_write_error(argument, [&](WriteCall& c) { view(c) = {}; });
    expect_write_error(argument, [&](WriteCall& c) { view(c).dtype = DType::kInt32; });
    expect_write_error(argument, [&](WriteCall& c) { --view(c).ndim; });
    expect_write_error(argument, [&](WriteCall& c) { view(c).data = nullptr; });
    expect_write_error(argument, [&](WriteCall& c) { view(c).strides[3] = 2; });
    expect_write_error(
        argument, [&](WriteCall& c) { view(c).dtype = DType::kInt8; }, KvCacheDType::kFp8E4M3);
  }
  for (const int dim : {0, 1, 2}) {
    expect_write_error("kv_cache.value", [dim](WriteCall& c) { --c.cache.value.shape[dim]; });
  }
  expect_write_error("kv_cache.key", [](WriteCall& c) {
    c.cache.key.shape[1] = c.cache.value.shape[1] = 0;  // no slots in a block
  });
}

TEST(WriteMisuse, Scales) {
  for (const KvCacheDType dtype :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead,
        KvCacheDType::kInt4PerTokenHead}) {
    expect_tensor_errors(
        "kv_cache.k_scale_cache", [](WriteCall& c) -> TensorView& { return c.cache.k_scale_cache; },
        DType::kFloat16, dtype, false);
    expect_tensor_errors(
        "kv_cache.v_scale_cache", [](WriteCall& c) -> TensorView& { return c.cache.v_scale_cache; },
        DType::kFloat16, dtype, false);
  }
  for (const float bad : {0.0F, -1.0F, std::numeric_limits<float>::quiet_NaN()}) {
    expect_write_error(
        "kv_cache.k_scale", [bad](WriteCall& c) { c.cache.k_scale = bad; }, KvCacheDType::kFp8E5M2);
    expect_write_error(
        "kv_cache.v_scale", [bad](WriteCall& c) { c.cache.v_scale = bad; }, KvCacheDType::kFp8E4M3);
  }
}

TEST(WriteMisuse, Int4) {
  const KvCacheDType int4 = KvCacheDType::kInt4PerTokenHead;
  for (const DType dtype : {DType::kInt8, DType::kFloat8E4M3, DType::kFloat32}) {
    expect_write_error(
        "kv_cache.key", [&](WriteCall& c) { c.cache.key.dtype = dtype; }, int4);
  }
  // The cache has half as many bytes as the rows have elements, and not another number.
  expect_write_error(
      "key", [](WriteCall& c) { --c.cache.key.shape[3]; }, int4);
  expect_write_error(
      "value", [](WriteCall& c) { --c.cache.value.shape[3]; }, int4);
  expect_write_error(
      "key", [](WriteCall& c) { --c.key.shape[2]; }, int4);
  expect_write_error(
      "kv_cache.key", [](WriteCall& c) { c.cache.key.shape[3] = 289; }, int4);
  expect_write_error(
      "kv_cache.value", [](WriteCall& c) { c.cache.value.shape[3] = 289; }, int4);
}

TEST(WriteMisuse, SlotsWhenAskedToLook) {
  WriteCall call;
  static_cast<std::int64_t*>(call.slot_mapping.data)[1] = 16;  // the cache has 16 slots
  call.context.check_indices = true;
  EXPECT_EQ(call.run(), "slot_mapping[1]");
  static_cast<std::int64_t*>(call.slot_mapping.data)[1] = -7;
  EXPECT_EQ(call.run(), "(no error)");
}

TEST(CacheViews, FromCombined) {
  float data[64] = {};
  const auto error_of = [&](const TensorView& view, KvCacheDType dtype = KvCacheDType::kAuto) {
    return argument_named_by([&] { PagedKvCache::from_combined(view, dtype); });
  };
  const TensorView good(data, DType::kFloat32, {2, 2, 4, 1, 4});
  const PagedKvCache cache = PagedKvCache::from_combined(good);
  EXPECT_EQ(cache.num_blocks(), 2);
  EXPECT_EQ(cache.block_size(), 4);
  EXPECT_EQ(cache.value.data, data + 16);
  EXPECT_EQ(error_of(TensorView(data, DType::kFloat32, {2, 4, 1, 4})), "kv_cache");
  EXPECT_EQ(error_of(TensorView(data, DType::kFloat32, {2, 3, 4, 1, 2})), "kv_cache");
  EXPECT_EQ(error_of({}), "kv_cache");
  // Documented: throws on another dtype.
  EXPECT_EQ(error_of(good, KvCacheDType::kFp8E4M3), "kv_cache");
  EXPECT_EQ(error_of(TensorView(data, DType::kInt32, {2, 2, 4, 1, 4})), "kv_cache");
}

TEST(CacheViews, FromPacked) {
  float data[64] = {};
  const TensorView packed(data, DType::kFloat32, {2, 1, 4, 8});
  const PagedKvCache cache = PagedKvCache::from_packed(packed, 3);
  EXPECT_EQ(cache.key.shape[3], 3);
  EXPECT_EQ(cache.value.shape[3], 5);
  EXPECT_EQ(cache.value.data, data + 3);
  for (const std::int64_t bad : {0, -1, 8, 9}) {
    EXPECT_EQ(argument_named_by([&] { PagedKvCache::from_packed(packed, bad); }), "head_size");
  }
  EXPECT_EQ(argument_named_by([&] {
              PagedKvCache::from_packed(TensorView(data, DType::kFloat32, {4, 8}), 3);
            }),
            "kv_cache");
}

TEST(CacheViews, FromPackedInt4) {
  float data[64] = {};
  const KvCacheDType int4 = KvCacheDType::kInt4PerTokenHead;
  const TensorView packed(data, DType::kUInt8, {2, 1, 4, 8});  // 16 elements of K and V together
  const PagedKvCache cache = PagedKvCache::from_packed(packed, 6, int4);
  EXPECT_EQ(cache.key.shape[3], 3);
  EXPECT_EQ(cache.value.shape[3], 5);
  EXPECT_EQ(static_cast<char*>(cache.value.data), reinterpret_cast<char*>(data) + 3);
  for (const std::int64_t bad : {-2, 0, 1, 5, 16, 18}) {
    EXPECT_EQ(argument_named_by([&] { PagedKvCache::from_packed(packed, bad, int4); }),
              "head_size");
  }
  EXPECT_EQ(argument_named_by([&] {
              PagedKvCache::from_packed(TensorView(data, DType::kInt8, {2, 1, 4, 8}), 6, int4);
            }),
            "kv_cache");
}

TEST(CacheViews, NamesOfDTypes) {
  for (const char* name : {"auto", "float16", "bfloat16", "float32", "fp8_e4m3", "fp8_e5m2",
                           "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"}) {
    EXPECT_STREQ(to_string(parse_kv_cache_dtype(name)), name);
  }
  EXPECT_EQ(parse_kv_cache_dtype("fp8"), KvCacheDType::kFp8E4M3);
  for (const char* name : {"", "FP8", "int4", "fp8 "}) {
    EXPECT_EQ(argument_named_by([&] { parse_kv_cache_dtype(name); }), "kv_cache_dtype");
  }
}

TEST(TensorViews, Construction) {
  float data[8] = {};
  EXPECT_EQ(argument_named_by([&] { TensorView(data, DType::kFloat32, {2, 4}, {1}); }), "strides");
  EXPECT_EQ(argument_named_by([&] {
              TensorView(data, DType::kFloat32, {1, 1, 1, 1, 1, 1, 1});
            }),
            "shape");
  const TensorView view(data, DType::kFloat32, {2, 4});
  EXPECT_EQ(argument_named_by([&] { view.select(2, 0); }), "dim");
  EXPECT_EQ(argument_named_by([&] { view.select(1, 4); }), "i");
  EXPECT_EQ(argument_named_by([&] { view.slice(1, 3, 2); }), "begin");
  EXPECT_EQ(argument_named_by([&] { view.transpose(0, -1); }), "dim");
  EXPECT_EQ(view.select(0, 1).data, data + 4);
  EXPECT_EQ(view.transpose(0, 1).strides[0], 1);
  EXPECT_FALSE(view.transpose(0, 1).is_contiguous());
}

TEST(MergeMisuse, EveryArgument) {
  struct Merge {
    TensorView o_a, lse_a, o_b, lse_b, output, lse;
  };
  struct Wrong {
    const char* argument;
    std::function<void(Merge&)> spoil;
  };
  const std::vector<Wrong> wrongs{
      {"o_a", [](Merge& m) { m.o_a = {}; }},
      {"o_a", [](Merge& m) { m.o_a.dtype = DType::kInt8; }},
      {"o_a", [](Merge& m) { m.o_a.ndim = 2; }},
      {"o_a", [](Merge& m) { m.o_a.strides[2] = 2; }},
      {"o_a", [](Merge& m) { m.o_a.data = nullptr; }},
      {"lse_a", [](Merge& m) { m.lse_a = {}; }},
      {"lse_a", [](Merge& m) { m.lse_a.dtype = DType::kFloat16; }},
      {"lse_a", [](Merge& m) { m.lse_a.shape[0] = 1; }},
      {"lse_a", [](Merge& m) { m.lse_a.shape[1] = 2; }},
      {"o_b", [](Merge& m) { m.o_b = {}; }},
      {"o_b", [](Merge& m) { m.o_b.dtype = DType::kFloat16; }},
      {"o_b", [](Merge& m) { m.o_b.shape[1] = 1; }},
      {"lse_b", [](Merge& m) { m.lse_b = {}; }},
      {"lse_b", [](Merge& m) { m.lse_b.data = nullptr; }},
      {"output", [](Merge& m) { m.output = {}; }},
      {"output", [](Merge& m) { m.output.shape[0] = 2; }},
      {"output", [](Merge& m) { m.output.dtype = DType::kBFloat16; }},
      {"output", [](Merge& m) { m.output.device = other_devices(m.o_a.device)[0]; }},
      {"o_b", [](Merge& m) { m.o_b.device = other_devices(m.o_a.device)[1]; }},
      {"lse_b", [](Merge& m) { m.lse_b.device = other_devices(m.o_a.device)[0]; }},
      {"o_a",
       [](Merge& m) {
         for (TensorView* view : {&m.o_a, &m.lse_a, &m.o_b, &m.lse_b, &m.output, &m.lse}) {
           view->device.index = 99;
         }
       }},
      {"output", [](Merge& m) { m.output.strides[2] = 2; }},
      {"lse", [](Merge& m) { m.lse.shape[1] = 2; }},
      {"lse", [](Merge& m) { m.lse.dtype = DType::kFloat16; }}};
  const auto expect_error = [](const Wrong& wrong, DeviceType device) {
    DeviceBuffers buffers(&memory_of(device));
    const auto o = [&] { return buffers.view(make_tensor(DType::kFloat32, {3, 2, 8})); };
    const auto lse = [&] { return buffers.view(make_tensor(DType::kFloat32, {2, 3})); };
    Merge merge{o(), lse(), o(), lse(), o(), lse()};
    wrong.spoil(merge);
    EXPECT_EQ(argument_named_by([&] {
                merge_states(merge.o_a, merge.lse_a, merge.o_b, merge.lse_b, merge.output,
                             merge.lse);
              }),
              wrong.argument);
    EXPECT_EQ(buffers.damage({}), "") << wrong.argument;
  };
  for (const AttentionBackend* backend : best_backends()) {
    for (const Wrong& wrong : wrongs) expect_error(wrong, backend->device_type());
  }
}

}  // namespace
}  // namespace quire
