// The C ABI (quire/quire_c.h): turns C structures into the C++ ones and exceptions into status
// codes. Meaning and checks are those of the C++ calls; only what C adds is checked here: null
// pointers, structure sizes, numbers outside an enumeration.
#include "quire/quire_c.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "quire/quire.h"

struct quire_plan {
  quire::Plan plan;
};

struct quire_thread_pool {
  std::unique_ptr<quire::ThreadPool> pool;
};

namespace quire {
namespace {

// ---------------------------------------------------------------------------------------------
// Errors

// Fixed buffers: telling what went wrong must not fail, also when memory has run out.
struct LastError {
  std::array<char, 2048> text{};
  std::array<char, 128> argument{};
};
thread_local LastError last_error;

template <std::size_t n>
void copy_text(std::string_view text, std::array<char, n>* out) noexcept {
  const std::size_t length = std::min(text.size(), n - 1);
  std::memcpy(out->data(), text.data(), length);
  (*out)[length] = '\0';
}

quire_status fail(quire_status status, std::string_view text,
                  std::string_view argument = {}) noexcept {
  copy_text(text, &last_error.text);
  copy_text(argument, &last_error.argument);
  return status;
}

// Every function's body runs in here.
template <class Body>
quire_status guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return QUIRE_OK;
  } catch (const Error& error) {
    return fail(QUIRE_INVALID_ARGUMENT, error.what(), error.argument());
  } catch (const std::bad_alloc&) {
    return fail(QUIRE_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(QUIRE_INTERNAL, error.what());
  } catch (...) {
    return fail(QUIRE_INTERNAL, "unknown error");
  }
}

template <class T>
T& deref(T* pointer, std::string_view argument) {
  if (pointer == nullptr) throw Error(argument, "a pointer", "null");
  return *pointer;
}

// ---------------------------------------------------------------------------------------------
// Structures

static_assert(std::is_same_v<std::int32_t, int>, "quire_task and ThreadPool::Task are one type");
static_assert(QUIRE_MAX_DIMS == kMaxDims);
static_assert(QUIRE_DTYPE_BOOL == static_cast<int>(DType::kBool));
static_assert(QUIRE_DTYPE_FLOAT8_E4M3 == static_cast<int>(DType::kFloat8E4M3));
static_assert(QUIRE_DEVICE_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(QUIRE_ATTENTION_ENCODER_DECODER == static_cast<int>(AttentionType::kEncoderDecoder));
static_assert(QUIRE_WINDOW_CHUNKED == static_cast<int>(WindowKind::kChunked));
static_assert(QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD ==
              static_cast<int>(KvCacheDType::kInt8PerTokenHead));
static_assert(QUIRE_KV_CACHE_FP8_E4M3_PER_TOKEN_HEAD ==
              static_cast<int>(KvCacheDType::kFp8E4M3PerTokenHead));

// What a structure was in its first release. Members that come later lie behind these sizes.
template <class T>
inline constexpr std::size_t kFirstSize = sizeof(T);

template <class T>
T defaults();

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

// Fills the caller's structure, which may be older (shorter) or newer (longer) than ours; a newer
// one's additional members become zero.
template <class T>
quire_status init(T* out, std::size_t struct_size, const char* argument) noexcept {
  return guarded([&] {
    deref(out, argument);
    if (struct_size < kFirstSize<T>) {
      throw Error("struct_size", "at least " + std::to_string(kFirstSize<T>),
                  std::to_string(struct_size));
    }
    const T full = defaults<T>();
    std::memset(static_cast<void*>(out), 0, struct_size);
    std::memcpy(static_cast<void*>(out), &full, std::min(struct_size, sizeof full));
    std::memcpy(static_cast<void*>(out), &struct_size, sizeof struct_size);
  });
}

// A caller's structure as this library knows it: members that the caller does not have keep their
// defaults, and members that we do not have must be zero, or we would ignore a wish.
template <class T>
T read(const T* in, std::string_view argument) {
  const std::string size_argument = std::string(argument) + ".struct_size";
  const std::size_t size = deref(in, argument).struct_size;
  if (size < kFirstSize<T>) {
    throw Error(size_argument,
                "at least " + std::to_string(kFirstSize<T>) + ", as the _init function sets it",
                std::to_string(size));
  }
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(in);
  if (size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char byte) { return byte != 0; })) {
    throw Error(size_argument,
                "a structure that this version knows (" + std::to_string(sizeof(T)) +
                    " bytes) or zeros behind it",
                std::to_string(size) + " bytes with members set that it does not know");
  }
  T out = defaults<T>();
  std::memcpy(static_cast<void*>(&out), in, std::min(size, sizeof out));
  return out;
}

