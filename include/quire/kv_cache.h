// The paged KV cache: a view over memory the caller owns, and the write of new tokens into it.
// The design is PagedAttention's (Kwon et al., 2023): token j of a sequence lives in slot
// j % block_size of physical block block_table[seq][j / block_size].
#pragma once

#include <cstdint>
#include <string_view>

#include "quire/export.h"
#include "quire/types.h"

namespace quire {

// What a cache stores. Per tensor: one scale for all of K and one for all of V. Per token and head:
// each (slot, head) vector has its own float32 scale.
enum class KvCacheDType : std::uint8_t {
  kAuto = 0,  // the model's dtype: the same as that dtype spelled out
  kFloat16,
  kBFloat16,
  kFloat32,
  kFp8E4M3,              // "fp8" and "fp8_e4m3"
  kFp8E5M2,              // "fp8_e5m2"
  kInt8PerTokenHead,     // "int8_per_token_head", QMAX 127
  kFp8E4M3PerTokenHead,  // "fp8_per_token_head", QMAX 448
  kInt4PerTokenHead,     // "int4_per_token_head", two elements a byte; head sizes must be even
};

// Accepts vLLM's names: auto, float16, bfloat16, float32, fp8, fp8_e4m3, fp8_e5m2,
// int8_per_token_head, fp8_per_token_head, int4_per_token_head. Throws Error otherwise.
QUIRE_API KvCacheDType parse_kv_cache_dtype(std::string_view kv_cache_dtype);
QUIRE_API const char* to_string(KvCacheDType dtype);

// The element type of a cache of that kind for a model of dtype `model_dtype`. int4: kUInt8.
QUIRE_API DType storage_dtype(KvCacheDType dtype, DType model_dtype);
// How many of these hold a head vector: `head_size`, of int4 half as many.
constexpr std::int64_t stored_head_size(KvCacheDType dtype, std::int64_t head_size) {
  return dtype == KvCacheDType::kInt4PerTokenHead ? head_size / 2 : head_size;
}
constexpr bool is_per_token_head(KvCacheDType dtype) {
  return dtype == KvCacheDType::kInt8PerTokenHead || dtype == KvCacheDType::kFp8E4M3PerTokenHead ||
         dtype == KvCacheDType::kInt4PerTokenHead;
}
constexpr bool is_per_tensor_fp8(KvCacheDType dtype) {
  return dtype == KvCacheDType::kFp8E4M3 || dtype == KvCacheDType::kFp8E5M2;
}

// Where a per-token-head cache has its scales.
enum class ScaleLayout : std::uint8_t {
  kSeparate = 0,  // in tensors of their own: rows keep their alignment, which kernels read faster
  kInline,        // vLLM's: four bytes behind each row of K and each row of V
};

// A float32 scale: a host value, or one float in memory of the layer's device, which wins if given
// and is read when the work runs (so a captured CUDA graph sees later changes).
//
// A host value must be finite and above 0, or Error. What lies in memory is not looked at, except
// with Context::check_indices. Each use is IEEE 754 arithmetic: q, k and v are multiplied by
// theirs, what is stored (cache, fp8 output) is x / scale, rounded and saturated; NaN stays NaN. So
// a scale of 0 stores +-448 (e5m2: +-57344) of every x but 0, and NaN of 0, and reads as zeros; a
// negative one turns signs around; NaN makes NaN of everything; an infinite one stores zeros, and
// what it reads is not finite. Denormal scales are as good as others.
struct Scale {
  float value = 1.0F;
  const float* data = nullptr;
  Scale() = default;
  Scale(float v) : value(v) {}  // NOLINT(google-explicit-constructor): a plain number is a scale
  static Scale in_memory(const float* data) {
    Scale scale;
    scale.data = data;
    return scale;
  }
};

// A paged cache of one layer.
//
// K and V are two views [num_blocks, block_size, num_kv_heads, head_size(_v)] with unit stride in
// the last dimension and any other strides, so one type serves every layout: NHD, HND, K and V
// packed side by side in one row, two separate tensors, padded pages, views into larger buffers.
// Element offsets are computed in 64 bits. Blocks have 1 to 2^20 tokens, and there are less than
// 2^31 of them.
//
// Wild indices never leave this memory. A block number outside [0, num_blocks), and a token whose
// logical block lies past the width of the block table, is not there: a block of the first kind
// reads as zeros, and sequences end at the table's width. Slots outside
// [0, num_blocks * block_size) are skipped by writes.
struct QUIRE_API PagedKvCache {
  // Of the element type that `dtype` stores. Bytes (kUInt8) stand for the fp8 and int8 kinds. int4:
  // the last dimension is head_size / 2 bytes.
  TensorView key{};    // [num_blocks, block_size, num_kv_heads, head_size]
  TensorView value{};  // [num_blocks, block_size, num_kv_heads, head_size_v]

