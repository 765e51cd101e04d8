// The C ABI (quire/quire_c.h): turns C structures into the C++ ones and exceptions into status
// codes. Meaning and checks are those of the C++ calls.
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
#include <system_error>
#include <utility>
#include <vector>

#include "api/c_structs.h"
#include "quire/quire.h"

struct quire_plan {
  quire::Plan plan;
};

namespace quire::c_abi {
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
  const std::size_t length = text.copy(out->data(), n - 1);
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
  } catch (const std::system_error& error) {
    // A thread pool that the system does not start: see make_thread_pool().
    const bool no_threads = error.code() == std::errc::resource_unavailable_try_again;
    return fail(no_threads ? QUIRE_OUT_OF_MEMORY : QUIRE_INTERNAL, error.what());
  } catch (const std::exception& error) {
    return fail(QUIRE_INTERNAL, error.what());
  } catch (...) {
    return fail(QUIRE_INTERNAL, "unknown error");
  }
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
}  // namespace quire::c_abi

// ---------------------------------------------------------------------------------------------
// The functions, in the header's order

using namespace quire::c_abi;  // NOLINT(google-build-using-namespace): the file's own helpers

extern "C" {

const char* quire_version(void) { return QUIRE_VERSION_STRING; }

const char* quire_last_error(void) { return last_error.text.data(); }

const char* quire_last_error_argument(void) { return last_error.argument.data(); }

quire_status quire_tensor_init(quire_tensor* tensor, const void* data, quire_dtype dtype,
                               int32_t ndim, const int64_t* shape) {
  return guarded([&] {
    quire_tensor out{};
    out.data = const_cast<void*>(data);  // a view of either: see the header
    out.dtype = dtype;
    out.ndim = ndim;
    if (ndim < 0 || ndim > QUIRE_MAX_DIMS) {
      throw quire::Error("ndim", "0 to 6", std::to_string(ndim));
    }
    to_enum(dtype, quire::DType::kBool, "dtype");
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
    *pool = new quire_thread_pool{std::make_unique<WrappedThreadPool>(num_threads, run, user)};
  });
}

quire_status quire_thread_pool_destroy(quire_thread_pool* pool) {
  return guarded([&] { delete pool; });
}

quire_status quire_context_init(quire_context* context, size_t struct_size) {
  return init(context, struct_size, "context");
}

quire_status quire_score_init(quire_score* score, size_t struct_size) {
  return init(score, struct_size, "score");
}

quire_status quire_attention_config_init(quire_attention_config* config, size_t struct_size) {
  return init(config, struct_size, "config");
}

quire_status quire_batch_init(quire_batch* batch, size_t struct_size) {
  return init(batch, struct_size, "batch");
}

quire_status quire_kv_cache_init(quire_kv_cache* cache, size_t struct_size) {
  return init(cache, struct_size, "cache");
}

quire_status quire_attention_args_init(quire_attention_args* args, size_t struct_size) {
  return init(args, struct_size, "args");
}

quire_status quire_plan_create(const quire_attention_config* config, quire_plan** plan) {
  return guarded([&] {
    deref(plan, "plan") = nullptr;
    *plan = new quire_plan{quire::Plan(to_config(config))};
  });
}

quire_status quire_plan_update(quire_plan* plan, const quire_batch* batch,
                               int64_t common_prefix_len, const quire_context* context) {
  return guarded([&] {
    deref(plan, "plan").plan.update(to_batch(batch), common_prefix_len, to_context(context));
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
                                  const quire_kv_cache* kv_cache, const quire_tensor* slot_mapping,
                                  const quire_context* context) {
  return guarded([&] {
    quire::write_kv_cache(to_view(key, "key"), to_view(value, "value"), to_cache(kv_cache),
                          to_view(slot_mapping, "slot_mapping"), to_context(context));
  });
}

quire_status quire_attention(const quire_plan* plan, const quire_attention_args* args,
                             const quire_context* context) {
  return guarded([&] {
    quire::Score score;
    quire::attention(deref(plan, "plan").plan, to_args(args, &score), to_context(context));
  });
}

quire_status quire_merge_states(const quire_tensor* o_a, const quire_tensor* lse_a,
                                const quire_tensor* o_b, const quire_tensor* lse_b,
                                const quire_tensor* output, const quire_tensor* lse,
                                const quire_context* context) {
  return guarded([&] {
    quire::merge_states(to_view(o_a, "o_a"), to_view(lse_a, "lse_a"), to_view(o_b, "o_b"),
                        to_view(lse_b, "lse_b"), to_view(output, "output"),
                        lse != nullptr ? to_view(lse, "lse") : quire::TensorView(),
                        to_context(context));
  });
}

quire_status quire_backend_count(int32_t* count) {
  return guarded([&] {
    deref(count, "count") = static_cast<std::int32_t>(quire::attention_backends().size());
  });
}

quire_status quire_backend_name(int32_t backend, const char** name) {
  return guarded([&] { deref(name, "name") = backend_at(backend).name(); });
}

quire_status quire_backend_available(int32_t backend, int32_t* available) {
  return guarded([&] { deref(available, "available") = backend_at(backend).available() ? 1 : 0; });
}

quire_status quire_backend_instruction_set(int32_t backend, char* text, size_t capacity,
                                           size_t* length) {
  return guarded(
      [&] { return_text(backend_at(backend).instruction_set(), text, capacity, length); });
}

quire_status quire_backend_supports(int32_t backend, const quire_attention_config* config,
                                    char* text, size_t capacity, size_t* length) {
  return guarded([&] {
    std::string lines;
    for (const std::string& reason : backend_at(backend).supports(to_config(config))) {
      if (!lines.empty()) lines += '\n';
      lines += reason;
    }
    return_text(lines, text, capacity, length);
  });
}

}  // extern "C"