// ---------------------------------------------------------------------------------------------
// Values

template <class Enum>
Enum to_enum(std::int32_t value, Enum last, std::string_view argument) {
  if (value < 0 || value > static_cast<std::int32_t>(last)) {
    throw Error(argument, "0 to " + std::to_string(static_cast<std::int32_t>(last)),
                std::to_string(value));
  }
  return static_cast<Enum>(value);
}

bool to_bool(std::int32_t value, std::string_view argument) {
  if (value != 0 && value != 1) throw Error(argument, "0 or 1", std::to_string(value));
  return value == 1;
}

Device to_device(const quire_device& device, std::string_view argument) {
  return {to_enum(device.type, DeviceType::kCuda, argument), device.index};
}

TensorView to_view(const quire_tensor& tensor, const std::string& argument) {
  TensorView view;
  view.dtype = to_enum(tensor.dtype, DType::kBool, argument + ".dtype");
  if (tensor.ndim < 0 || tensor.ndim > kMaxDims) {
    throw Error(argument + ".ndim", "0 to " + std::to_string(kMaxDims),
                std::to_string(tensor.ndim));
  }
  if (view.dtype == DType::kNone) {
    if (tensor.data != nullptr) throw Error(argument + ".dtype", "a dtype", "none");
    return view;
  }
  view.data = tensor.data;
  view.device = to_device(tensor.device, argument + ".device");
  view.ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape.begin());
  std::copy_n(tensor.strides, tensor.ndim, view.strides.begin());
  return view;
}

TensorView to_view(const quire_tensor* tensor, const std::string& argument) {
  return to_view(deref(tensor, argument), argument);
}

Scale to_scale(const quire_scale& from) {
  Scale scale(from.value);
  scale.data = from.data;
  return scale;
}

Context to_context(const quire_context* from) {
  Context context;
  if (from == nullptr) return context;
  const quire_context in = read(from, "context");
  context.stream = in.stream;
  context.threads = in.threads != nullptr ? in.threads->pool.get() : nullptr;
  context.check_indices = to_bool(in.check_indices, "check_indices");
  return context;
}

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
  if (in.score != nullptr) config.score = to_score(in.score);
  config.block_size = in.block_size;
  config.kv_cache_dtype =
      to_enum(in.kv_cache_dtype, KvCacheDType::kFp8E4M3PerTokenHead, "kv_cache_dtype");
  config.batch_invariant = to_bool(in.batch_invariant, "batch_invariant");
  config.auto_cascade = to_bool(in.auto_cascade, "auto_cascade");
  if (in.backend != nullptr) config.backend = in.backend;
  return config;
}

CommonAttentionMetadata to_batch(const quire_batch* from) {
  const quire_batch in = read(from, "batch");
  CommonAttentionMetadata batch;
  batch.query_start_loc = to_view(in.query_start_loc, "query_start_loc");
  batch.seq_lens = to_view(in.seq_lens, "seq_lens");
  batch.block_table = to_view(in.block_table, "block_table");
  batch.slot_mapping = to_view(in.slot_mapping, "slot_mapping");
  batch.num_actual_tokens = in.num_actual_tokens;
  batch.max_query_len = in.max_query_len;
  batch.max_seq_len = in.max_seq_len;
  batch.causal = to_view(in.causal, "causal");
  batch.mm_prefix_range = to_view(in.mm_prefix_range, "mm_prefix_range");
  batch.visible_prefix_lens = to_view(in.visible_prefix_lens, "visible_prefix_lens");
  batch.qq_bias = to_view(in.qq_bias, "qq_bias");
  batch.kv_start_loc = to_view(in.kv_start_loc, "kv_start_loc");
  return batch;
}

