#include "python/src/openmp_threads.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace quire::python {
namespace {

// The names that GCC's runtime has, and LLVM's and Intel's too, for programs compiled by GCC.
struct Runtime {
  using Parallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  using Number = int (*)();
  Parallel parallel = nullptr;
  Number thread_num = nullptr;
  Number max_threads = nullptr;
  Number in_parallel = nullptr;

  bool is_complete() const { return parallel && thread_num && max_threads && in_parallel; }
};

template <class Function>
Function find(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

Runtime loaded_runtime() {
  return {find<Runtime::Parallel>("GOMP_parallel"), find<Runtime::Number>("omp_get_thread_num"),
          find<Runtime::Number>("omp_get_max_threads"), find<Runtime::Number>("omp_in_parallel")};
}

class OpenMpThreads final : public ThreadPool {
 public:
  explicit OpenMpThreads(const Runtime& runtime)
      : runtime_(runtime), num_threads_(runtime.max_threads()) {}

  int num_threads() const override { return num_threads_; }

  void run(std::int64_t num_tasks, Task task, void* context) override {
    Job job{runtime_.thread_num, task, context, num_tasks};
    // Inside of a parallel region, a task of ours among them, there are no threads to wait for.
    if (num_tasks == 1 || num_threads_ == 1 || runtime_.in_parallel() != 0) {
      for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
      return;
    }
    runtime_.parallel(&Job::drain, &job, static_cast<unsigned>(num_threads_), 0);
  }

 private:
  struct Job {
    Runtime::Number thread_num;
    Task task;
    void* context;
    std::int64_t num_tasks;
    std::atomic<std::int64_t> next{0};

    // On each thread of the team, which may be smaller than was asked for.
    static void drain(void* data) {
      Job& job = *static_cast<Job*>(data);
      const int worker = job.thread_num();
      for (;;) {
        const std::int64_t i = job.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= job.num_tasks) return;
        job.task(job.context, i, worker);
      }
    }
  };

  const Runtime runtime_;
  const int num_threads_;
};

}  // namespace

ThreadPool* openmp_threads() {
  static const Runtime runtime = loaded_runtime();
  if (!runtime.is_complete()) return nullptr;
  static OpenMpThreads threads(runtime);
  return &threads;
}

}  // namespace quire::python
