// What is thrown below the C ABI, and the status and text that a C caller gets of it. A thread pool
// of the caller's is the way in: its run() throws.
#include <gtest/gtest.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "quire/quire_c.h"
#include "quire/types.h"

namespace quire {
namespace {

// Merges two states of one token on a pool that throws.
quire_status merge_on(quire_run_tasks run) {
  quire_context context;
  EXPECT_EQ(quire_context_init(&context, sizeof context), QUIRE_OK);
  EXPECT_EQ(quire_thread_pool_wrap(1, run, nullptr, &context.threads), QUIRE_OK);
  std::array<float, 8> o{};
  float lse = 0;
  const std::array<int64_t, 3> o_shape{1, 1, 8};
  const std::array<int64_t, 2> lse_shape{1, 1};
  quire_tensor o_view;
  quire_tensor lse_view;
  EXPECT_EQ(quire_tensor_init(&o_view, o.data(), QUIRE_DTYPE_FLOAT32, 3, o_shape.data()), QUIRE_OK);
  EXPECT_EQ(quire_tensor_init(&lse_view, &lse, QUIRE_DTYPE_FLOAT32, 2, lse_shape.data()), QUIRE_OK);
  const quire_status status =
      quire_merge_states(&o_view, &lse_view, &o_view, &lse_view, &o_view, nullptr, &context);
  EXPECT_EQ(quire_thread_pool_destroy(context.threads), QUIRE_OK);
  return status;
}

template <class Exception>
[[noreturn]] void throw_it(const Exception& exception) {
  throw exception;
}

TEST(CAbiExceptions, OutOfMemoryOfADevice) {
  const auto run = [](void*, std::int64_t, quire_task, void*) {
    throw_it(OutOfMemory("CUDA: cudaMalloc of a workspace of 42 bytes on cuda:0: out of memory"));
  };
  EXPECT_EQ(merge_on(run), QUIRE_OUT_OF_MEMORY);
  EXPECT_STREQ(quire_last_error(),
               "CUDA: cudaMalloc of a workspace of 42 bytes on cuda:0: out of memory");
  EXPECT_STREQ(quire_last_error_argument(), "");
}

TEST(CAbiExceptions, OutOfMemoryOfTheHost) {
  const auto run = [](void*, std::int64_t, quire_task, void*) { throw_it(std::bad_alloc()); };
  EXPECT_EQ(merge_on(run), QUIRE_OUT_OF_MEMORY);
  EXPECT_STREQ(quire_last_error(), "out of memory");
}

TEST(CAbiExceptions, Others) {
  EXPECT_EQ(merge_on([](void*, std::int64_t, quire_task, void*) {
              throw_it(std::runtime_error("the device fell off the bus"));
            }),
            QUIRE_INTERNAL);
  EXPECT_STREQ(quire_last_error(), "the device fell off the bus");
  EXPECT_EQ(merge_on([](void*, std::int64_t, quire_task, void*) {
              throw_it(std::system_error(
                  std::make_error_code(std::errc::resource_unavailable_try_again)));
            }),
            QUIRE_OUT_OF_MEMORY);
  EXPECT_EQ(merge_on([](void*, std::int64_t, quire_task, void*) { throw_it(42); }), QUIRE_INTERNAL);
  EXPECT_STREQ(quire_last_error(), "unknown error");
}

// C++ callers catch it as what it is, too.
TEST(OutOfMemory, IsABadAlloc) {
  try {
    throw_it(OutOfMemory("no memory left"));
  } catch (const std::bad_alloc& error) {
    EXPECT_STREQ(error.what(), "no memory left");
  }
}

}  // namespace
}  // namespace quire
