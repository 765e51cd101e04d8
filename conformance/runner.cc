#include "conformance/runner.h"

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <thread>

#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

// A pool as an engine may have one: threads of its own for every run, tasks from the last to the
// first, and workers numbered from the highest down.
class BackwardPool : public ThreadPool {
 public:
  int num_threads() const override { return 3; }
  void run(std::int64_t num_tasks, Task task, void* context) override {
    std::atomic<std::int64_t> left{num_tasks};
    const auto work = [&](int worker) {
      for (std::int64_t index = --left; index >= 0; index = --left) task(context, index, worker);
    };
    std::thread second(work, 2);
    work(1);
    second.join();
  }
};

ThreadPool* pool_of(int threads) {
  if (threads == 0) return nullptr;
  // Two cases may run from two threads at the same time.
  thread_local std::map<int, std::unique_ptr<ThreadPool>> pools;
  std::unique_ptr<ThreadPool>& pool = pools[threads];
  if (pool == nullptr && threads == CaseSpec::kBackwardPool) pool.reset(new BackwardPool);
  if (pool == nullptr) pool = make_thread_pool(threads);
  return pool.get();
}

// The first sequence alone: a batch that the plan served before.
CommonAttentionMetadata first_sequence_of(CommonAttentionMetadata batch) {
  batch.query_start_loc = batch.query_start_loc.slice(0, 0, 2);
  for (ConstTensorView* view :
       {&batch.seq_lens, &batch.block_table, &batch.causal, &batch.mm_prefix_range,
        &batch.visible_prefix_lens, &batch.kv_offset, &batch.kv_stride, &batch.q_offset}) {
    if (*view) *view = view->slice(0, 0, 1);
  }
  if (batch.qq_bias && batch.qq_bias.ndim == 3) batch.qq_bias = batch.qq_bias.slice(0, 0, 1);
  if (batch.kv_start_loc) batch.kv_start_loc = batch.kv_start_loc.slice(0, 0, 2);
  return batch;
}

}  // namespace

DeviceCase::DeviceCase(const Case& c, const AttentionBackend& backend)
    : c_(c), backend_(backend), memory_(memory_of(backend.device_type())), buffers_(&memory_) {}

AttentionConfig DeviceCase::config() {
  AttentionConfig config = c_.spec.config;
  config.device = memory_.device();
  config.backend = backend_.name();
  config.score.alibi_slopes = buffers_.view(c_.alibi_slopes);
  config.score.sinks = buffers_.view(c_.sinks);
  return config;
}

CommonAttentionMetadata DeviceCase::batch() {
  CommonAttentionMetadata batch;
  batch.query_start_loc = buffers_.view(c_.query_start_loc);
  batch.seq_lens = buffers_.view(c_.seq_lens);
  batch.block_table = buffers_.view(c_.block_table);
  batch.slot_mapping = buffers_.view(c_.slot_mapping);
  batch.num_actual_tokens = c_.spec.num_actual_tokens();
  batch.max_query_len = c_.spec.max_query_len;
  batch.causal = buffers_.view(c_.causal);
  batch.mm_prefix_range = buffers_.view(c_.mm_prefix_range);
  batch.visible_prefix_lens = buffers_.view(c_.visible_prefix_lens);
  batch.qq_bias = buffers_.view(c_.qq_bias);
  batch.kv_start_loc = buffers_.view(c_.kv_start_loc);
  batch.kv_offset = buffers_.view(c_.kv_offset);
  batch.kv_stride = buffers_.view(c_.kv_stride);
  batch.q_offset = buffers_.view(c_.q_offset);
  return batch;
}

