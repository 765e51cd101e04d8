#include "bench/cpu_layer.h"

#include <algorithm>
#include <numeric>

#include "bench/layer.h"
#include "bench/random_data.h"

namespace quire::bench {

Cache::Cache(const Model& model, const Options& options, std::int64_t num_blocks) {
  const CacheLayout layout(model, options, num_blocks);
  data_ = Buffer(static_cast<std::size_t>(layout.data_bytes));
  if (layout.scale_bytes > 0) scales_ = Buffer(static_cast<std::size_t>(layout.scale_bytes));
  view_ = layout.view(data_.data(), scales_.data());
}

CpuLayer::CpuLayer(const Workload& workload, const Options& options, std::int64_t num_caches,
                   ThreadPool& threads)
    : options_(options),
      announced_prefix_(options.cascade ? workload.shared_prefix : 0),
      batch_(make_paged_batch(workload, options.block_size, options.seed)),
      plan_(layer_config(workload.model, options, sinks_of(workload.model))) {
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

void CpuLayer::plan() { plan_.update(batch_.metadata(), announced_prefix_, context_); }

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

TensorView CpuLayer::sinks_of(const Model& model) {
  if (!model.sinks) return {};
  sinks_.assign(static_cast<std::size_t>(model.num_heads), kSink);
  return TensorView(sinks_.data(), DType::kFloat32, {model.num_heads});
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

}  // namespace quire::bench
