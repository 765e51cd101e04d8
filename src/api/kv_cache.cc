// The cache's public side: names, layouts, and the checks of a cache write.
#include "quire/kv_cache.h"

#include "api/check.h"
#include "api/lower.h"
#include "semantics/int4.h"

namespace quire {

namespace {

struct CacheDTypeName {
  const char* name;
  KvCacheDType dtype;
};

// The first name of a dtype is the one it prints as.
constexpr CacheDTypeName kCacheDTypeNames[] = {
    {"auto", KvCacheDType::kAuto},
    {"float16", KvCacheDType::kFloat16},
    {"bfloat16", KvCacheDType::kBFloat16},
    {"float32", KvCacheDType::kFloat32},
    {"fp8_e4m3", KvCacheDType::kFp8E4M3},
    {"fp8", KvCacheDType::kFp8E4M3},
    {"fp8_e5m2", KvCacheDType::kFp8E5M2},
    {"int8_per_token_head", KvCacheDType::kInt8PerTokenHead},
    {"fp8_per_token_head", KvCacheDType::kFp8E4M3PerTokenHead},
    {"int4_per_token_head", KvCacheDType::kInt4PerTokenHead},
};

}  // namespace

KvCacheDType api::parse_cache_dtype(std::string_view text, const char* argument) {
  std::string known;
  for (const CacheDTypeName& entry : kCacheDTypeNames) {
    if (text == entry.name) return entry.dtype;
    known += known.empty() ? "" : ", ";
    known += entry.name;
  }
  throw Error(argument, "one of " + known, "\"" + std::string(text) + "\"");
}

KvCacheDType parse_kv_cache_dtype(std::string_view kv_cache_dtype) {
  return api::parse_cache_dtype(kv_cache_dtype, "kv_cache_dtype");
}

const char* to_string(KvCacheDType dtype) {
  for (const CacheDTypeName& entry : kCacheDTypeNames) {
    if (dtype == entry.dtype) return entry.name;
  }
  return "unknown";
}

DType storage_dtype(KvCacheDType dtype, DType model_dtype) {
  switch (dtype) {
    case KvCacheDType::kAuto: return model_dtype;
    case KvCacheDType::kFloat16: return DType::kFloat16;
    case KvCacheDType::kBFloat16: return DType::kBFloat16;
    case KvCacheDType::kFloat32: return DType::kFloat32;
    case KvCacheDType::kFp8E4M3:
    case KvCacheDType::kFp8E4M3PerTokenHead: return DType::kFloat8E4M3;
    case KvCacheDType::kFp8E5M2: return DType::kFloat8E5M2;
    case KvCacheDType::kInt8PerTokenHead: return DType::kInt8;
    case KvCacheDType::kInt4PerTokenHead: return DType::kUInt8;
  }
  return DType::kNone;
}

namespace {

// Byte tensors hold fp8 or int8 caches of frameworks that lack those types.
TensorView reinterpreted(TensorView view, KvCacheDType dtype) {
  const DType storage = storage_dtype(dtype, view.dtype);
  if (view.dtype == DType::kUInt8 && size_of(storage) == 1) view.dtype = storage;
  return view;
}

TensorView stored_as(const TensorView& kv_cache, KvCacheDType dtype) {
  const TensorView view = reinterpreted(kv_cache, dtype);
  const bool plain = view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16 ||
                     view.dtype == DType::kFloat32;
  check::that(
      view.dtype == storage_dtype(dtype, view.dtype) && (plain || dtype != KvCacheDType::kAuto),
      "kv_cache", [&] { return std::string("elements of a cache of kind ") + to_string(dtype); },
      view);
  return view;
}

constexpr std::int64_t kScaleBytes = sizeof(float);

void check_scale_layout(KvCacheDType dtype, ScaleLayout scales) {
  check::that(scales == ScaleLayout::kSeparate || is_per_token_head(dtype), "scales",
              "kSeparate for kinds without a scale for each token and head", "kInline");
}

// The scales at byte `at` of rows [num_blocks, block_size, num_kv_heads, bytes].
TensorView inline_scales(const TensorView& rows, std::int64_t at) {
  TensorView scales = rows.slice(3, at, at + kScaleBytes).select(3, 0);
  bool aligned = reinterpret_cast<std::uintptr_t>(scales.data) % kScaleBytes == 0;
  for (int d = 0; d < scales.ndim; ++d) {
    aligned = aligned && (scales.shape[d] <= 1 || scales.strides[d] % kScaleBytes == 0);
    scales.strides[d] /= kScaleBytes;
  }
  check::that(aligned, "kv_cache", "inline scales that are aligned to 4 bytes", rows);
  scales.dtype = DType::kFloat32;
  return scales;
}

}  // namespace

PagedKvCache PagedKvCache::from_combined(const TensorView& kv_cache, KvCacheDType dtype,
                                         ScaleLayout scales) {
  check::that(kv_cache.ndim == 5 && kv_cache.shape[1] == 2, "kv_cache",
              "shape [num_blocks, 2, block_size, num_kv_heads, head_size]", kv_cache);
  const TensorView view = stored_as(kv_cache, dtype);
  PagedKvCache cache;
  cache.key = view.select(1, 0);
  cache.value = view.select(1, 1);
  cache.dtype = dtype;
  check_scale_layout(dtype, scales);
  if (scales == ScaleLayout::kSeparate) return cache;
  const std::int64_t row = view.shape[4] - kScaleBytes;
  check::that(row >= 1, "kv_cache", "rows of a head's bytes and 4", kv_cache);
  cache.k_scale_cache = inline_scales(cache.key, row);
  cache.v_scale_cache = inline_scales(cache.value, row);
  cache.key = cache.key.slice(3, 0, row);
  cache.value = cache.value.slice(3, 0, row);
  return cache;
}

PagedKvCache PagedKvCache::from_packed(const TensorView& kv_cache, std::int64_t head_size,
                                       KvCacheDType dtype, ScaleLayout scales) {
  check::that(kv_cache.ndim == 4, "kv_cache",
              "shape [num_blocks, num_kv_heads, block_size, head_size + head_size_v]", kv_cache);
  check_scale_layout(dtype, scales);
  const std::int64_t scale_bytes = scales == ScaleLayout::kInline ? kScaleBytes : 0;
  const std::int64_t both = kv_cache.shape[3] - 2 * scale_bytes;
  const std::int64_t row = stored_head_size(dtype, head_size);  // of K
  const std::int64_t per_element = dtype == KvCacheDType::kInt4PerTokenHead ? 2 : 1;
  check::that(
      row >= 1 && row < both && head_size % per_element == 0, "head_size",
      [&] {
        return (per_element == 2 ? "an even number from 2 to " : "1 to ") +
               std::to_string(per_element * (both - 1));
      },
      head_size);
  const TensorView rows = stored_as(kv_cache, dtype).transpose(1, 2);
  const std::int64_t value_end = scale_bytes + both;
  PagedKvCache cache;
  cache.key = rows.slice(3, 0, row);
  cache.value = rows.slice(3, row + scale_bytes, value_end);
  cache.dtype = dtype;
  if (scales == ScaleLayout::kSeparate) return cache;
  cache.k_scale_cache = inline_scales(rows, row);
  cache.v_scale_cache = inline_scales(rows, value_end);
  return cache;
}

namespace api {

KvCacheDType spelled_out(KvCacheDType dtype, DType model_dtype) {
  if (dtype != KvCacheDType::kAuto) return dtype;
  switch (model_dtype) {
    case DType::kFloat16: return KvCacheDType::kFloat16;
    case DType::kBFloat16: return KvCacheDType::kBFloat16;
    case DType::kFloat32: return KvCacheDType::kFloat32;
    default: return KvCacheDType::kAuto;
  }
}

namespace {

void check_token_scales(std::string_view name, const TensorView& scales, const TensorView& store,
                        KvCacheDType dtype) {
  if (!is_per_token_head(dtype)) return;
  check::tensor(name, scales, store.device, {DType::kFloat32},
                {store.shape[0], store.shape[1], store.shape[2]});
}

void check_store(std::string_view name, const TensorView& store, KvCacheDType dtype,
                 Device device) {
  using check::kAny;
  if (dtype == KvCacheDType::kAuto) {
    check::tensor(name, store, device, {DType::kFloat16, DType::kBFloat16, DType::kFloat32},
                  {kAny, kAny, kAny, kAny});
  } else {
    check::tensor(name, store, device, {storage_dtype(dtype, DType::kNone)},
                  {kAny, kAny, kAny, kAny});
  }
  check::unit_last_stride(name, store);
}

KvParams lower_store(const TensorView& store, const TensorView& scales, Scale scale,
                     KvCacheDType dtype) {
  KvParams params;
  params.data = store.data;
  params.dtype = store.dtype;
  params.strides = {store.strides[0], store.strides[1], store.strides[2]};
  if (is_per_token_head(dtype)) {
    params.token_scales = static_cast<float*>(scales.data);
    params.token_scale_strides = {scales.strides[0], scales.strides[1], scales.strides[2]};
  }
  if (is_per_tensor_fp8(dtype)) params.scale = scale;
  return params;
}

}  // namespace

void lower_cache(const PagedKvCache& cache, Device device, KvParams* k, KvParams* v) {
  check::that(cache.key || cache.value, "kv_cache", "a cache", "none");
  const TensorView key = reinterpreted(cache.key, cache.dtype);
  const TensorView value = reinterpreted(cache.value, cache.dtype);
  check_store("kv_cache.key", key, cache.dtype, device);
  check_store("kv_cache.value", value, cache.dtype, device);
  check::that(key.shape[0] == value.shape[0] && key.shape[1] == value.shape[1] &&
                  key.shape[2] == value.shape[2] && key.dtype == value.dtype,
              "kv_cache.value", "the key's dtype, num_blocks, block_size and num_kv_heads", value);
  check::that(key.shape[0] < (1LL << 31), "kv_cache.key", "at most 2^31 - 1 blocks", key);
  check::that(key.shape[1] >= 1 && key.shape[1] <= kMaxBlockSize, "kv_cache.key",
              "a block_size of 1 to 2^20", key);
  check::that(key.shape[2] <= kMaxHeads, "kv_cache.key", "at most 65536 heads", key);
  check::that(key.shape[3] <= kMaxRowSize, "kv_cache.key", "a head_size of at most 2^20", key);
  check::that(value.shape[3] <= kMaxRowSize, "kv_cache.value", "a head_size_v of at most 2^20",
              value);
  check_token_scales("kv_cache.k_scale_cache", cache.k_scale_cache, key, cache.dtype);
  check_token_scales("kv_cache.v_scale_cache", cache.v_scale_cache, value, cache.dtype);
  if (is_per_tensor_fp8(cache.dtype)) {
    check::scale("kv_cache.k_scale", cache.k_scale);
    check::scale("kv_cache.v_scale", cache.v_scale);
  }
  *k = lower_store(key, cache.k_scale_cache, cache.k_scale, cache.dtype);
  *v = lower_store(value, cache.v_scale_cache, cache.v_scale, cache.dtype);
}

CacheWriteParams lower_cache_write(const BackendCapabilities& caps, const ConstTensorView& key,
                                   const ConstTensorView& value, const PagedKvCache& cache,
                                   const ConstTensorView& slot_mapping) {
  using check::kAny;
  CacheWriteParams p;
  const Device device = cache.key.device;
  p.device = device;
  lower_cache(cache, device, &p.k, &p.v);
  const KvCacheDType kind = spelled_out(cache.dtype, cache.key.dtype);
  check::capability(check::contains(caps.kv_cache_dtypes, kind), "kv_cache.dtype", to_string(kind));
  check::tensor("slot_mapping", slot_mapping, device, {DType::kInt64}, {kAny});
  check::contiguous("slot_mapping", slot_mapping);
  p.num_slots = slot_mapping.shape[0];

  // Elements of a stored row.
  const std::int64_t per_byte = kind == KvCacheDType::kInt4PerTokenHead ? 2 : 1;
  const std::int64_t head_size = per_byte * cache.key.shape[3];
  const std::int64_t head_size_v = per_byte * cache.value.shape[3];
  check::that(per_byte == 1 || head_size <= semantics::kMostInt4Elements, "kv_cache.key",
              "rows of at most 288 bytes, 576 elements", cache.key);
  check::that(per_byte == 1 || head_size_v <= semantics::kMostInt4Elements, "kv_cache.value",
              "rows of at most 288 bytes, 576 elements", cache.value);
  check::tensor("key", key, device, {DType::kFloat16, DType::kBFloat16, DType::kFloat32},
                {kAny, cache.key.shape[2], head_size});
  check::tensor("value", value, device, {key.dtype}, {kAny, cache.value.shape[2], head_size_v});
  check::capability(check::contains(caps.dtypes, key.dtype), "key", key);
  check::unit_last_stride("key", key);
  check::unit_last_stride("value", value);
  check::at_least("key", key, 0, p.num_slots, "one row for each slot of slot_mapping");
  check::at_least("value", value, 0, p.num_slots, "one row for each slot of slot_mapping");

  p.key = key.data;
  p.value = value.data;
  p.dtype = key.dtype;
  p.key_token_stride = key.strides[0];
  p.key_head_stride = key.strides[1];
  p.value_token_stride = value.strides[0];
  p.value_head_stride = value.strides[1];
  p.slot_mapping = check::data<const std::int64_t>(slot_mapping);
  p.num_blocks = cache.num_blocks();
  p.block_size = cache.block_size();
  p.num_kv_heads = static_cast<std::int32_t>(cache.key.shape[2]);
  p.head_size = static_cast<std::int32_t>(head_size);
  p.head_size_v = static_cast<std::int32_t>(head_size_v);
  return p;
}

CacheWriteParams checked_cache_write(const Backend& backend, const ConstTensorView& key,
                                     const ConstTensorView& value, const PagedKvCache& cache,
                                     const ConstTensorView& slot_mapping, const Context& ctx) {
  const CacheWriteParams params =
      lower_cache_write(backend.capabilities(), key, value, cache, slot_mapping);
  if (ctx.check_indices) check_write_data(backend, params, ctx);
  return params;
}

void run_cache_write(const Backend& backend, const CacheWriteParams& params, const Context& ctx) {
  if (params.num_slots > 0) backend.cache_write(params, ctx);
}

}  // namespace api

void write_kv_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const PagedKvCache& kv_cache, const ConstTensorView& slot_mapping,
                    const Context& ctx) {
  const Backend& backend = pick_backend(kv_cache.key.device, ctx.backend, "kv_cache.key");
  api::run_cache_write(
      backend, api::checked_cache_write(backend, key, value, kv_cache, slot_mapping, ctx), ctx);
}

}  // namespace quire
