// CUDA graphs: one capture of plan, cache write and attention serves every batch up to its padded
// size; streams do not disturb each other; a capture that would have to allocate says so.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "quire/quire.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kSeqs = 6;
constexpr std::int64_t kTokens = 96;
constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kSize = 64;
constexpr std::int64_t kBlockSize = 16;
constexpr std::int64_t kWidth = 130;
constexpr std::int64_t kBlocks = kSeqs * kWidth;

void check(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// Managed by hand: one host and one device copy of the same bytes.
struct Both {
  std::vector<char> host;
  void* device = nullptr;
  explicit Both(std::size_t bytes) : host(bytes) { check(cudaMalloc(&device, bytes)); }
  ~Both() { cudaFree(device); }
  void up() { check(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice)); }
  std::vector<char> down() const {
    std::vector<char> bytes(host.size());
    check(cudaMemcpy(bytes.data(), device, bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(host.data());
  }
  TensorView view(bool on_device, DType dtype, std::initializer_list<std::int64_t> shape) {
    return TensorView(on_device ? device : host.data(), dtype, shape,
                      Device{on_device ? DeviceType::kCuda : DeviceType::kCpu, 0});
  }
};

class Step {
 public:
  Step() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (Both* data : {&query, &key, &value, &cache}) {
      auto* halves = data->as<std::uint16_t>();
      for (std::size_t i = 0; i < data->host.size() / 2; ++i) {
        std::uint32_t bits;
        const float x = normal(random);
        std::memcpy(&bits, &x, 4);
        halves[i] = static_cast<std::uint16_t>(bits >> 16);
      }
    }
    for (std::int64_t i = 0; i < kBlocks; ++i) {
      table.as<std::int32_t>()[i] = static_cast<std::int32_t>((i * 7 + 3) % kBlocks);
    }
  }

  // Lengths of a step; what is left of the padded size is padding.
  void set(const std::vector<std::pair<int, int>>& lengths) {
    auto* start = starts.as<std::int32_t>();
    auto* seq_len = lens.as<std::int32_t>();
    auto* slot = slots.as<std::int64_t>();
    std::fill(slot, slot + kTokens, -1);
    start[0] = 0;
    for (std::int64_t s = 0; s < kSeqs; ++s) {
      const auto [query_len, len] = s < static_cast<std::int64_t>(lengths.size())
                                        ? lengths[static_cast<std::size_t>(s)]
                                        : std::pair<int, int>{0, 0};
      start[s + 1] = start[s] + query_len;
      seq_len[s] = len;
      for (int i = 0; i < query_len; ++i) {
        const int position = len - query_len + i;
        const std::int64_t block = table.as<std::int32_t>()[s * kWidth + position / kBlockSize];
        slot[start[s] + i] = block * kBlockSize + position % kBlockSize;
      }
    }
    for (Both* data : {&starts, &lens, &slots}) data->up();
  }

  void upload() {
    for (Both* data : {&query, &key, &value, &cache, &table}) data->up();
    check(cudaMemset(output.device, 0xFF, output.host.size()));
  }

  CommonAttentionMetadata batch(bool on_device) {
    CommonAttentionMetadata batch;
    batch.query_start_loc = starts.view(on_device, DType::kInt32, {kSeqs + 1});
    batch.seq_lens = lens.view(on_device, DType::kInt32, {kSeqs});
    batch.block_table = table.view(on_device, DType::kInt32, {kSeqs, kWidth});
    batch.num_actual_tokens = kTokens;
    return batch;
  }

  AttentionConfig config(bool on_device) const {
    AttentionConfig config;
    config.device = {on_device ? DeviceType::kCuda : DeviceType::kCpu, 0};
    config.num_heads = kHeads;
    config.num_kv_heads = kKvHeads;
    config.head_size = kSize;
    config.block_size = kBlockSize;
    return config;
  }

  // All sequences' tables start with the same blocks, or none do.
  void share_blocks(std::int64_t count) {
    for (std::int64_t i = 0; i < kBlocks; ++i) {
      const std::int64_t source = i % kWidth < count ? i % kWidth : i;
      table.as<std::int32_t>()[i] = static_cast<std::int32_t>((source * 7 + 3) % kBlocks);
    }
  }

  void run(bool on_device, Plan* plan, const Context& ctx, std::int64_t prefix = 0) {
    plan->update(batch(on_device), prefix, ctx);
    work(on_device, *plan, ctx);
  }

  // A layer of the planned step.
  void work(bool on_device, const Plan& plan, const Context& ctx) {
    const PagedKvCache kv = PagedKvCache::from_combined(
        cache.view(on_device, DType::kBFloat16, {kBlocks, 2, kBlockSize, kKvHeads, kSize}));
    write_kv_cache(key.view(on_device, DType::kBFloat16, {kTokens, kKvHeads, kSize}),
                   value.view(on_device, DType::kBFloat16, {kTokens, kKvHeads, kSize}), kv,
                   slots.view(on_device, DType::kInt64, {kTokens}), ctx);
    AttentionArgs args;
    args.query = query.view(on_device, DType::kBFloat16, {kTokens, kHeads, kSize});
    args.kv_cache = kv;
    args.output = output.view(on_device, DType::kFloat32, {kTokens, kHeads, kSize});
    attention(plan, args, ctx);
  }

  // Compares the device's output with the CPU's on the same step.
  void expect_same(const char* what) {
    std::fill(output.host.begin(), output.host.end(), static_cast<char>(0xFF));
    const std::vector<char> cache_before = cache.host;
    Plan plan(config(false));
    run(false, &plan, {});
    const std::vector<char> now = output.down();
    const auto* got = reinterpret_cast<const float*>(now.data());
    const float* wanted = output.as<float>();
    double error = 0;
    double norm = 0;
    for (std::int64_t i = 0; i < kTokens * kHeads * kSize; ++i) {
      ASSERT_EQ(std::isnan(got[i]), std::isnan(wanted[i])) << what << " element " << i;
      if (std::isnan(wanted[i])) continue;
      error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
      norm += wanted[i] * wanted[i];
    }
    EXPECT_LT(std::sqrt(error / norm), 1e-2) << what;
    EXPECT_EQ(std::memcmp(cache.down().data(), cache.host.data(), cache.host.size()), 0) << what;
    cache.host = cache_before;
  }

  Both query{kTokens * kHeads * kSize * 2};
  Both key{kTokens * kKvHeads * kSize * 2};
  Both value{kTokens * kKvHeads * kSize * 2};
  Both cache{kBlocks * 2 * kBlockSize * kKvHeads * kSize * 2};
  Both table{kBlocks * 4};
  Both starts{(kSeqs + 1) * 4};
  Both lens{kSeqs * 4};
  Both slots{kTokens * 8};
  Both output{kTokens * kHeads * kSize * 4};
};

class CudaGraphTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!attention_backend("cuda").available()) GTEST_SKIP() << "no CUDA device";
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  cudaStream_t stream_ = nullptr;
};