  // kAuto: plain storage of whatever float type `key` and `value` have, the same as that type
  // spelled out.
  KvCacheDType dtype = KvCacheDType::kAuto;

  // Per-tensor scales of fp8 caches: stored = x / scale, read back as stored * scale.
  Scale k_scale{};
  Scale v_scale{};

  // Per-token-head caches: float32 [num_blocks, block_size, num_kv_heads] views, any strides. int4:
  // the four lowest bits of a scale are the vector's zero point.
  TensorView k_scale_cache{};
  TensorView v_scale_cache{};

  std::int64_t num_blocks() const { return key.shape[0]; }
  std::int64_t block_size() const { return key.shape[1]; }

  // vLLM's default layout: one tensor [num_blocks, 2, block_size, num_kv_heads, head_size], index 0
  // of dimension 1 is K, 1 is V (AttentionBackend::kv_cache_shape()). Any strides.
  //
  // Per-token-head kinds with ScaleLayout::kInline: the last dimension is head_size + 4 bytes
  // (int4: head_size / 2 + 4), the scale last, and k_scale_cache and v_scale_cache become views of
  // it. With kSeparate the caller sets the two. Throws Error on another shape or dtype, on kInline
  // for other kinds, and where inline scales are not aligned to 4 bytes.
  static PagedKvCache from_combined(const TensorView& kv_cache,
                                    KvCacheDType dtype = KvCacheDType::kAuto,
                                    ScaleLayout scales = ScaleLayout::kSeparate);
  // vLLM's packed layout: [num_blocks, num_kv_heads, block_size, head_size + head_size_v], K first;
  // with kInline rows of K, its scale, V, its scale: head_size + 4 + head_size_v + 4 bytes. int4:
  // head_size / 2 and head_size_v / 2 bytes; `head_size` is in elements.
  static PagedKvCache from_packed(const TensorView& kv_cache, std::int64_t head_size,
                                  KvCacheDType dtype = KvCacheDType::kAuto,
                                  ScaleLayout scales = ScaleLayout::kSeparate);
};

// Writes the K and V of new tokens into the cache (vLLM's reshape_and_cache).
//
//   key           [>= num_slots, num_kv_heads, head_size]    fp16, bf16 or fp32, unit last stride
//   value         [>= num_slots, num_kv_heads, head_size_v]  the same dtype
//   kv_cache      written at the slots named, nothing else; per-token-head scales are computed
//   slot_mapping  int64 [num_slots], flat slot block * block_size + offset; negative or out of
//                 range: skipped. If a slot appears twice: on the CPU and the reference the
//                 last token wins, K, V and scales together; on CUDA K, V, heads and scales may
//                 come from either.
//
// fp8 per tensor: stored = saturate(x / scale), NaN stays NaN. Per token and head, in float32:
// scale = max(absmax * (1 / QMAX), 1e-6), stored = round-to-nearest-even(x * (1 / scale)),
// saturated: vLLM's fp8 bytes and scales (its int8 codes are truncated, ours rounded). int8 has no
// NaN and stores 0 for it; an infinity makes the whole vector NaN, by its scale.
//
// int4 per token and head, for head sizes up to 576: vLLM's bytes. The vector is rounded to bf16,
// rotated (a Hadamard transform of the vector with fixed signs, in blocks of the largest power of
// two that divides its size; docs/guide/semantics.md has all of it), rounded to bf16 and stored as
// scale * (code - zero), codes and zero 0 to 15, element 2i in the low half of byte i. Ranges that
// do not hold 0 are widened to it (vLLM's codes saturate there). NaN, or an infinity, makes the
// whole vector NaN. Attention rotates queries and outputs: nothing else is to be done.
// Runs on the device of kv_cache.key, on the backend that ctx.backend names. CPU: done on return.
// CUDA: queued on ctx.stream.
// Memory: reads key, value, slot_mapping and scales; writes the cache; allocates nothing.
// Throws Error before anything is written if shapes, dtypes, devices or scales do not fit, or,
// with ctx.check_indices, if a slot is past the cache or named twice.
QUIRE_API void write_kv_cache(const ConstTensorView& key, const ConstTensorView& value,
                              const PagedKvCache& kv_cache, const ConstTensorView& slot_mapping,
                              const Context& ctx = {});

}  // namespace quire
