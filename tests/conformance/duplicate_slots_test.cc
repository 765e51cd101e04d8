// write_kv_cache() with several tokens for one slot: the last of them wins whole.
#include <gtest/gtest.h>

#include <vector>

#include "conformance/number_format.h"
#include "conformance/random.h"
#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

// Runs the last task first, which a pool may do: no race is needed to see a wrong order.
class ReversedPool final : public ThreadPool {
 public:
  explicit ReversedPool(int num_threads) : num_threads_(num_threads) {}
  int num_threads() const override { return num_threads_; }
  void run(std::int64_t num_tasks, Task task, void* context) override {
    for (std::int64_t i = num_tasks; i-- > 0;) task(context, i, 0);
  }

 private:
  int num_threads_;
};

class DuplicateSlotsTest : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  void SetUp() override {
    if (GetParam()->device_type() == DeviceType::kCuda) {
      GTEST_SKIP() << "CUDA does not promise it (docs/experiments.md, cache write)";
    }
  }

  // Writes tokens of random K and V to `slots` and compares the cache with one that was written
  // token by token.
  static void check(KvCacheDType kind, DType model, std::int64_t num_blocks,
                    const std::vector<std::int64_t>& slots, int threads) {
    constexpr std::int64_t kHeads = 2;
    constexpr std::int64_t kSize = 16;
    constexpr std::int64_t kBlock = 16;
    const DType storage = storage_dtype(kind, model);
    const auto tokens = static_cast<std::int64_t>(slots.size());
    Rng rng(11);
    const Tensor key = make_tensor(model, {tokens, kHeads, kSize});
    const Tensor value = make_tensor(model, {tokens, kHeads, kSize});
    fill_normal(key, &rng);
    fill_normal(value, &rng);
    const Tensor slot_mapping = make_tensor(DType::kInt64, {tokens});
    for (std::int64_t t = 0; t < tokens; ++t) slot_mapping.set_int64(t, slots[t]);
    Tensor caches[2];
    Tensor scales[2];
    std::vector<std::byte> wanted[4];
    for (int side = 0; side < 2; ++side) {
      caches[side] =
          make_tensor(storage, {num_blocks, kBlock, kHeads, stored_head_size(kind, kSize)});
      if (is_per_token_head(kind)) {
        scales[side] = make_tensor(DType::kFloat32, {num_blocks, kBlock, kHeads});
      }
      const Tensor image = caches[side].buffer ? copy(caches[side]) : Tensor{};
      const Tensor scale_image = scales[side] ? copy(scales[side]) : Tensor{};
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < 0) continue;
        for (std::int64_t h = 0; h < kHeads; ++h) {
          float scale = 0;
          const Sizes at{slots[t] / kBlock, slots[t] % kBlock, h};
          quantise_row(kind, model, (side == 0 ? key : value).at({t, h, 0}), kSize, 1.0F, storage,
                       image.at({at[0], at[1], h, 0}), &scale);
          if (scale_image) scale_image.set(at, scale);
        }
      }
      wanted[side] = image.buffer->bytes;
      if (scale_image) wanted[2 + side] = scale_image.buffer->bytes;
    }
    const std::unique_ptr<ThreadPool> real_pool = make_thread_pool(threads);
    ReversedPool reversed_pool(threads);
    DeviceMemory& memory = memory_of(GetParam()->device_type());
    for (ThreadPool* pool : {real_pool.get(), static_cast<ThreadPool*>(&reversed_pool)}) {
      Context context;
      context.threads = pool;
      DeviceBuffers buffers(&memory);
      PagedKvCache cache;
      cache.dtype = kind;
      cache.key = buffers.view(caches[0]);
      cache.value = buffers.view(caches[1]);
      cache.k_scale_cache = buffers.view(scales[0]);
      cache.v_scale_cache = buffers.view(scales[1]);
      write_kv_cache(buffers.view(key), buffers.view(value), cache, buffers.view(slot_mapping),
                     context);
      memory.synchronize();
      for (int side = 0; side < 2; ++side) {
        EXPECT_EQ(compare_bytes({&caches[side]}, buffers.download(caches[side]), wanted[side]), "");
        if (!scales[side]) continue;
        EXPECT_EQ(compare_bytes({&scales[side]}, buffers.download(scales[side]), wanted[2 + side]),
                  "");
      }
    }
  }

  static Tensor copy(const Tensor& tensor) {
    Tensor result = tensor;
    result.buffer = std::make_shared<Buffer>(*tensor.buffer);
    return result;
  }

  static std::vector<std::int64_t> random_slots(std::int64_t tokens, std::int64_t most) {
    Rng rng(5);
    std::vector<std::int64_t> slots(tokens);
    for (std::int64_t& slot : slots) slot = rng.uniform(-1, most - 1);
    return slots;
  }
};

TEST_P(DuplicateSlotsTest, ManyTokensForTwoSlots) {
  for (const KvCacheDType kind :
       {KvCacheDType::kAuto, KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead,
        KvCacheDType::kFp8E4M3, KvCacheDType::kInt4PerTokenHead}) {
    std::vector<std::int64_t> slots(512);
    for (std::size_t t = 0; t < slots.size(); ++t) slots[t] = t % 2 == 0 ? 5 : 21;
    check(kind, DType::kBFloat16, 2, slots, 4);
  }
}

TEST_P(DuplicateSlotsTest, AnyNumberOfTokensAndThreads) {
  for (const std::int64_t tokens : {2, 16, 17, 33, 100, 700}) {
    for (const int threads : {1, 2, 5}) {
      check(KvCacheDType::kAuto, DType::kFloat32, 4, random_slots(tokens, 64), threads);
      check(KvCacheDType::kInt8PerTokenHead, DType::kFloat16, 40, random_slots(tokens, 640),
            threads);
    }
  }
}

// One pair at the end of a batch that has more groups of slots than a table of them has room for.
TEST_P(DuplicateSlotsTest, OnePairAmongThousands) {
  for (const std::int64_t tokens : {300, 1500, 3000}) {
    std::vector<std::int64_t> slots(tokens);
    for (std::int64_t t = 0; t < tokens; ++t) slots[t] = t * 64 + t % 16;
    slots[tokens - 40] = slots[tokens - 1];
    check(KvCacheDType::kAuto, DType::kBFloat16, tokens * 4, slots, 4);
  }
}

// Padded tokens that all name slot 0, behind ordinary ones.
TEST_P(DuplicateSlotsTest, PaddingInSlotZero) {
  std::vector<std::int64_t> slots(400, 0);
  for (std::int64_t t = 0; t < 300; ++t) slots[t] = 16 + t;
  check(KvCacheDType::kAuto, DType::kBFloat16, 20, slots, 4);
}

QUIRE_ON_EVERY_DEVICE(DuplicateSlotsTest);

}  // namespace
}  // namespace quire::conformance
