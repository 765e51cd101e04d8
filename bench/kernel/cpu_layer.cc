#include "bench/kernel/cpu_layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "bench/kernel/random_data.h"

namespace quire::bench {
namespace {

// fp8 caches: normal numbers up to 7 deviations lie within 448 * this.
constexpr float kFp8Scale = 1.0F / 64.0F;

}  // namespace

Cache::Cache(const Model& model, const Options& options, std::int64_t num_blocks) {
  const DType storage = storage_dtype(options.kv_cache_dtype, options.dtype);
  const std::int64_t heads = model.num_kv_heads;
  const std::int64_t row = model.head_size;
  const std::int64_t size = options.block_size;
  data_ = Buffer(static_cast<std::size_t>(num_blocks * 2 * size * heads * row * size_of(storage)));
  const std::int64_t head_stride = options.heads_first ? size * row : row;
  const std::int64_t slot_stride = options.heads_first ? row : heads * row;
  const TensorView combined(
      data_.data(), storage, {num_blocks, 2, size, heads, row},
      {2 * size * heads * row, size * heads * row, slot_stride, head_stride, 1});
  view_ = PagedKvCache::from_combined(combined, options.kv_cache_dtype);
  if (is_per_tensor_fp8(options.kv_cache_dtype)) {
    view_.k_scale = kFp8Scale;
    view_.v_scale = kFp8Scale;
  }
  if (is_per_token_head(options.kv_cache_dtype)) {
    const std::int64_t count = num_blocks * size * heads;
    scales_ = Buffer(static_cast<std::size_t>(2 * count) * sizeof(float));
    float* scales = scales_.as<float>();
    view_.k_scale_cache = TensorView(scales, DType::kFloat32, {num_blocks, size, heads});
    view_.v_scale_cache = TensorView(scales + count, DType::kFloat32, {num_blocks, size, heads});
  }
}

CpuLayer::CpuLayer(const Workload& workload, const Options& options, std::int64_t num_caches,
                   ThreadPool& threads)
    : options_(options),
      batch_(make_paged_batch(workload, options.block_size, options.seed)),
      plan_(config_of(workload.model)) {
  context_.threads = &threads;
  const Model& model = workload.model;
  const std::int64_t num_tokens = std::max(batch_.num_tokens, kFillTokens);
  query_ = tensor(&query_data_, {batch_.num_tokens, model.num_heads, model.head_size});
  output_ = tensor(&output_data_, {batch_.num_tokens, model.num_heads, model.head_size});
  key_ = tensor(&key_data_, {num_tokens, model.num_kv_heads, model.head_size});
  value_ = tensor(&value_data_, {num_tokens, model.num_kv_heads, model.head_size});
  NormalSource source(options.dtype, options.seed);
  for (const TensorView* view : {&query_, &key_, &value_}) {
    source.fill(view->data, static_cast<std::size_t>(view->num_elements()));
  }
  for (std::int64_t i = 0; i < num_caches; ++i) {
    caches_.emplace_back(model, options, batch_.num_blocks);
    fill(caches_.back());
  }
}

void CpuLayer::plan() { plan_.update(batch_.metadata(), 0, context_); }

void CpuLayer::write(std::size_t call) {
  write_kv_cache(key_, value_, cache(call), batch_.metadata().slot_mapping, context_);
}

void CpuLayer::attend(std::size_t call) {
  AttentionArgs args;
  args.query = query_;
  args.kv_cache = cache(call);
  args.output = output_;
  attention(plan_, args, context_);
}

void CpuLayer::check_output(const std::string& name) const {
  const std::int64_t count = output_.num_elements();
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += std::fabs(output_value(i));
  if (!(sum > 0.0 && std::isfinite(sum))) {
    throw std::runtime_error(name + ": the output is not finite, or all zeros");
  }
}

AttentionConfig CpuLayer::config_of(const Model& model) {
  AttentionConfig config;
  config.dtype = options_.dtype;
  config.num_heads = model.num_heads;
  config.num_kv_heads = model.num_kv_heads;
  config.head_size = model.head_size;
  if (model.sliding_window > 0) config.mask = Mask::sliding_window(model.sliding_window);
  config.score.soft_cap = model.soft_cap;
  if (model.sinks) {
    sinks_.assign(static_cast<std::size_t>(model.num_heads), 0.5F);
    config.score.sinks = TensorView(sinks_.data(), DType::kFloat32, {model.num_heads});
  }
  config.block_size = options_.block_size;
  config.kv_cache_dtype = options_.kv_cache_dtype;
  config.batch_invariant = options_.batch_invariant;
  config.backend = options_.backend;
  return config;
}

TensorView CpuLayer::tensor(Buffer* memory, std::initializer_list<std::int64_t> shape) const {
  const TensorView view(nullptr, options_.dtype, shape);
  *memory = Buffer(static_cast<std::size_t>(view.num_elements() * size_of(options_.dtype)));
  return TensorView(memory->data(), options_.dtype, shape);
}

const PagedKvCache& CpuLayer::cache(std::size_t call) const {
  return caches_[call % caches_.size()].view();
}

// Through the library's own write, so that every cache dtype holds what it would in use.
void CpuLayer::fill(const Cache& target) {
  const std::int64_t num_slots = batch_.num_blocks * options_.block_size;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(kFillTokens));
  for (std::int64_t begin = 0; begin < num_slots; begin += kFillTokens) {
    const std::int64_t count = std::min(kFillTokens, num_slots - begin);
    std::iota(slots.begin(), slots.end(), begin);
    write_kv_cache(key_, value_, target.view(), TensorView(slots.data(), DType::kInt64, {count}),
                   context_);
  }
}

double CpuLayer::output_value(std::int64_t i) const {
  if (options_.dtype == DType::kFloat32) return static_cast<const float*>(output_.data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(output_.data)[i];
  return options_.dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

}  // namespace quire::bench
