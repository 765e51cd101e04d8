// The C ABI's functional core: threads, configurations, plans, attention. Meaning and checks are
// those of the C++ calls.
#include <cstdint>
#include <memory>
#include <string>

#include "c_api/status.h"
#include "c_api/structs.h"
#include "quire/quire.h"

namespace quire::c_api {
namespace {

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
}  // namespace quire::c_api

using namespace quire::c_api;  // NOLINT(google-build-using-namespace): the folder's own helpers

extern "C" {

const char* quire_version(void) { return QUIRE_VERSION_STRING; }

const char* quire_last_error(void) { return last_error_text(); }

const char* quire_last_error_argument(void) { return last_error_argument(); }

quire_status quire_default_num_threads(int32_t* num_threads) {
  return guarded([&] { deref(num_threads, "num_threads") = quire::default_num_threads(); });
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

quire_status quire_attention_args_init(quire_attention_args* args, size_t struct_size) {
  return init(args, struct_size, "args");
}

quire_status quire_plan_create(const quire_attention_config* config, quire_plan** plan) {
  return guarded([&] {
    deref(plan, "plan") = nullptr;
    *plan = new quire_plan{std::make_shared<quire::Plan>(to_config(config))};
  });
}

quire_status quire_plan_update(quire_plan* plan, const quire_batch* batch,
                               int64_t common_prefix_len, const quire_context* context) {
  return guarded([&] {
    deref(plan, "plan").plan->update(to_batch(batch), common_prefix_len, to_context(context));
  });
}

quire_status quire_plan_destroy(quire_plan* plan) {
  return guarded([&] { delete plan; });
}

quire_status quire_plan_backend_name(const quire_plan* plan, const char** name) {
  return guarded([&] { deref(name, "name") = deref(plan, "plan").plan->backend_name(); });
}

quire_status quire_plan_workspace_bytes(const quire_plan* plan, int64_t* bytes) {
  return guarded([&] { deref(bytes, "bytes") = deref(plan, "plan").plan->workspace_bytes(); });
}

quire_status quire_plan_to_string(const quire_plan* plan, char* text, size_t capacity,
                                  size_t* length) {
  return guarded(
      [&] { return_text(deref(plan, "plan").plan->to_string(), text, capacity, length); });
}

quire_status quire_attention(const quire_plan* plan, const quire_attention_args* args,
                             const quire_context* context) {
  return guarded([&] {
    quire::Score score;
    quire::attention(*deref(plan, "plan").plan, to_args(args, &score), to_context(context));
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

}  // extern "C"
