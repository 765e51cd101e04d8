// A small blocking pool. Workers sleep on a condition variable between jobs and take indices from
// an atomic counter during one; no thread spins, unless make_thread_pool was asked for it. A run waits
// for the workers that have joined it, not for those that are still waking: of a job of 10 us a thread
// that takes 50 to wake would be the whole time.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "quire/types.h"

namespace quire {
namespace {

constexpr int kMostThreads = 4096;
constexpr std::chrono::milliseconds kLongestSpin{10};

// Threads do not survive fork(): a team started under another count is gone. Counted by a handler,
// since comparing getpid() would cost a system call for every run.
std::atomic<std::uint64_t> num_forks{0};
[[maybe_unused]] const int kForkHandler =
    pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1, std::memory_order_relaxed); });

// Tells the CPU that this thread only looks.
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How many tasks of any of these pools the current thread is inside of.
thread_local int task_depth = 0;

struct Job {
  ThreadPool::Task task = nullptr;
  void* context = nullptr;
  std::int64_t num_tasks = 0;
};

void run_here(const Job& job) {
  ++task_depth;
  for (std::int64_t i = 0; i < job.num_tasks; ++i) job.task(job.context, i, 0);
  --task_depth;
}

// The threads of a pool in one process, with all that they share.
class Team {
 public:
  // Starts num_threads - 1 threads, or as many as the system lets it. Waits until they run: a fork
  // while a thread starts leaves the child with the locks that starting takes (of AddressSanitizer's
  // allocator: no thread of the child could ever start).
  explicit Team(int num_threads, std::chrono::microseconds spin = {})
      : fork_count_(num_forks.load(std::memory_order_relaxed)), spin_(spin) {
    threads_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (int worker = 1; worker < num_threads; ++worker) {
        threads_.emplace_back([this, worker] { work(worker); });
      }
    } catch (const std::exception&) {
      // No thread or no memory for one: threads_ tells how many there are.
    }
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return num_started_ == threads_.size(); });
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  ~Team() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }
  std::chrono::microseconds spin() const { return spin_; }
  bool is_alive() const { return fork_count_ == num_forks.load(std::memory_order_relaxed); }

  // In place of the destructor once the process has forked: there is nobody to join, and a thread
  // that is not there may hold the mutex. Kept reachable, so that leak checkers stay quiet.
  static void abandon(Team* team) {
    static std::atomic<Team*> abandoned{nullptr};
    team->next_abandoned_ = abandoned.load(std::memory_order_relaxed);
    while (!abandoned.compare_exchange_weak(team->next_abandoned_, team)) {
    }
  }

  // From inside a task it never waits for its turn, which may come after that task only: a call on
  // the same pool, or on one whose run waits for this task through a third pool.
  void run(const Job& job) {
    std::unique_lock lock(mutex_);
    if (taken_ && task_depth > 0) {
      lock.unlock();
      run_here(job);
      return;
    }
    turn_.wait(lock, [this] { return !taken_; });
    taken_ = true;
    if (job.num_tasks == 1 || threads_.empty()) {
      lock.unlock();
      run_here(job);
      lock.lock();
    } else {
      run_together(job, lock);
    }
    taken_ = false;
    lock.unlock();
    turn_.notify_one();
  }

 private:
  void run_together(const Job& job, std::unique_lock<std::mutex>& lock) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    open_.store(++generation_, std::memory_order_relaxed);
    lock.unlock();
    if (const auto helpers = job.num_tasks - 1; helpers < std::ssize(threads_)) {
      for (std::int64_t i = 0; i < helpers; ++i) wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    drain(job, 0);
    lock.lock();
    open_.store(0, std::memory_order_relaxed);
    if (busy_ > 0) {
      lock.unlock();
      spin_until([this] { return busy_ == 0; });
      lock.lock();
    }
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void drain(const Job& job, int worker) {
    ++task_depth;
    for (;;) {
      const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= job.num_tasks) break;
      job.task(job.context, i, worker);
    }
    --task_depth;
  }

  void work(int worker) {
    {
      const std::lock_guard lock(mutex_);
      ++num_started_;
    }
    done_.notify_one();
    std::uint64_t seen = 0;
    const auto may_join = [&] {
      const std::uint64_t open = open_.load(std::memory_order_relaxed);
      return open != 0 && open != seen;
    };
    for (;;) {
      spin_until(may_join);
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || may_join(); });
      if (stop_) return;
      seen = generation_;
      ++busy_;
      const Job job = job_;
      lock.unlock();
      drain(job, worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  // Returns once the condition holds or spin_ is over: only a hint, what follows takes the mutex.
  template <class Condition>
  void spin_until(const Condition& condition) const {
    if (spin_.count() == 0) return;
    constexpr int kPausesBetweenClocks = 32;
    const auto deadline = std::chrono::steady_clock::now() + spin_;
    while (std::chrono::steady_clock::now() < deadline) {
      for (int i = 0; i < kPausesBetweenClocks; ++i) {
        if (condition()) return;
        pause();
      }
    }
  }

  const std::uint64_t fork_count_;
  const std::chrono::microseconds spin_;
  Team* next_abandoned_ = nullptr;
  std::mutex mutex_;
  std::condition_variable turn_;  // !taken_
  std::condition_variable wake_;  // a new open_
  std::condition_variable done_;  // busy_ == 0, and before the first run num_started_
  bool taken_ = false;            // one job at a time
  std::atomic<std::int64_t> next_{0};
  Job job_;
  std::atomic<std::uint64_t> open_{0};  // the generation_ that workers may still join, or 0
  std::atomic<int> busy_{0};            // workers that have joined it
  std::uint64_t generation_ = 0;
  std::size_t num_started_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// A team of num_threads. Where the system starts fewer, half of those: with the last thread or the
// last of the address space taken, nothing else in the process could run.
std::unique_ptr<Team> start_team_that_fits(int num_threads, std::chrono::microseconds spin = {}) {
  auto team = std::make_unique<Team>(num_threads, spin);
  if (const int started = team->num_threads(); started < num_threads) {
    team.reset();
    team = std::make_unique<Team>((started + 1) / 2, spin);
  }
  return team;
}

class BlockingThreadPool final : public ThreadPool {
 public:
  explicit BlockingThreadPool(std::unique_ptr<Team> team)
      : num_threads_(team->num_threads()), spin_(team->spin()), team_(team.release()) {}
  BlockingThreadPool(const BlockingThreadPool&) = delete;
  BlockingThreadPool& operator=(const BlockingThreadPool&) = delete;

  ~BlockingThreadPool() override {
    Team* const team = team_.load();
    if (team->is_alive()) {
      delete team;
    } else {
      Team::abandon(team);
    }
  }

  int num_threads() const override { return num_threads_; }

  void run(std::int64_t num_tasks, Task task, void* context) override {
    if (num_tasks > 0) living_team().run({task, context, num_tasks});
  }

 private:
  // After a fork a new team. Without a lock, which another thread might have held at the fork:
  // where several threads find the team gone, one's new team stays.
  Team& living_team() {
    Team* team = team_.load(std::memory_order_acquire);
    while (!team->is_alive()) {
      std::unique_ptr<Team> fresh = start_team_that_fits(num_threads_, spin_);
      if (team_.compare_exchange_strong(team, fresh.get())) {
        Team::abandon(team);
        team = fresh.release();
      }
    }
    return *team;
  }

  const int num_threads_;
  const std::chrono::microseconds spin_;
  std::atomic<Team*> team_;
};

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

}  // namespace

