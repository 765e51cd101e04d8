// Quire's thread pools: calls from inside tasks, fork(), and threads that the system does not start.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "conformance/runner.h"
#include "quire/quire.h"
#include "quire/quire_c.h"

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace quire {
namespace {

using namespace std::chrono_literals;

void run(
    ThreadPool& pool, std::int64_t num_tasks,
    std::function<void(std::int64_t, int)> task) {  // NOLINT(performance-unnecessary-value-param)
  pool.run(
      num_tasks,
      [](void* context, std::int64_t index, int worker) {
        (*static_cast<decltype(task)*>(context))(index, worker);
      },
      &task);
}

// Ends the program where a fault would make it wait for ever.
class Watchdog {
 public:
  explicit Watchdog(unsigned seconds = 60) { alarm(seconds); }
  ~Watchdog() { alarm(0); }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};

// Checks what ThreadPool promises of one run: each index once, worker numbers in range and not
// shared by calls that are under way at the same time.
class Tasks {
 public:
  Tasks(ThreadPool& pool, std::int64_t count)
      : calls_(static_cast<std::size_t>(count)),
        busy_(static_cast<std::size_t>(pool.num_threads())) {}

  void begin(std::int64_t index, int worker) {
    calls_[static_cast<std::size_t>(index)].fetch_add(1);
    const auto at = static_cast<std::size_t>(worker);
    if (worker < 0 || at >= busy_.size() || busy_[at].exchange(true)) wrong_ = true;
  }
  void end(int worker) { busy_[static_cast<std::size_t>(worker)] = false; }

  bool right() const {
    for (const std::atomic<int>& calls : calls_) {
      if (calls != 1) return false;
    }
    return !wrong_;
  }

 private:
  std::vector<std::atomic<int>> calls_;
  std::vector<std::atomic<bool>> busy_;
  std::atomic<bool> wrong_{false};
};

bool runs_right(
    ThreadPool& pool, std::int64_t count,
    const std::function<void(std::int64_t)>& inside = [](std::int64_t) {}) {
  Tasks tasks(pool, count);
  run(pool, count, [&](std::int64_t index, int worker) {
    tasks.begin(index, worker);
    inside(index);
    tasks.end(worker);
  });
  return tasks.right();
}

// Whether two tasks were ever under way at the same time: each waits for the other.
bool runs_two_at_a_time(ThreadPool& pool) {
  std::atomic<int> arrived{0};
  std::atomic<bool> met{true};
  run(pool, 2, [&](std::int64_t, int) {
    ++arrived;
    const auto deadline = std::chrono::steady_clock::now() + 20s;
    while (arrived < 2) {
      if (std::chrono::steady_clock::now() > deadline) {
        met = false;
        return;
      }
      std::this_thread::sleep_for(100us);
    }
  });
  return met;
}

// ---------------------------------------------------------------------------------------------

TEST(ThreadPoolNested, RunsOnTheCallingThread) {
  const Watchdog watchdog;
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  for (const std::int64_t outer : {1, 2, 40}) {  // one task runs on the caller's thread
    std::atomic<int> wrong{0};
    EXPECT_TRUE(runs_right(*pool, outer, [&](std::int64_t) {
      const std::thread::id caller = std::this_thread::get_id();
      for (const std::int64_t inner : {1, 5}) {
        if (!runs_right(*pool, inner, [&](std::int64_t) {
              if (std::this_thread::get_id() != caller) ++wrong;
              if (!runs_right(*pool, 3)) ++wrong;
            })) {
          ++wrong;
        }
      }
    }));
    EXPECT_EQ(wrong, 0) << outer;
  }
  EXPECT_TRUE(runs_two_at_a_time(*pool));  // as before
}

TEST(ThreadPoolNested, OnTheDefaultPool) {
  const Watchdog watchdog;
  std::atomic<int> wrong{0};
  EXPECT_TRUE(runs_right(default_thread_pool(), 20, [&](std::int64_t) {
    if (!runs_right(default_thread_pool(), 7)) ++wrong;
  }));
  EXPECT_EQ(wrong, 0);
}

// The inner call arrives on a thread of the pool in between.
TEST(ThreadPoolNested, ThroughAnotherPool) {
  const Watchdog watchdog;
  const std::unique_ptr<ThreadPool> a = make_thread_pool(3);
  const std::unique_ptr<ThreadPool> b = make_thread_pool(4);
  std::atomic<int> wrong{0};
  EXPECT_TRUE(runs_right(*a, 10, [&](std::int64_t) {
    if (!runs_right(*b, 10, [&](std::int64_t) {
          if (!runs_right(*a, 10)) ++wrong;
        })) {
      ++wrong;
    }
  }));
  EXPECT_EQ(wrong, 0);
}

// Each holds the pool that the other wants.
TEST(ThreadPoolNested, InOppositeOrders) {
  const Watchdog watchdog;
  const std::unique_ptr<ThreadPool> pools[] = {make_thread_pool(2), make_thread_pool(2)};
  std::atomic<int> wrong{0};
  const auto nest = [&](std::size_t outer) {
    for (int i = 0; i < 200; ++i) {
      run(*pools[outer], 4, [&](std::int64_t, int) {
        if (!runs_right(*pools[1 - outer], 4)) ++wrong;
      });
    }
  };
  std::thread other([&] { nest(1); });
  nest(0);
  other.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPool, CallsFromSeveralThreadsTakeTurns) {
  const Watchdog watchdog;
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  std::atomic<int> wrong{0};
  std::atomic<int> under_way{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        if (!runs_right(*pool, 1 + i % 5, [&](std::int64_t) {
              if (++under_way > 3) ++wrong;
              std::this_thread::sleep_for(50us);
              --under_way;
            })) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

// Runs that are over before a worker has woken: it must not touch the next one's tasks as its own, nor
// keep the caller waiting. With threads that sleep, and with threads that look for work.
TEST(ThreadPool, RunsShorterThanWakingAThread) {
  const Watchdog watchdog;
  for (const auto spin : {0us, 20us, 2000us}) {
    for (const int num_threads : {2, 3, 9}) {
      const std::unique_ptr<ThreadPool> pool = make_thread_pool(num_threads, spin);
      // A worker that joined a run too late would have to lose its core at the wrong moment to do harm.
      for (std::int64_t i = 0; i < (kThreadSanitizer || kAddressSanitizer ? 2000 : 50000); ++i) {
        ASSERT_TRUE(runs_right(*pool, 1 + i % 12)) << i << " " << spin.count() << " us";
      }
      EXPECT_TRUE(runs_two_at_a_time(*pool)) << num_threads << " " << spin.count() << " us";
    }
  }
}

TEST(ThreadPool, LooksForWorkForALimitedTimeOnly) {
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(4, 2ms);
  EXPECT_TRUE(runs_right(*pool, 20));
  std::this_thread::sleep_for(20ms);  // by now all sleep
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(500ms);
  EXPECT_LT(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC, 0.1);
}

TEST(ThreadPool, RefusesToLookForLong) {
  for (const auto spin : {-1us, 10001us}) {
    try {
      make_thread_pool(2, spin);
      ADD_FAILURE() << "no error for " << spin.count();
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find("spin: expected 0 to 10000 us, got "), 0U)
          << error.what();
    }
  }
  EXPECT_NE(make_thread_pool(2, 10000us), nullptr);
}

// Random cases of the conformance suite, by tasks of a pool that the cases themselves use.
TEST(ThreadPoolNested, AttentionInsideATask) {
  const Watchdog watchdog(300);
  const AttentionBackend& cpu = attention_backend("cpu");
  run(default_thread_pool(), 1, [&](std::int64_t, int) {
    for (std::int64_t index = 0; index < 8; ++index) {
      EXPECT_EQ(conformance::run_random_case(cpu, 11, index), "");
    }
  });
}

// ---------------------------------------------------------------------------------------------

// What became of `body` in a child: "" if it returned true. A child that hangs is killed.
std::string in_child(const std::function<bool()>& body, unsigned seconds = 60) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(seconds);
    const bool fine = body();
    _exit(fine ? 0 : 1);
  }
  if (child < 0) return std::string("fork: ") + std::strerror(errno);
  int status = 0;
  if (waitpid(child, &status, 0) != child) return std::string("waitpid: ") + std::strerror(errno);
  if (WIFSIGNALED(status)) {
    return WTERMSIG(status) == SIGALRM ? "hung" : "signal " + std::to_string(WTERMSIG(status));
  }
  return WEXITSTATUS(status) == 0 ? "" : "exit status " + std::to_string(WEXITSTATUS(status));
}

class ThreadPoolFork : public testing::Test {
 protected:
  void SetUp() override {
    // It takes the parent's threads for alive in the child, and ends it ("dup thread with used id")
    // when a new one gets the address of one of them.
    if (kThreadSanitizer) GTEST_SKIP() << "ThreadSanitizer does not know threads after fork()";
  }
};

TEST_F(ThreadPoolFork, StartsAnewInTheChild) {
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  ASSERT_TRUE(runs_right(*pool, 20));
  ASSERT_TRUE(runs_right(default_thread_pool(), 20));
  const auto both = [&] {
    return pool->num_threads() == 3 && runs_two_at_a_time(*pool) && runs_right(*pool, 20) &&
           runs_right(default_thread_pool(), 20);
  };
  EXPECT_EQ(in_child(both), "");
  EXPECT_EQ(in_child([&] { return both() && in_child(both).empty() && both(); }), "")
      << "a child's child";
  EXPECT_TRUE(both()) << "the parent afterwards";
}

TEST_F(ThreadPoolFork, AttentionInTheChild) {
  const AttentionBackend& cpu = attention_backend("cpu");
  const auto attend = [&] {
    for (std::int64_t index = 0; index < 8; ++index) {
      const std::string problem = conformance::run_random_case(cpu, 5, index);
      std::fputs(problem.c_str(), stderr);
      if (!problem.empty()) return false;
    }
    return true;
  };
  ASSERT_TRUE(attend());
  EXPECT_EQ(in_child(attend, 300), "");
}

TEST_F(ThreadPoolFork, FromSeveralThreadsOfTheChild) {
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  ASSERT_TRUE(runs_right(*pool, 20));
  EXPECT_EQ(in_child([&] {
              std::atomic<int> wrong{0};
              std::vector<std::thread> callers;
              for (int caller = 0; caller < 4; ++caller) {
                callers.emplace_back([&] {
                  for (int i = 0; i < 20; ++i) wrong += runs_right(*pool, 20) ? 0 : 1;
                });
              }
              for (std::thread& caller : callers) caller.join();
              return wrong == 0;
            }),
            "");
}

// The fork finds the pool's locks held by a thread that the child does not have.
TEST_F(ThreadPoolFork, WhileAnotherThreadRunsJobs) {
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  std::atomic<bool> stop{false};
  std::atomic<int> jobs{0};
  std::thread other([&] {
    while (!stop) {
      run(*pool, 8, [&](std::int64_t, int) {
        const auto end = std::chrono::steady_clock::now() + 20us;
        while (std::chrono::steady_clock::now() < end) {
        }
      });
      ++jobs;
    }
  });
  while (jobs == 0) std::this_thread::yield();
  const int forks = kAddressSanitizer ? 5 : 30;
  for (int i = 0; i < forks; ++i) {
    EXPECT_EQ(in_child([&] { return runs_two_at_a_time(*pool) && runs_right(*pool, 20); }), "");
  }
  stop = true;
  other.join();
}

// From inside a task the child may go on as it likes; it must not return from the task.
TEST_F(ThreadPoolFork, InsideATask) {
  const std::unique_ptr<ThreadPool> pool = make_thread_pool(3);
  std::atomic<int> wrong{0};
  run(*pool, 6, [&](std::int64_t, int) {
    if (!in_child([&] { return runs_two_at_a_time(*pool) && runs_right(*pool, 20); }).empty()) {
      ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST_F(ThreadPoolFork, TheChildDestroysWhatItInherited) {
  std::unique_ptr<ThreadPool> unused = make_thread_pool(3);
  std::unique_ptr<ThreadPool> used = make_thread_pool(3);
  EXPECT_EXIT(
      {
        alarm(60);
        const bool fine = runs_right(*used, 20);
        used.reset();
        unused.reset();
        std::exit(fine ? 0 : 1);  // where a leak would be found
      },
      testing::ExitedWithCode(0), "");
  EXPECT_TRUE(runs_right(*unused, 20));
  EXPECT_TRUE(runs_right(*used, 20));
}

// ---------------------------------------------------------------------------------------------
// Each in a process of its own that runs under limits.

constexpr int kNoSuchLimit = 77;  // exit status

void limit(__rlimit_resource resource, rlim_t value) {
  const rlimit limits{value, value};
  if (setrlimit(resource, &limits) != 0) std::_Exit(kNoSuchLimit);
}

// About 190 threads with stacks of 8 MiB.
void limit_address_space() { limit(RLIMIT_AS, rlim_t{3} << 29); }

// No further thread. Limits of processes do not hold for the superuser.
void limit_processes() {
  if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) std::_Exit(kNoSuchLimit);
  limit(RLIMIT_NPROC, 0);
  try {
    std::thread([] {}).join();
    std::_Exit(kNoSuchLimit);
  } catch (const std::system_error&) {
  }
}

[[noreturn]] void finish(bool fine) {
  std::fflush(stderr);
  std::_Exit(fine ? 0 : 1);
}

void expect_refused(int num_threads) {
  std::string text;
  try {
    make_thread_pool(num_threads);
  } catch (const std::system_error& error) {
    text = error.what();
    if (error.code() != std::errc::resource_unavailable_try_again) finish(false);
  }
  quire_thread_pool* pool = nullptr;
  const quire_status status = quire_thread_pool_create(num_threads, &pool);
  std::fprintf(stderr, "%s; C: %d %s\n", text.c_str(), status, quire_last_error());
  const std::string asked = "num_threads: " + std::to_string(num_threads) + " asked for";
  finish(text.find(asked) == 0 && status == QUIRE_OUT_OF_MEMORY && pool == nullptr &&
         std::string(quire_last_error()).find(asked) == 0 && make_thread_pool(1) != nullptr);
}

bool attention_is_right_on_the_default_pool() {
  conformance::CaseSpec spec = conformance::random_spec(1, 0);
  spec.threads = 0;
  return conformance::run_case(conformance::build_case(spec), attention_backend("cpu")).empty();
}

void expect_fewer(const char* num_threads) {
  setenv("QUIRE_NUM_THREADS", num_threads, 1);
  ThreadPool& pool = default_thread_pool();
  std::fprintf(stderr, "%d of %d\n", pool.num_threads(), default_num_threads());
  finish(default_num_threads() == std::atoi(num_threads) &&
         pool.num_threads() < default_num_threads() && runs_right(pool, 1000) &&
         attention_is_right_on_the_default_pool());
}

class ThreadPoolLimits : public testing::Test {
 protected:
  // A new program for each: no other test has used the default pool in it.
  void SetUp() override { testing::FLAGS_gtest_death_test_style = "threadsafe"; }

  static int exit_status;
  static bool fine_or_no_such_limit(int status) {
    exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return exit_status == 0 || exit_status == kNoSuchLimit;
  }
};
int ThreadPoolLimits::exit_status = 0;

TEST_F(ThreadPoolLimits, AddressSpaceForAPool) {
  if (kThreadSanitizer || kAddressSanitizer) GTEST_SKIP() << "sanitizers reserve address space";
  EXPECT_EXIT((limit_address_space(), expect_refused(2000)), fine_or_no_such_limit,
              "2000 asked for, the calling thread included, [0-9]+ could be started");
}

TEST_F(ThreadPoolLimits, AddressSpaceForTheDefaultPool) {
  if (kThreadSanitizer || kAddressSanitizer) GTEST_SKIP() << "sanitizers reserve address space";
  EXPECT_EXIT((limit_address_space(), expect_fewer("2000")), fine_or_no_such_limit,
              "[0-9]+ of 2000");
}

TEST_F(ThreadPoolLimits, ProcessesForAPool) {
  EXPECT_EXIT((limit_processes(), expect_refused(4)), fine_or_no_such_limit, "");
  if (exit_status == kNoSuchLimit) GTEST_SKIP() << "no limit of processes here";
}

TEST_F(ThreadPoolLimits, ProcessesForTheDefaultPool) {
  EXPECT_EXIT((limit_processes(), expect_fewer("4")), fine_or_no_such_limit, "");
  if (exit_status == kNoSuchLimit) GTEST_SKIP() << "no limit of processes here";
}

}  // namespace
}  // namespace quire
