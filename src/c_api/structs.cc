#include "c_api/structs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace quire::c_api {

static_assert(std::is_same_v<std::int32_t, int>, "quire_task and ThreadPool::Task are one type");
static_assert(QUIRE_MAX_DIMS == kMaxDims);
static_assert(QUIRE_DTYPE_BOOL == static_cast<int>(DType::kBool));
static_assert(QUIRE_DTYPE_FLOAT8_E4M3 == static_cast<int>(DType::kFloat8E4M3));
static_assert(QUIRE_DEVICE_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(QUIRE_ATTENTION_ENCODER_DECODER == static_cast<int>(AttentionType::kEncoderDecoder));
static_assert(QUIRE_WINDOW_CHUNKED == static_cast<int>(WindowKind::kChunked));
static_assert(QUIRE_SCALES_INLINE == static_cast<int>(ScaleLayout::kInline));
static_assert(QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD ==
              static_cast<int>(KvCacheDType::kInt8PerTokenHead));
static_assert(QUIRE_KV_CACHE_FP8_E4M3_PER_TOKEN_HEAD ==
              static_cast<int>(KvCacheDType::kFp8E4M3PerTokenHead));
static_assert(QUIRE_KV_CACHE_INT4_PER_TOKEN_HEAD ==
              static_cast<int>(KvCacheDType::kInt4PerTokenHead));

template <>
quire_context defaults() {
  quire_context context{};
  context.struct_size = sizeof context;
  return context;
}

template <>
quire_attention_config defaults() {
  const AttentionConfig from;
  quire_attention_config config{};
  config.struct_size = sizeof config;
  config.dtype = static_cast<quire_dtype>(from.dtype);
  config.causal = from.mask.causal ? 1 : 0;
  config.block_size = from.block_size;
  config.auto_cascade = from.auto_cascade ? 1 : 0;
  return config;
}

template <>
quire_score defaults() {
  quire_score score{};
  score.struct_size = sizeof score;
  return score;
}

template <>
quire_batch defaults() {
  quire_batch batch{};
  batch.struct_size = sizeof batch;
  return batch;
}

template <>
quire_kv_cache defaults() {
  quire_kv_cache cache{};
  cache.struct_size = sizeof cache;
  cache.k_scale.value = 1.0F;
  cache.v_scale.value = 1.0F;
  return cache;
}

template <>
quire_attention_args defaults() {
  quire_attention_args args{};
  args.struct_size = sizeof args;
  args.q_scale.value = 1.0F;
  args.output_scale.value = 1.0F;
  return args;
}

template <>
quire_attention_metadata_fields defaults() {
  quire_attention_metadata_fields fields{};
  fields.struct_size = sizeof fields;
  return fields;
}

template <>
quire_layer_scales defaults() {
  quire_layer_scales scales{};
  scales.struct_size = sizeof scales;
  scales.q.value = scales.k.value = scales.v.value = 1.0F;
  return scales;
}

template <>
quire_forward_args defaults() {
  quire_forward_args args{};
  args.struct_size = sizeof args;
  args.output_scale.value = 1.0F;
  return args;
}

namespace {

Device to_device(const quire_device& device, std::string_view argument) {
  return {to_enum(device.type, DeviceType::kCuda, argument, "a device type of "), device.index};
}

}  // namespace

Scale to_scale(const quire_scale& from) {
  Scale scale(from.value);
  scale.data = from.data;
  return scale;
}

TensorView to_view(const quire_tensor& tensor, const std::string& argument) {
  TensorView view;
  view.dtype = to_enum(tensor.dtype, DType::kBool, argument, "a dtype of ");
  if (tensor.ndim < 0 || tensor.ndim > kMaxDims) {
    throw Error(argument, "ndim of 0 to " + std::to_string(kMaxDims), std::to_string(tensor.ndim));
  }
  if (view.dtype == DType::kNone) {
    if (tensor.data != nullptr) throw Error(argument, "a dtype", "none");
    return view;
  }
  view.data = tensor.data;
  view.device = to_device(tensor.device, argument);
  view.ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape.begin());
  std::copy_n(tensor.strides, tensor.ndim, view.strides.begin());
  return view;
}

TensorView to_view(const quire_tensor* tensor, const std::string& argument) {
  return to_view(deref(tensor, argument), argument);
}