int default_num_threads() {
  const char* text = std::getenv("QUIRE_NUM_THREADS");
  if (text == nullptr || *text == '\0') return std::min(usable_cpus(), kMostThreads);
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end != '\0' || count < 1 || count > kMostThreads) {
    throw Error("QUIRE_NUM_THREADS", "a number of threads from 1 to 4096", text);
  }
  return static_cast<int>(count);
}

std::unique_ptr<ThreadPool> make_thread_pool(int num_threads, std::chrono::microseconds spin) {
  if (num_threads < 1 || num_threads > kMostThreads) {
    throw Error("num_threads", "1 to 4096", std::to_string(num_threads));
  }
  if (spin < std::chrono::microseconds(0) || spin > kLongestSpin) {
    throw Error("spin", "0 to 10000 us", std::to_string(spin.count()));
  }
  auto team = std::make_unique<Team>(num_threads, spin);
  if (const int started = team->num_threads(); started < num_threads) {
    team.reset();
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again),
                            "num_threads: " + std::to_string(num_threads) +
                                " asked for, the calling thread included, " +
                                std::to_string(started) + " could be started");
  }
  return std::make_unique<BlockingThreadPool>(std::move(team));
}

ThreadPool& default_thread_pool() {
  // Never destroyed: worker threads must not be joined from static destructors. Not a static local,
  // whose lock another thread might hold at a fork.
  static std::atomic<ThreadPool*> pool{nullptr};
  ThreadPool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto fresh = std::make_unique<BlockingThreadPool>(start_team_that_fits(default_num_threads()));
    if (pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace quire