PagedKvCache DeviceCase::cache() {
  const KvCacheDType dtype = c_.spec.config.kv_cache_dtype;
  PagedKvCache cache;
  if (c_.combined) {
    TensorView whole = buffers_.view(c_.combined);
    // Frameworks without these types hand over bytes.
    const bool as_bytes = dtype != KvCacheDType::kAuto && size_of(whole.dtype) == 1;
    if (as_bytes && c_.spec.index % 2 == 0) whole.dtype = DType::kUInt8;
    cache = whole.ndim == 5 ? PagedKvCache::from_combined(whole, dtype)
                            : PagedKvCache::from_packed(whole, c_.spec.config.head_size, dtype);
  } else {
    cache.key = buffers_.view(c_.key_cache);
    cache.value = buffers_.view(c_.value_cache);
    cache.dtype = dtype;
  }
  cache.k_scale_cache = buffers_.view(c_.k_scale_cache);
  cache.v_scale_cache = buffers_.view(c_.v_scale_cache);
  if (c_.spec.scales_in_memory) {
    const auto* scales = static_cast<const float*>(buffers_.view(c_.scales).data);
    cache.k_scale = Scale::in_memory(scales + 1);
    cache.v_scale = Scale::in_memory(scales + 2);
  } else {
    cache.k_scale = c_.k_scale();
    cache.v_scale = c_.v_scale();
  }
  return cache;
}

AttentionArgs DeviceCase::args() {
  const CaseSpec& spec = c_.spec;
  AttentionArgs args;
  args.query = buffers_.view(c_.query);
  if (spec.has_cache()) {
    args.kv_cache = cache();
  } else {
    args.key = buffers_.view(c_.key);
    args.value = buffers_.view(c_.value);
  }
  args.output = buffers_.view(c_.output);
  args.lse = buffers_.view(c_.lse);
  args.output_block_scale = buffers_.view(c_.output_block_scale);
  args.q_scale = c_.q_scale();
  args.has_output_scale = is_float8(spec.out_dtype()) && !spec.block_scale;
  if (args.has_output_scale) args.output_scale = spec.output_scale;
  if (spec.scales_in_memory) {
    const auto* scales = static_cast<const float*>(buffers_.view(c_.scales).data);
    args.q_scale = Scale::in_memory(scales);
    if (args.has_output_scale) args.output_scale = Scale::in_memory(scales + 3);
  }
  return args;
}

Context DeviceCase::context() const {
  Context context;
  context.threads = pool_of(c_.spec.threads);
  return context;
}

// The cache as it was before this step's write.
void DeviceCase::undo_write() {
  for (const Tensor* view :
       {&c_.key_cache, &c_.value_cache, &c_.k_scale_cache, &c_.v_scale_cache}) {
    if (!*view) continue;
    for (const auto& [buffer, earlier] : c_.before) {
      if (buffer == view->buffer) buffers_.store(*view, earlier.bytes);
    }
  }
}

std::string DeviceCase::write_cache() {
  const PagedKvCache target = cache();
  const std::vector<const Tensor*> views{&c_.key_cache, &c_.value_cache, &c_.k_scale_cache,
                                         &c_.v_scale_cache};
  undo_write();
  write_kv_cache(buffers_.view(c_.key), buffers_.view(c_.value), target,
                 buffers_.view(c_.slot_mapping), context());
  memory_.synchronize();
  std::string problem;
  for (const Tensor* view : views) {
    if (!*view) continue;
    const std::string difference =
        compare_bytes(views, buffers_.download(*view), view->buffer->bytes);
    if (problem.empty() && !difference.empty()) problem = "write_kv_cache: cache " + difference;
  }
  for (const Tensor* view : views) {
    if (*view) buffers_.restore(*view);
  }
  const std::string damaged = damage();
  return problem.empty() && !damaged.empty() ? "write_kv_cache " + damaged : problem;
}

void DeviceCase::poison_outputs() {
  for (const Tensor* output : {&c_.output, &c_.lse, &c_.output_block_scale}) {
    if (*output) {
      buffers_.view(*output);
      buffers_.restore(*output);
    }
  }
}

Actual DeviceCase::outputs() {
  memory_.synchronize();
  Actual actual;
  actual.output = buffers_.download(c_.output);
  if (c_.lse) actual.lse = buffers_.download(c_.lse);
  if (c_.output_block_scale) {
    actual.output_block_scale = buffers_.download(c_.output_block_scale);
  }
  return actual;
}