quire_tensor from_view(const ConstTensorView& view) {
  quire_tensor tensor{};
  tensor.data = const_cast<void*>(view.data);  // a view of either: see quire_tensor
  tensor.dtype = static_cast<quire_dtype>(view.dtype);
  tensor.device = {static_cast<std::int32_t>(view.device.type), view.device.index};
  tensor.ndim = view.ndim;
  std::copy_n(view.shape.begin(), view.ndim, tensor.shape);
  std::copy_n(view.strides.begin(), view.ndim, tensor.strides);
  return tensor;
}

namespace {

Score to_score(const quire_score* from) {
  const quire_score in = read(from, "score");
  Score score;
  score.softmax_scale = in.softmax_scale;
  score.soft_cap = in.soft_cap;
  score.alibi_slopes = to_view(in.alibi_slopes, "alibi_slopes");
  score.alibi_sqrt = to_bool(in.alibi_sqrt, "alibi_sqrt");
  score.sinks = to_view(in.sinks, "sinks");
  return score;
}

}  // namespace

Context to_context(const quire_context* from) {
  Context context;
  if (from == nullptr) return context;
  const quire_context in = read(from, "context");
  context.stream = in.stream;
  context.threads = in.threads != nullptr ? in.threads->pool.get() : nullptr;
  context.check_indices = to_bool(in.check_indices, "check_indices");
  if (in.backend != nullptr) context.backend = in.backend;
  return context;
}

AttentionConfig to_config(const quire_attention_config* from) {
  const quire_attention_config in = read(from, "config");
  AttentionConfig config;
  config.device = to_device(in.device, "device");
  config.dtype = to_enum(in.dtype, DType::kBool, "dtype");
  config.num_heads = in.num_heads;
  config.num_kv_heads = in.num_kv_heads;
  config.head_size = in.head_size;
  config.head_size_v = in.head_size_v;
  config.type = to_enum(in.attention_type, AttentionType::kEncoderDecoder, "attention_type");
  config.mask.causal = to_bool(in.causal, "causal");
  config.mask.window = to_enum(in.window, WindowKind::kChunked, "window");
  config.mask.window_size = in.window_size;
  config.mask.chunk_lookback = in.chunk_lookback;
  config.mask.clamp_ranges = to_bool(in.clamp_ranges, "clamp_ranges");
  if (in.score != nullptr) config.score = to_score(in.score);
  config.block_size = in.block_size;
  config.kv_cache_dtype =
      to_enum(in.kv_cache_dtype, KvCacheDType::kInt4PerTokenHead, "kv_cache_dtype");
  config.batch_invariant = to_bool(in.batch_invariant, "batch_invariant");
  config.auto_cascade = to_bool(in.auto_cascade, "auto_cascade");
  if (in.backend != nullptr) config.backend = in.backend;
  return config;
}

namespace {

// The batch's members of quire_batch and quire_attention_metadata_fields, which have the same
// names.
template <class Fields>
void read_batch(const Fields& in, CommonAttentionMetadata* batch) {
  batch->query_start_loc = to_view(in.query_start_loc, "query_start_loc");
  batch->seq_lens = to_view(in.seq_lens, "seq_lens");
  batch->block_table = to_view(in.block_table, "block_table");
  batch->slot_mapping = to_view(in.slot_mapping, "slot_mapping");
  batch->num_actual_tokens = in.num_actual_tokens;
  batch->max_query_len = in.max_query_len;
  batch->max_seq_len = in.max_seq_len;
  batch->causal = to_view(in.causal, "causal");
  batch->mm_prefix_range = to_view(in.mm_prefix_range, "mm_prefix_range");
  batch->visible_prefix_lens = to_view(in.visible_prefix_lens, "visible_prefix_lens");
  batch->qq_bias = to_view(in.qq_bias, "qq_bias");
  batch->kv_start_loc = to_view(in.kv_start_loc, "kv_start_loc");
  batch->kv_offset = to_view(in.kv_offset, "kv_offset");
  batch->kv_stride = to_view(in.kv_stride, "kv_stride");
  batch->q_offset = to_view(in.q_offset, "q_offset");
}

}  // namespace

CommonAttentionMetadata to_batch(const quire_batch* from) {
  CommonAttentionMetadata batch;
  read_batch(read(from, "batch"), &batch);
  return batch;
}