PagedKvCache to_cache(const quire_kv_cache* from) {
  const quire_kv_cache in = read(from, "kv_cache");
  PagedKvCache cache;
  cache.key = to_view(in.key, "kv_cache.key");
  cache.value = to_view(in.value, "kv_cache.value");
  cache.dtype = to_enum(in.dtype, KvCacheDType::kFp8E4M3PerTokenHead, "kv_cache.dtype");
  cache.k_scale = to_scale(in.k_scale);
  cache.v_scale = to_scale(in.v_scale);
  cache.k_scale_cache = to_view(in.k_scale_cache, "kv_cache.k_scale_cache");
  cache.v_scale_cache = to_view(in.v_scale_cache, "kv_cache.v_scale_cache");
  return cache;
}

// `score` receives what the arguments' own score points to.
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

const AttentionBackend& backend_at(std::int32_t index) {
  const std::vector<const AttentionBackend*>& backends = attention_backends();
  if (index < 0 || static_cast<std::size_t>(index) >= backends.size()) {
    throw Error("backend", "0 to " + std::to_string(backends.size() - 1), std::to_string(index));
  }
  return *backends[static_cast<std::size_t>(index)];
}

void return_text(std::string_view text, char* out, std::size_t capacity, std::size_t* length) {
  if (capacity > 0) {
    deref(out, "text");
    const std::size_t copied = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), copied);
    out[copied] = '\0';
  }
  if (length != nullptr) *length = text.size();
}

// Runs tasks on threads of a C caller's.
class WrappedThreadPool final : public ThreadPool {
 public:
  WrappedThreadPool(int num_threads, quire_run_tasks run_tasks, void* user)
      : num_threads_(num_threads), run_(run_tasks), user_(user) {}

  int num_threads() const override { return num_threads_; }
  void run(std::int64_t num_tasks, Task task, void* context) override {
    run_(user_, num_tasks, task, context);
  }

 private:
  int num_threads_;
  quire_run_tasks run_;
  void* user_;
};

}  // namespace
}  // namespace quire

// ---------------------------------------------------------------------------------------------
// The functions, in the header's order

using quire::deref;
using quire::guarded;

extern "C" {

const char* quire_version(void) { return QUIRE_VERSION_STRING; }

const char* quire_last_error(void) { return quire::last_error.text.data(); }

const char* quire_last_error_argument(void) { return quire::last_error.argument.data(); }

quire_status quire_tensor_init(quire_tensor* tensor, void* data, quire_dtype dtype, int32_t ndim,
                               const int64_t* shape) {
  return guarded([&] {
    quire_tensor out{};
    out.data = data;
    out.dtype = dtype;
    out.ndim = ndim;
    if (ndim < 0 || ndim > QUIRE_MAX_DIMS) {
      throw quire::Error("ndim", "0 to 6", std::to_string(ndim));
    }
    quire::to_enum(dtype, quire::DType::kBool, "dtype");
    if (ndim > 0) deref(shape, "shape");
    std::int64_t stride = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] < 0) throw quire::Error("shape", "no negative size", std::to_string(shape[d]));
      out.shape[d] = shape[d];
      out.strides[d] = stride;
      // An empty tensor's outer strides are never used: keep them from becoming 0.
      const std::int64_t size = std::max<std::int64_t>(shape[d], 1);
      if (stride > std::numeric_limits<std::int64_t>::max() / size) {
        throw quire::Error("shape", "less than 2^63 elements", std::to_string(shape[d]));
      }
      stride *= size;
    }
    deref(tensor, "tensor") = out;
  });
}

quire_status quire_thread_pool_create(int32_t num_threads, quire_thread_pool** pool) {
  return guarded([&] {
    deref(pool, "pool") = nullptr;
    *pool = new quire_thread_pool{quire::make_thread_pool(num_threads)};
  });
}

quire_status quire_thread_pool_wrap(int32_t num_threads, quire_run_tasks run, void* user,
                                    quire_thread_pool** pool) {
  return guarded([&] {
    deref(pool, "pool") = nullptr;
    if (num_threads < 1) {
      throw quire::Error("num_threads", "at least 1", std::to_string(num_threads));
    }
    if (run == nullptr) throw quire::Error("run", "a function", "null");
    *pool =
        new quire_thread_pool{std::make_unique<quire::WrappedThreadPool>(num_threads, run, user)};
  });
}

quire_status quire_thread_pool_destroy(quire_thread_pool* pool) {
  return guarded([&] { delete pool; });
}

quire_status quire_context_init(quire_context* context, size_t struct_size) {
  return quire::init(context, struct_size, "context");
}