Actual DeviceCase::attend() {
  poison_outputs();
  Plan plan(config());
  if (c_.spec.replan && c_.num_seqs() > 0) {
    plan.update(first_sequence_of(batch()), 0, context());
  }
  plan.update(batch(), c_.spec.announced_prefix_len, context());
  attention(plan, args(), context());
  return outputs();
}

Actual DeviceCase::step() {
  poison_outputs();
  AttentionMetadataBuilder builder(config());
  if (c_.spec.replan && c_.num_seqs() > 0) {
    builder.build(0, first_sequence_of(batch()), false, context());
  }
  const AttentionMetadata metadata =
      builder.build(c_.spec.announced_prefix_len, batch(), false, context());
  const AttentionImpl layer(config());
  const AttentionArgs args = this->args();
  undo_write();
  LayerScales scales;
  scales.q = args.q_scale;
  std::optional<Scale> output_scale;
  if (args.has_output_scale) output_scale = args.output_scale;
  layer.forward(scales, args.query, buffers_.view(c_.key), buffers_.view(c_.value), args.kv_cache,
                &metadata, args.output, output_scale, args.output_block_scale, args.lse, context());
  return outputs();
}

std::string DeviceCase::damage() {
  return buffers_.damage({&c_.output, &c_.lse, &c_.output_block_scale});
}

Expected reference_attention(const Case& c) {
  Case plain = c;
  CaseSpec& spec = plain.spec;
  spec.output_dtype = DType::kFloat32;
  spec.output_3d = false;
  spec.block_scale = false;
  spec.announced_prefix_len = 0;
  spec.replan = false;
  spec.config.auto_cascade = false;
  Expected expected = empty_expected(c);
  const std::int64_t width = expected.num_heads * expected.head_size_v;
  plain.output = make_tensor(DType::kFloat32, {expected.num_rows, width});
  plain.lse = make_tensor(DType::kFloat32, {expected.num_heads, expected.num_rows});
  plain.output_block_scale = {};
  const Actual actual = DeviceCase(plain, attention_backend("reference")).attend();
  for (std::int64_t row = 0; row < expected.num_rows; ++row) {
    if (!expected.written[row]) continue;
    decode_row(DType::kFloat32, &actual.output[row * width * 4], width, expected.out(row, 0));
    for (std::int64_t head = 0; head < expected.num_heads; ++head) {
      const std::int64_t at = head * expected.num_rows + row;
      expected.lse[at] = decode(DType::kFloat32, &actual.lse[at * 4]);
    }
  }
  return expected;
}

std::string run_case(const Case& c, const AttentionBackend& backend) {
  try {
    DeviceCase on_device(c, backend);
    std::string problem;
    const bool writes = c.spec.has_cache() && c.spec.write;
    if (writes) problem = on_device.write_cache();
    if (!problem.empty()) return problem;
    const Actual actual = writes ? on_device.step() : on_device.attend();
    problem = on_device.damage();
    if (!problem.empty()) return "attention " + problem;
    const bool is_reference = std::string(backend.name()) == "reference";
    problem = compare(c, actual, is_reference ? literal_attention(c) : reference_attention(c));
    if (!problem.empty() || !c.spec.repeat) return problem;
    const Actual again = on_device.attend();
    return again == actual ? "" : "the same call gave other bits the second time";
  } catch (const std::exception& error) {
    return std::string("threw: ") + error.what();
  }
}

std::string run_random_case(const AttentionBackend& backend, std::uint64_t seed,
                            std::int64_t index) {
  const CaseSpec spec = random_spec(seed, index);
  const std::string problem = run_case(build_case(spec), backend);
  if (problem.empty()) return {};
  return problem + "\n  " + describe(spec) + "\n  quire verify --device " + backend.name() +
         " --seed " + std::to_string(seed) + " --case " + std::to_string(index);
}

}  // namespace quire::conformance