AttentionMetadata to_metadata(const quire_attention_metadata_fields* from) {
  const quire_attention_metadata_fields in = read(from, "fields");
  AttentionMetadata metadata;
  read_batch(in, &metadata);
  metadata.use_cascade = to_bool(in.use_cascade, "use_cascade");
  metadata.common_prefix_len = in.common_prefix_len;
  metadata.cu_prefix_query_lens = to_view(in.cu_prefix_query_lens, "cu_prefix_query_lens");
  metadata.prefix_kv_lens = to_view(in.prefix_kv_lens, "prefix_kv_lens");
  metadata.suffix_kv_lens = to_view(in.suffix_kv_lens, "suffix_kv_lens");
  return metadata;
}

quire_attention_metadata_fields from_metadata(const AttentionMetadata& from) {
  quire_attention_metadata_fields fields = defaults<quire_attention_metadata_fields>();
  fields.num_actual_tokens = from.num_actual_tokens;
  fields.max_query_len = from.max_query_len;
  fields.query_start_loc = from_view(from.query_start_loc);
  fields.max_seq_len = from.max_seq_len;
  fields.seq_lens = from_view(from.seq_lens);
  fields.block_table = from_view(from.block_table);
  fields.slot_mapping = from_view(from.slot_mapping);
  fields.use_cascade = from.use_cascade ? 1 : 0;
  fields.common_prefix_len = from.common_prefix_len;
  fields.cu_prefix_query_lens = from_view(from.cu_prefix_query_lens);
  fields.prefix_kv_lens = from_view(from.prefix_kv_lens);
  fields.suffix_kv_lens = from_view(from.suffix_kv_lens);
  fields.causal = from_view(from.causal);
  fields.mm_prefix_range = from_view(from.mm_prefix_range);
  fields.visible_prefix_lens = from_view(from.visible_prefix_lens);
  fields.qq_bias = from_view(from.qq_bias);
  fields.kv_start_loc = from_view(from.kv_start_loc);
  fields.kv_offset = from_view(from.kv_offset);
  fields.kv_stride = from_view(from.kv_stride);
  fields.q_offset = from_view(from.q_offset);
  return fields;
}

LayerScales to_layer_scales(const quire_layer_scales* from) {
  LayerScales scales;
  if (from == nullptr) return scales;
  const quire_layer_scales in = read(from, "scales");
  scales.q = to_scale(in.q);
  if (to_bool(in.has_k, "has_k")) scales.k = to_scale(in.k);
  if (to_bool(in.has_v, "has_v")) scales.v = to_scale(in.v);
  return scales;
}

PagedKvCache to_cache(const quire_kv_cache* from) {
  const quire_kv_cache in = read(from, "kv_cache");
  PagedKvCache cache;
  cache.key = to_view(in.key, "kv_cache.key");
  cache.value = to_view(in.value, "kv_cache.value");
  cache.dtype = to_enum(in.dtype, KvCacheDType::kInt4PerTokenHead, "kv_cache.dtype");
  cache.k_scale = to_scale(in.k_scale);
  cache.v_scale = to_scale(in.v_scale);
  cache.k_scale_cache = to_view(in.k_scale_cache, "kv_cache.k_scale_cache");
  cache.v_scale_cache = to_view(in.v_scale_cache, "kv_cache.v_scale_cache");
  return cache;
}

AttentionArgs to_args(const quire_attention_args* from, Score* score) {
  const quire_attention_args in = read(from, "args");
  AttentionArgs args;
  args.query = to_view(in.query, "query");
  if (in.kv_cache != nullptr) args.kv_cache = to_cache(in.kv_cache);
  args.key = to_view(in.key, "key");
  args.value = to_view(in.value, "value");
  args.output = to_view(in.output, "output");
  args.lse = to_view(in.lse, "lse");
  if (in.score != nullptr) {
    *score = to_score(in.score);
    args.score = score;
  }
  args.q_scale = to_scale(in.q_scale);
  args.has_output_scale = to_bool(in.has_output_scale, "has_output_scale");
  args.output_scale = to_scale(in.output_scale);
  args.output_block_scale = to_view(in.output_block_scale, "output_block_scale");
  return args;
}

}  // namespace quire::c_api
