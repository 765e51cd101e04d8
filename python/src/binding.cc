// What quire_attn/_binding.py loads: the functional core (quire/attention.h, quire/kv_cache.h), a
// function each, flat. Python's classes in quire_attn/core.py keep what belongs together and keep the
// tensors alive; errors become Python's here (views.h).
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cli/common/info.h"
#include "python/src/openmp_threads.h"
#include "python/src/views.h"
#include "quire/quire.h"

namespace quire::python {
namespace {

// The threads of calls on the CPU; null is Quire's own.
std::atomic<ThreadPool*> chosen_threads{nullptr};

Context context_of(Device device, bool check_indices = false) {
  Context context;
  context.stream = current_stream(device);
  context.threads = chosen_threads.load(std::memory_order_relaxed);
  context.check_indices = check_indices;
  return context;
}

// A plan serves one call at a time, and Python's threads may call at the same time, since calls are
// made without the interpreter's lock.
class PlanObj : public ffi::Object {
 public:
  explicit PlanObj(const AttentionConfig& config) : plan(config) {}
  std::mutex mutex;
  quire::Plan plan;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("quire_attn.Plan", PlanObj, ffi::Object)
};

class PlanRef : public ffi::ObjectRef {
 public:
  explicit PlanRef(ffi::ObjectPtr<PlanObj> object) : ffi::ObjectRef(ffi::UnsafeInit()) {
    data_ = std::move(object);
  }
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(PlanRef, ffi::ObjectRef, PlanObj);
};

Score score_of(double softmax_scale, double soft_cap, const OptionalTensor& alibi_slopes,
               bool alibi_sqrt, const OptionalTensor& sinks) {
  Score score;
  score.softmax_scale = static_cast<float>(softmax_scale);
  score.soft_cap = static_cast<float>(soft_cap);
  score.alibi_slopes = view("alibi_slopes", alibi_slopes);
  score.alibi_sqrt = alibi_sqrt;
  score.sinks = view("sinks", sinks);
  return score;
}

PlanRef plan_create(bool cuda, int device_index, const ffi::String& dtype, const ffi::String& type,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_size, int64_t head_size_v,
                    bool causal, const ffi::String& window, int64_t window_size,
                    int64_t chunk_lookback, bool clamp_ranges, double softmax_scale,
                    double soft_cap, OptionalTensor alibi_slopes, bool alibi_sqrt,
                    OptionalTensor sinks, int64_t block_size, const ffi::String& kv_cache_dtype,
                    bool batch_invariant, bool auto_cascade, const ffi::String& backend) {
  return guarded([&] {
    AttentionConfig config;
    config.device = {cuda ? DeviceType::kCuda : DeviceType::kCpu, device_index};
    config.dtype = parse_dtype(std::string_view(dtype.data(), dtype.size()));
    config.type = parse_attention_type(std::string_view(type.data(), type.size()));
    config.num_heads = num_heads;
    config.num_kv_heads = num_kv_heads;
    config.head_size = head_size;
    config.head_size_v = head_size_v;
    config.mask.causal = causal;
    config.mask.window = parse_window(std::string_view(window.data(), window.size()));
    config.mask.window_size = window_size;
    config.mask.chunk_lookback = chunk_lookback;
    config.mask.clamp_ranges = clamp_ranges;
    config.score = score_of(softmax_scale, soft_cap, alibi_slopes, alibi_sqrt, sinks);
    config.block_size = block_size;
    config.kv_cache_dtype =
        parse_kv_cache_dtype(std::string_view(kv_cache_dtype.data(), kv_cache_dtype.size()));
    config.batch_invariant = batch_invariant;
    config.auto_cascade = auto_cascade;
    config.backend = std::string(backend.data(), backend.size());
    return PlanRef(ffi::make_object<PlanObj>(config));
  });
}

void plan_update(const PlanRef& ref, ffi::TensorView query_start_loc, OptionalTensor seq_lens,
                 OptionalTensor block_table, int64_t num_actual_tokens, int64_t max_query_len,
                 int64_t max_seq_len, OptionalTensor causal, OptionalTensor mm_prefix_range,
                 OptionalTensor visible_prefix_lens, OptionalTensor qq_bias,
                 OptionalTensor kv_start_loc, OptionalTensor kv_offset, OptionalTensor kv_stride,
                 OptionalTensor q_offset, int64_t common_prefix_len, bool check_indices) {
  guarded([&] {
    CommonAttentionMetadata batch;
    batch.query_start_loc = view("query_start_loc", query_start_loc);
    batch.seq_lens = view("seq_lens", seq_lens);
    batch.block_table = view("block_table", block_table);
    batch.num_actual_tokens = num_actual_tokens;
    batch.max_query_len = max_query_len;
    batch.max_seq_len = max_seq_len;
    batch.causal = view("causal", causal);
    batch.mm_prefix_range = view("mm_prefix_range", mm_prefix_range);
    batch.visible_prefix_lens = view("visible_prefix_lens", visible_prefix_lens);
    batch.qq_bias = view("qq_bias", qq_bias);
    batch.kv_start_loc = view("kv_start_loc", kv_start_loc);
    batch.kv_offset = view("kv_offset", kv_offset);
    batch.kv_stride = view("kv_stride", kv_stride);
    batch.q_offset = view("q_offset", q_offset);
    PlanObj* object = const_cast<PlanObj*>(ref.get());
    const std::lock_guard lock(object->mutex);
    object->plan.update(batch, common_prefix_len,
                        context_of(object->plan.config().device, check_indices));
  });
}

PagedKvCache cache_of(const OptionalTensor& key, const OptionalTensor& value, int64_t dtype,
                      const ffi::AnyView& k_scale, const ffi::AnyView& v_scale,
                      const OptionalTensor& k_scale_cache, const OptionalTensor& v_scale_cache) {
  PagedKvCache cache;
  cache.key = view("kv_cache.key", key);
  cache.value = view("kv_cache.value", value);
  cache.dtype = static_cast<KvCacheDType>(dtype);
  cache.k_scale = scale("kv_cache.k_scale", k_scale, cache.key.device);
  cache.v_scale = scale("kv_cache.v_scale", v_scale, cache.key.device);
  cache.k_scale_cache = view("kv_cache.k_scale_cache", k_scale_cache);
  cache.v_scale_cache = view("kv_cache.v_scale_cache", v_scale_cache);
  return cache;
}

// `cache_dtype` as of kv_cache_dtype() below. `output_scale` may be None. The five of the score count
// if `own_score`.
void attention(const PlanRef& ref, ffi::TensorView query, OptionalTensor key_cache,
               OptionalTensor value_cache, int64_t cache_dtype, ffi::AnyView k_scale,
               ffi::AnyView v_scale, OptionalTensor k_scale_cache, OptionalTensor v_scale_cache,
               OptionalTensor key, OptionalTensor value, ffi::TensorView output, OptionalTensor lse,
               ffi::AnyView q_scale, ffi::AnyView output_scale, OptionalTensor output_block_scale,
               bool own_score, double softmax_scale, double soft_cap, OptionalTensor alibi_slopes,
               bool alibi_sqrt, OptionalTensor sinks, bool check_indices) {
  guarded([&] {
    const Device device = ref->plan.config().device;
    AttentionArgs args;
    args.query = rows_view("query", query);
    if (key_cache.has_value()) {
      args.kv_cache = cache_of(key_cache, value_cache, cache_dtype, k_scale, v_scale, k_scale_cache,
                               v_scale_cache);
    }
    args.key = view("key", key);
    args.value = view("value", value);
    args.output = rows_view("output", output);
    args.lse = view("lse", lse);
    args.q_scale = scale("q_scale", q_scale, device);
    args.has_output_scale = output_scale.type_index() != ffi::TypeIndex::kTVMFFINone;
    if (args.has_output_scale) args.output_scale = scale("output_scale", output_scale, device);
    args.output_block_scale = view("output_block_scale", output_block_scale);
    Score score;
    if (own_score) {
      score = score_of(softmax_scale, soft_cap, alibi_slopes, alibi_sqrt, sinks);
      args.score = &score;
    }
    PlanObj* object = const_cast<PlanObj*>(ref.get());
    const std::lock_guard lock(object->mutex);
    quire::attention(object->plan, args, context_of(device, check_indices));
  });
}

void write_kv_cache(ffi::TensorView key, ffi::TensorView value, OptionalTensor key_cache,
                    OptionalTensor value_cache, int64_t cache_dtype, ffi::AnyView k_scale,
                    ffi::AnyView v_scale, OptionalTensor k_scale_cache,
                    OptionalTensor v_scale_cache, ffi::TensorView slot_mapping,
                    const ffi::String& backend, bool check_indices) {
  guarded([&] {
    const PagedKvCache cache = cache_of(key_cache, value_cache, cache_dtype, k_scale, v_scale,
                                        k_scale_cache, v_scale_cache);
    Context context = context_of(cache.key.device, check_indices);
    context.backend = std::string_view(backend.data(), backend.size());
    quire::write_kv_cache(rows_view("key", key), rows_view("value", value), cache,
                          view("slot_mapping", slot_mapping), context);
  });
}

void merge_states(ffi::TensorView o_a, ffi::TensorView lse_a, ffi::TensorView o_b,
                  ffi::TensorView lse_b, ffi::TensorView output, OptionalTensor lse,
                  const ffi::String& backend) {
  guarded([&] {
    const TensorView first = view("o_a", o_a);
    Context context = context_of(first.device);
    context.backend = std::string_view(backend.data(), backend.size());
    quire::merge_states(first, view("lse_a", lse_a), view("o_b", o_b), view("lse_b", lse_b),
                        view("output", output), view("lse", lse), context);
  });
}

ffi::String plan_to_string(const PlanRef& ref) {
  return guarded([&] {
    PlanObj* object = const_cast<PlanObj*>(ref.get());
    const std::lock_guard lock(object->mutex);
    return ffi::String(object->plan.to_string());
  });
}

int64_t plan_workspace_bytes(const PlanRef& ref) {
  return guarded([&] {
    PlanObj* object = const_cast<PlanObj*>(ref.get());
    const std::lock_guard lock(object->mutex);
    return object->plan.workspace_bytes();
  });
}

ffi::String plan_backend_name(const PlanRef& ref) {
  return guarded([&] { return ffi::String(ref->plan.backend_name()); });
}

// The number of a cache dtype's name, by which attention() and write_kv_cache() take it.
int64_t kv_cache_dtype(const ffi::String& name) {
  return guarded([&] {
    return static_cast<int64_t>(parse_kv_cache_dtype(std::string_view(name.data(), name.size())));
  });
}

const AttentionBackend& backend_named(const ffi::String& name) {
  return attention_backend(std::string_view(name.data(), name.size()));
}

// What a backend can do (quire/backend.h: BackendCapabilities), by the members' names. Touches no
// device.
ffi::Map<ffi::String, ffi::Any> capabilities(const ffi::String& backend) {
  return guarded([&] {
    const BackendCapabilities& caps = backend_named(backend).capabilities();
    const auto names = [](const auto& values) {
      ffi::Array<ffi::String> list;
      for (const auto value : values) list.push_back(to_string(value));
      return list;
    };
    return ffi::Map<ffi::String, ffi::Any>{
        {"dtypes", names(caps.dtypes)},
        {"kv_cache_dtypes", names(caps.kv_cache_dtypes)},
        {"output_dtypes", names(caps.output_dtypes)},
        {"min_head_size", caps.min_head_size},
        {"max_head_size", caps.max_head_size},
        {"head_size_multiple", caps.head_size_multiple},
        {"block_size_multiple", caps.block_size_multiple},
        {"max_block_size", caps.max_block_size},
        {"sinks", caps.sinks},
        {"alibi", caps.alibi},
        {"soft_cap", caps.soft_cap},
        {"sliding_window", caps.sliding_window},
        {"chunked", caps.chunked},
        {"bidirectional_ranges", caps.bidirectional_ranges},
        {"visible_prefix", caps.visible_prefix},
        {"qq_bias", caps.qq_bias},
        {"cross_attention", caps.cross_attention},
        {"encoder_attention", caps.encoder_attention},
        {"cascade", caps.cascade},
        {"lse", caps.lse},
        {"fp8_output", caps.fp8_output},
        {"block_scale_output", caps.block_scale_output},
        {"batch_invariant", caps.batch_invariant},
        {"graph_capture", caps.graph_capture},
    };
  });
}

// What it runs on here, or why it cannot.
ffi::String instruction_set(const ffi::String& backend) {
  return guarded([&] { return ffi::String(backend_named(backend).instruction_set()); });
}

void validate_head_size(const ffi::String& backend, int64_t head_size) {
  guarded([&] { backend_named(backend).validate_head_size(head_size); });
}

ffi::Array<int64_t> kv_cache_shape(const ffi::String& backend, int64_t num_blocks,
                                   int64_t block_size, int64_t num_kv_heads, int64_t head_size,
                                   const ffi::String& cache_dtype_str) {
  return guarded([&] {
    const std::vector<int64_t> shape = backend_named(backend).kv_cache_shape(
        num_blocks, block_size, num_kv_heads, head_size,
        std::string_view(cache_dtype_str.data(), cache_dtype_str.size()));
    return ffi::Array<int64_t>(shape.begin(), shape.end());
  });
}

// Calls on the CPU run on the OpenMP threads of the process from now on, or on Quire's own again.
// Returns how many threads; 0, and nothing changes, where no OpenMP runtime is loaded.
int64_t use_openmp_threads(bool use) {
  return guarded([&]() -> int64_t {
    ThreadPool* threads = use ? openmp_threads() : nullptr;
    if (use && threads == nullptr) return 0;
    chosen_threads.store(threads, std::memory_order_relaxed);
    return use ? threads->num_threads() : default_num_threads();
  });
}

ffi::String version() { return QUIRE_VERSION_STRING; }
ffi::String info() {
  return guarded([] { return ffi::String(cli::info_text()); });
}
ffi::String kernels() {
  return guarded([] { return ffi::String(cli::kernels_text()); });
}

// An object's type must be known to the runtime before the first one is made.
[[maybe_unused]] const int32_t kPlanTypeIndex = PlanObj::_GetOrAllocRuntimeTypeIndex();

}  // namespace
}  // namespace quire::python

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_create, quire::python::plan_create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_update, quire::python::plan_update);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_to_string, quire::python::plan_to_string);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_workspace_bytes, quire::python::plan_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_backend_name, quire::python::plan_backend_name);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, quire::python::attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_kv_cache, quire::python::write_kv_cache);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_states, quire::python::merge_states);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_cache_dtype, quire::python::kv_cache_dtype);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(capabilities, quire::python::capabilities);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, quire::python::instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_head_size, quire::python::validate_head_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_cache_shape, quire::python::kv_cache_shape);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_openmp_threads, quire::python::use_openmp_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, quire::python::version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(info, quire::python::info);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernels, quire::python::kernels);