quire_status quire_score_init(quire_score* score, size_t struct_size) {
  return quire::init(score, struct_size, "score");
}

quire_status quire_attention_config_init(quire_attention_config* config, size_t struct_size) {
  return quire::init(config, struct_size, "config");
}

quire_status quire_batch_init(quire_batch* batch, size_t struct_size) {
  return quire::init(batch, struct_size, "batch");
}

quire_status quire_kv_cache_init(quire_kv_cache* cache, size_t struct_size) {
  return quire::init(cache, struct_size, "cache");
}

quire_status quire_attention_args_init(quire_attention_args* args, size_t struct_size) {
  return quire::init(args, struct_size, "args");
}

quire_status quire_plan_create(const quire_attention_config* config, quire_plan** plan) {
  return guarded([&] {
    deref(plan, "plan") = nullptr;
    *plan = new quire_plan{quire::Plan(quire::to_config(config))};
  });
}

quire_status quire_plan_update(quire_plan* plan, const quire_batch* batch,
                               int64_t common_prefix_len, const quire_context* context) {
  return guarded([&] {
    deref(plan, "plan")
        .plan.update(quire::to_batch(batch), common_prefix_len, quire::to_context(context));
  });
}

quire_status quire_plan_destroy(quire_plan* plan) {
  return guarded([&] { delete plan; });
}

quire_status quire_plan_backend_name(const quire_plan* plan, const char** name) {
  return guarded([&] { deref(name, "name") = deref(plan, "plan").plan.backend_name(); });
}

quire_status quire_plan_workspace_bytes(const quire_plan* plan, int64_t* bytes) {
  return guarded([&] { deref(bytes, "bytes") = deref(plan, "plan").plan.workspace_bytes(); });
}

quire_status quire_write_kv_cache(const quire_tensor* key, const quire_tensor* value,
                                  const quire_kv_cache* cache, const quire_tensor* slot_mapping,
                                  const quire_context* context) {
  return guarded([&] {
    quire::write_kv_cache(quire::to_view(key, "key"), quire::to_view(value, "value"),
                          quire::to_cache(cache), quire::to_view(slot_mapping, "slot_mapping"),
                          quire::to_context(context));
  });
}

quire_status quire_attention(const quire_plan* plan, const quire_attention_args* args,
                             const quire_context* context) {
  return guarded([&] {
    quire::Score score;
    quire::attention(deref(plan, "plan").plan, quire::to_args(args, &score),
                     quire::to_context(context));
  });
}

quire_status quire_merge_states(const quire_tensor* o_a, const quire_tensor* lse_a,
                                const quire_tensor* o_b, const quire_tensor* lse_b,
                                const quire_tensor* output, const quire_tensor* lse,
                                const quire_context* context) {
  return guarded([&] {
    using quire::to_view;
    quire::merge_states(to_view(o_a, "o_a"), to_view(lse_a, "lse_a"), to_view(o_b, "o_b"),
                        to_view(lse_b, "lse_b"), to_view(output, "output"),
                        lse != nullptr ? to_view(lse, "lse") : quire::TensorView(),
                        quire::to_context(context));
  });
}

quire_status quire_backend_count(int32_t* count) {
  return guarded([&] {
    deref(count, "count") = static_cast<std::int32_t>(quire::attention_backends().size());
  });
}

quire_status quire_backend_name(int32_t backend, const char** name) {
  return guarded([&] { deref(name, "name") = quire::backend_at(backend).name(); });
}

quire_status quire_backend_available(int32_t backend, int32_t* available) {
  return guarded(
      [&] { deref(available, "available") = quire::backend_at(backend).available() ? 1 : 0; });
}

quire_status quire_backend_instruction_set(int32_t backend, char* text, size_t capacity,
                                           size_t* length) {
  return guarded([&] {
    quire::return_text(quire::backend_at(backend).instruction_set(), text, capacity, length);
  });
}

quire_status quire_backend_supports(int32_t backend, const quire_attention_config* config,
                                    char* text, size_t capacity, size_t* length) {
  return guarded([&] {
    std::string lines;
    for (const std::string& reason :
         quire::backend_at(backend).supports(quire::to_config(config))) {
      if (!lines.empty()) lines += '\n';
      lines += reason;
    }
    quire::return_text(lines, text, capacity, length);
  });
}

}  // extern "C"
