#include "bench/layer.h"

#include <cmath>
#include <stdexcept>

#include "bench/random_data.h"

namespace quire::bench {
namespace {

// fp8 caches: normal numbers up to 7 deviations lie within 448 * this.
constexpr float kFp8Scale = 1.0F / 64.0F;

}  // namespace

AttentionConfig layer_config(const Model& model, const Options& options, const TensorView& sinks) {
  AttentionConfig config;
  config.device = {options.device, 0};
  config.dtype = options.dtype;
  config.num_heads = model.num_heads;
  config.num_kv_heads = model.num_kv_heads;
  config.head_size = model.head_size;
  if (model.sliding_window > 0) config.mask = Mask::sliding_window(model.sliding_window);
  config.score.soft_cap = model.soft_cap;
  config.score.sinks = sinks;
  config.block_size = options.block_size;
  config.kv_cache_dtype = options.kv_cache_dtype;
  config.batch_invariant = options.batch_invariant;
  // Calls on CUDA are timed in graphs, as engines run them: prefixes are announced there or not
  // used.
  config.auto_cascade = options.cascade && options.device == DeviceType::kCpu;
  config.backend = options.backend;
  return config;
}

CacheLayout::CacheLayout(const Model& model, const Options& options, std::int64_t num_blocks)
    : model_(model), options_(options), num_blocks_(num_blocks) {
  const DType storage = storage_dtype(options.kv_cache_dtype, options.dtype);
  const std::int64_t rows = num_blocks * 2 * options.block_size * model.num_kv_heads;
  data_bytes = rows * stored_head_size(options.kv_cache_dtype, model.head_size) * size_of(storage);
  if (is_per_token_head(options.kv_cache_dtype)) scale_bytes = rows * size_of(DType::kFloat32);
}

PagedKvCache CacheLayout::view(void* data, void* scales) const {
  const Device device{options_.device, 0};
  const DType storage = storage_dtype(options_.kv_cache_dtype, options_.dtype);
  const std::int64_t heads = model_.num_kv_heads;
  const std::int64_t row = stored_head_size(options_.kv_cache_dtype, model_.head_size);
  const std::int64_t size = options_.block_size;
  const std::int64_t head_stride = options_.heads_first ? size * row : row;
  const std::int64_t slot_stride = options_.heads_first ? row : heads * row;
  const TensorView combined(
      data, storage, {num_blocks_, 2, size, heads, row},
      {2 * size * heads * row, size * heads * row, slot_stride, head_stride, 1}, device);
  PagedKvCache cache = PagedKvCache::from_combined(combined, options_.kv_cache_dtype);
  if (is_per_tensor_fp8(options_.kv_cache_dtype)) {
    cache.k_scale = kFp8Scale;
    cache.v_scale = kFp8Scale;
  }
  if (scale_bytes > 0) {
    auto* k_scales = static_cast<float*>(scales);
    float* v_scales = k_scales + num_blocks_ * size * heads;
    cache.k_scale_cache = TensorView(k_scales, DType::kFloat32, {num_blocks_, size, heads}, device);
    cache.v_scale_cache = TensorView(v_scales, DType::kFloat32, {num_blocks_, size, heads}, device);
  }
  return cache;
}

double element(const TensorView& tensor, std::int64_t i) {
  if (tensor.dtype == DType::kFloat32) return static_cast<const float*>(tensor.data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(tensor.data)[i];
  return tensor.dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

void check_output(const TensorView& output, const std::string& name) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < output.num_elements(); ++i) sum += std::fabs(element(output, i));
  if (!(sum > 0.0 && std::isfinite(sum))) {
    throw std::runtime_error(name + ": the output is not finite, or all zeros");
  }
}

}  // namespace quire::bench
