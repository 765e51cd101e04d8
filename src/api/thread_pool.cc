// A small blocking pool. Workers sleep on a condition variable between jobs and take indices from
// an atomic counter during one; nobody spins.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "quire/types.h"

namespace quire {
namespace {

class BlockingThreadPool final : public ThreadPool {
 public:
  explicit BlockingThreadPool(int num_threads) {
    for (int worker = 1; worker < num_threads; ++worker) {
      threads_.emplace_back([this, worker] { work(worker); });
    }
  }

  ~BlockingThreadPool() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int num_threads() const override { return static_cast<int>(threads_.size()) + 1; }

  void run(std::int64_t num_tasks, Task task, void* context) override {
    if (num_tasks <= 0) return;
    const std::lock_guard turn(turn_);
    if (num_tasks == 1 || threads_.empty()) {
      for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      job_ = {task, context, num_tasks};
      next_.store(0, std::memory_order_relaxed);
      busy_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    drain(job_, 0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  struct Job {
    Task task = nullptr;
    void* context = nullptr;
    std::int64_t num_tasks = 0;
  };

  void drain(const Job& job, int worker) {
    for (;;) {
      const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= job.num_tasks) return;
      job.task(job.context, i, worker);
    }
  }

  void work(int worker) {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      const Job job = job_;
      lock.unlock();
      drain(job, worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // one job at a time
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<std::int64_t> next_{0};
  Job job_;
  int busy_ = 0;
  std::uint64_t generation_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

int default_num_threads() {
  const char* text = std::getenv("QUIRE_NUM_THREADS");
  if (text == nullptr || *text == '\0') return usable_cpus();
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end != '\0' || count < 1 || count > 4096) {
    throw Error("QUIRE_NUM_THREADS", "a number of threads from 1 to 4096", text);
  }
  return static_cast<int>(count);
}

}  // namespace

std::unique_ptr<ThreadPool> make_thread_pool(int num_threads) {
  if (num_threads < 1) {
    throw Error("num_threads", "at least 1", std::to_string(num_threads));
  }
  return std::make_unique<BlockingThreadPool>(num_threads);
}

ThreadPool& default_thread_pool() {
  // Never destroyed: worker threads must not be joined from static destructors.
  static ThreadPool* const pool = new BlockingThreadPool(default_num_threads());
  return *pool;
}

}  // namespace quire