TEST_F(CudaGraphTest, OneCaptureServesEveryComposition) {
  Step step;
  step.upload();
  Context ctx;
  ctx.stream = stream_;
  Plan plan(step.config(true));
  step.set({{1, 5}, {1, 9}});
  step.run(true, &plan, ctx);  // warm up
  check(cudaStreamSynchronize(stream_));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  step.run(true, &plan, ctx);
  check(cudaStreamEndCapture(stream_, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  // A larger batch in between must not move what the graph refers to.
  const std::vector<std::vector<std::pair<int, int>>> steps = {
      {{1, 5}, {1, 9}},
      {{1, 2000}, {1, 1}, {1, 900}, {1, 17}, {1, 64}, {1, 65}},
      {{40, 40}, {5, 700}, {1, 2080}, {0, 0}, {50, 1500}},
      {{96, 2000}},
      {{0, 0}},
      {{3, 3}, {9, 400}, {1, 100}},
  };
  for (std::size_t i = 0; i < steps.size(); ++i) {
    step.set(steps[i]);
    step.upload();
    check(cudaGraphLaunch(executable, stream_));
    check(cudaStreamSynchronize(stream_));
    if (i == 4) continue;  // nothing to compare
    step.expect_same(("step " + std::to_string(i)).c_str());
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

// Announced prefixes come and go; before a capture, in one, and between the launches of its graph.
TEST_F(CudaGraphTest, CascadeBesideGraphs) {
  const std::vector<std::pair<int, int>> sharing = {{1, 1100}, {2, 1200}, {1, 2000}, {1, 1030}};
  const std::vector<std::pair<int, int>> short_ones = {{1, 30}, {3, 70}};
  for (const bool captures_plan : {true, false}) {
    Step step;
    Context ctx;
    ctx.stream = stream_;
    AttentionConfig config = step.config(true);
    config.auto_cascade = false;
    Plan plan(config);
    const auto eager = [&](std::int64_t prefix, const auto& lengths, const char* what) {
      step.share_blocks(prefix / kBlockSize);
      step.set(lengths);
      step.upload();
      step.run(true, &plan, ctx, prefix);
      check(cudaStreamSynchronize(stream_));
      step.expect_same(what);
    };
    eager(0, sharing, "plain");
    const std::int64_t plain_bytes = plan.workspace_bytes();
    eager(1024, sharing, "shared");
    EXPECT_GT(plan.workspace_bytes(), plain_bytes);
    eager(0, short_ones, "plain again");
    eager(1024, sharing, "shared again");

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    if (captures_plan) plan.update(step.batch(true), 1024, ctx);
    step.work(true, plan, ctx);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    for (const std::int64_t prefix : {1024, 0, 512, 0}) {
      for (const auto& lengths : {sharing, short_ones}) {
        eager(prefix, lengths, "between");
        step.upload();
        if (!captures_plan) plan.update(step.batch(true), prefix, ctx);
        check(cudaGraphLaunch(executable, stream_));
        check(cudaStreamSynchronize(stream_));
        step.expect_same("graph");
      }
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
}

TEST_F(CudaGraphTest, CaptureWithoutWarmUpIsRefused) {
  Step step;
  step.set({{1, 5}});
  step.upload();
  Context ctx;
  ctx.stream = stream_;
  Plan plan(step.config(true));
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  EXPECT_THROW(plan.update(step.batch(true), 0, ctx), Error);
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream_, &graph));
  cudaGraphDestroy(graph);
}

TEST_F(CudaGraphTest, StreamsDoNotDisturbEachOther) {
  constexpr int kStreams = 4;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<cudaStream_t> streams(kStreams);
  for (int i = 0; i < kStreams; ++i) {
    steps.push_back(std::make_unique<Step>());
    plans.push_back(std::make_unique<Plan>(steps.back()->config(true)));
    check(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    steps.back()->set({{1, 100 * i + 7}, {20 + i, 1500}, {1, 2000}});
    steps.back()->upload();
  }
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < kStreams; ++i) {
      Context ctx;
      ctx.stream = streams[i];
      steps[i]->run(true, plans[i].get(), ctx);
    }
  }
  for (int i = 0; i < kStreams; ++i) {
    check(cudaStreamSynchronize(streams[i]));
    steps[i]->expect_same("stream");
    cudaStreamDestroy(streams[i]);
  }
}

TEST_F(CudaGraphTest, TensorsOnAnotherDeviceAreRefused) {
  Step step;
  step.set({{1, 5}});
  step.upload();
  Plan plan(step.config(true));
  EXPECT_THROW(plan.update(step.batch(false)), Error);
  AttentionConfig config = step.config(true);
  config.device.index = 99;
  EXPECT_THROW(Plan{config}, Error);
}

}  // namespace
}  // namespace quire::conformance
