// The C ABI's paged cache: layouts, names of dtypes, the write of new tokens.
#include "quire/kv_cache.h"

#include "c_api/status.h"
#include "c_api/structs.h"

namespace quire::c_api {
namespace {

KvCacheDType to_kv_cache_dtype(std::int32_t value, std::string_view argument) {
  return to_enum(value, KvCacheDType::kInt4PerTokenHead, argument);
}

ScaleLayout to_scale_layout(std::int32_t value) {
  return to_enum(value, ScaleLayout::kInline, "scales");
}

// What a PagedKvCache made from one tensor sets, in a structure that is otherwise as after _init.
void return_cache(const PagedKvCache& made, quire_kv_cache* out, std::size_t struct_size) {
  quire_kv_cache cache = defaults<quire_kv_cache>();
  cache.key = from_view(made.key);
  cache.value = from_view(made.value);
  cache.k_scale_cache = from_view(made.k_scale_cache);
  cache.v_scale_cache = from_view(made.v_scale_cache);
  cache.dtype = static_cast<std::int32_t>(made.dtype);
  return_struct(cache, out, struct_size, "cache");
}

}  // namespace
}  // namespace quire::c_api

using namespace quire::c_api;  // NOLINT(google-build-using-namespace): the folder's own helpers

extern "C" {

quire_status quire_kv_cache_init(quire_kv_cache* cache, size_t struct_size) {
  return init(cache, struct_size, "cache");
}

quire_status quire_kv_cache_from_combined(quire_kv_cache* cache, size_t struct_size,
                                          const quire_tensor* kv_cache, int32_t dtype,
                                          int32_t scales) {
  return guarded([&] {
    return_cache(quire::PagedKvCache::from_combined(to_view(kv_cache, "kv_cache"),
                                                    to_kv_cache_dtype(dtype, "dtype"),
                                                    to_scale_layout(scales)),
                 cache, struct_size);
  });
}

quire_status quire_kv_cache_from_packed(quire_kv_cache* cache, size_t struct_size,
                                        const quire_tensor* kv_cache, int64_t head_size,
                                        int32_t dtype, int32_t scales) {
  return guarded([&] {
    return_cache(quire::PagedKvCache::from_packed(to_view(kv_cache, "kv_cache"), head_size,
                                                  to_kv_cache_dtype(dtype, "dtype"),
                                                  to_scale_layout(scales)),
                 cache, struct_size);
  });
}

quire_status quire_kv_cache_dtype_from_name(const char* kv_cache_dtype, int32_t* dtype) {
  return guarded([&] {
    deref(kv_cache_dtype, "kv_cache_dtype");
    deref(dtype, "dtype") = static_cast<std::int32_t>(quire::parse_kv_cache_dtype(kv_cache_dtype));
  });
}

quire_status quire_kv_cache_dtype_name(int32_t kv_cache_dtype, const char** name) {
  return guarded([&] {
    deref(name, "name") = to_string(to_kv_cache_dtype(kv_cache_dtype, "kv_cache_dtype"));
  });
}

quire_status quire_kv_cache_storage_dtype(int32_t kv_cache_dtype, quire_dtype model_dtype,
                                          quire_dtype* storage_dtype) {
  return guarded([&] {
    const quire::DType stored =
        quire::storage_dtype(to_kv_cache_dtype(kv_cache_dtype, "kv_cache_dtype"),
                             to_enum(model_dtype, quire::DType::kBool, "model_dtype"));
    deref(storage_dtype, "storage_dtype") = static_cast<quire_dtype>(stored);
  });
}

quire_status quire_write_kv_cache(const quire_tensor* key, const quire_tensor* value,
                                  const quire_kv_cache* kv_cache, const quire_tensor* slot_mapping,
                                  const quire_context* context) {
  return guarded([&] {
    quire::write_kv_cache(to_view(key, "key"), to_view(value, "value"), to_cache(kv_cache),
                          to_view(slot_mapping, "slot_mapping"), to_context(context));
  });
}

}  // extern "C"
