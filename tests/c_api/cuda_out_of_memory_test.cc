// A GPU whose memory is full: what the C ABI and C++ report, and that plans go on afterwards. Skipped
// where there is no GPU.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "quire/attention.h"
#include "quire/quire_c.h"

namespace quire {
namespace {

// Needs no GPU.
TEST(CudaErrors, OnlyMemoryIsABadAlloc) {
  try {
    cuda::fail("cudaMalloc of 42 bytes", cudaErrorMemoryAllocation);
  } catch (const std::bad_alloc& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("cudaMalloc of 42 bytes on cuda:"), std::string::npos) << text;
    EXPECT_NE(text.find("cudaErrorMemoryAllocation"), std::string::npos) << text;
  }
  EXPECT_THROW(cuda::fail("a launch", cudaErrorLaunchFailure), std::runtime_error);
}

class CudaOutOfMemory : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
  }
  void TearDown() override { release(); }

  // Takes all memory of the device, down to pieces of 64 KiB.
  void fill() {
    for (std::size_t bytes = std::size_t{1} << 36; bytes >= 1 << 16; bytes /= 2) {
      void* memory = nullptr;
      while (cudaMalloc(&memory, bytes) == cudaSuccess) taken_.push_back(memory);
      cudaGetLastError();
    }
  }
  void release() {
    for (void* memory : taken_) cudaFree(memory);
    taken_.clear();
  }

 private:
  std::vector<void*> taken_;
};

constexpr std::int64_t kManySeqs = 1 << 20;  // of no rows: only the plan's own memory counts
constexpr Device kGpu{DeviceType::kCuda, 0};

CommonAttentionMetadata batch_of(const void* zeros, std::int64_t num_seqs) {
  CommonAttentionMetadata batch;
  batch.query_start_loc = ConstTensorView(zeros, DType::kInt32, {num_seqs + 1}, kGpu);
  batch.seq_lens = ConstTensorView(zeros, DType::kInt32, {num_seqs}, kGpu);
  batch.block_table = ConstTensorView(zeros, DType::kInt32, {num_seqs, 1}, kGpu);
  batch.num_actual_tokens = num_seqs;
  return batch;
}

TEST_F(CudaOutOfMemory, InCpp) {
  void* zeros = nullptr;
  ASSERT_EQ(cudaMalloc(&zeros, (kManySeqs + 1) * 4), cudaSuccess);
  ASSERT_EQ(cudaMemset(zeros, 0, (kManySeqs + 1) * 4), cudaSuccess);
  AttentionConfig config;
  config.device = kGpu;
  config.num_heads = config.num_kv_heads = 8;
  config.head_size = 128;
  Plan plan(config);
  plan.update(batch_of(zeros, 4));
  fill();
  EXPECT_THROW(plan.update(batch_of(zeros, kManySeqs)), OutOfMemory);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  plan.update(batch_of(zeros, 4));  // in what the plan has already
  release();
  plan.update(batch_of(zeros, kManySeqs));
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaFree(zeros), cudaSuccess);
}

quire_tensor view_of(void* data, std::vector<std::int64_t> shape) {
  quire_tensor view;
  EXPECT_EQ(quire_tensor_init(&view, data, QUIRE_DTYPE_INT32,
                              static_cast<std::int32_t>(shape.size()), shape.data()),
            QUIRE_OK);
  view.device = {QUIRE_DEVICE_CUDA, 0};
  return view;
}

TEST_F(CudaOutOfMemory, InC) {
  void* zeros = nullptr;
  ASSERT_EQ(cudaMalloc(&zeros, (kManySeqs + 1) * 4), cudaSuccess);
  ASSERT_EQ(cudaMemset(zeros, 0, (kManySeqs + 1) * 4), cudaSuccess);
  quire_attention_config config;
  ASSERT_EQ(quire_attention_config_init(&config, sizeof config), QUIRE_OK);
  config.device = {QUIRE_DEVICE_CUDA, 0};
  config.num_heads = config.num_kv_heads = 8;
  config.head_size = 128;
  quire_plan* plan = nullptr;
  ASSERT_EQ(quire_plan_create(&config, &plan), QUIRE_OK);
  quire_batch batch;
  ASSERT_EQ(quire_batch_init(&batch, sizeof batch), QUIRE_OK);
  batch.query_start_loc = view_of(zeros, {kManySeqs + 1});
  batch.seq_lens = view_of(zeros, {kManySeqs});
  batch.block_table = view_of(zeros, {kManySeqs, 1});
  batch.num_actual_tokens = kManySeqs;
  fill();
  EXPECT_EQ(quire_plan_update(plan, &batch, 0, nullptr), QUIRE_OUT_OF_MEMORY);
  const std::string text = quire_last_error();
  EXPECT_NE(text.find("bytes on cuda:0"), std::string::npos) << text;
  release();
  EXPECT_EQ(quire_plan_update(plan, &batch, 0, nullptr), QUIRE_OK);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(quire_plan_destroy(plan), QUIRE_OK);
  EXPECT_EQ(cudaFree(zeros), cudaSuccess);
}

}  // namespace
}  // namespace quire
