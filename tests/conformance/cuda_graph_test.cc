// CUDA graphs: one capture of plan, cache write and attention serves every batch up to its padded
// size; a capture that would have to allocate says so.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/conformance/cuda_fixture.h"

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
    share_blocks(0);
  }

  // Lengths of a step; what is left of the padded size is padding: requests of no tokens whose
  // tables name block 0, tokens without a slot.
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
      const bool padding = s >= static_cast<std::int64_t>(lengths.size());
      for (std::int64_t i = s * kWidth; i < (s + 1) * kWidth; ++i) {
        table.as<std::int32_t>()[i] = padding ? 0 : blocks[static_cast<std::size_t>(i)];
      }
      start[s + 1] = start[s] + query_len;
      seq_len[s] = len;
      for (int i = 0; i < query_len; ++i) {
        const int position = len - query_len + i;
        const std::int64_t block = table.as<std::int32_t>()[s * kWidth + position / kBlockSize];
        slot[start[s] + i] = block * kBlockSize + position % kBlockSize;
      }
    }
  }

  void upload() {
    for (Both* data : {&query, &key, &value, &cache, &table, &starts, &lens, &slots}) data->up();
    check(cudaMemset(output.device, 0xFF, output.host.size()));
    check(cudaDeviceSynchronize());  // the test's stream does not wait for these
  }

  CommonAttentionMetadata batch(bool on_device) {
    CommonAttentionMetadata batch;
    batch.query_start_loc = starts.view(on_device, DType::kInt32, {kSeqs + 1});
    batch.seq_lens = lens.view(on_device, DType::kInt32, {kSeqs});
    batch.block_table = table.view(on_device, DType::kInt32, {kSeqs, kWidth});
    batch.num_actual_tokens = kTokens;
    batch.max_query_len = max_query_len;
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
      blocks[static_cast<std::size_t>(i)] = static_cast<std::int32_t>((source * 7 + 3) % kBlocks);
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
    EXPECT_LE(std::sqrt(error), 1e-2 * std::sqrt(norm)) << what;
    EXPECT_EQ(std::memcmp(cache.down().data(), cache.host.data(), cache.host.size()), 0) << what;
    cache.host = cache_before;
  }

  std::int64_t max_query_len = 0;     // that the batch announces
  std::vector<std::int32_t> blocks =  // of the tables without padding
      std::vector<std::int32_t>(kBlocks);
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

using Lengths = std::vector<std::pair<int, int>>;

Lengths random_lengths(std::mt19937* random, int most_rows) {
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(*random);
  };
  Lengths lengths;
  int rows = kTokens;
  for (int count = draw(1, kSeqs); count > 0; --count) {
    const int most = std::min(rows, most_rows);
    const int query_len = draw(std::min(draw(0, 1), most), most);
    rows -= query_len;
    lengths.emplace_back(query_len, std::max(query_len, draw(1, kWidth * kBlockSize)));
  }
  return lengths;
}

class CudaGraphTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    ctx_.stream = stream_;
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // Captures a step after a warm-up with the same lengths; launches it for each of `steps`.
  void replay(Step* step, const Lengths& captured, const std::vector<Lengths>& steps) {
    Plan plan(step->config(true));
    step->set(captured);
    step->upload();
    step->run(true, &plan, ctx_);
    check(cudaStreamSynchronize(stream_));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    step->run(true, &plan, ctx_);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    for (const Lengths& lengths : steps) {
      step->set(lengths);
      step->upload();
      check(cudaGraphLaunch(executable, stream_));
      check(cudaStreamSynchronize(stream_));
      step->expect_same(testing::PrintToString(lengths).c_str());
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }

  // What `call` throws in a capture; the capture ends without it.
  std::string refused_in_capture(const std::function<void()>& call) {
    std::string text;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    try {
      call();
    } catch (const Error& error) {
      text = error.what();
    }
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_, &graph));
    cudaGraphDestroy(graph);
    return text;
  }

  cudaStream_t stream_ = nullptr;
  Context ctx_;
};

TEST_F(CudaGraphTest, OneCaptureServesEveryComposition) {
  std::vector<Lengths> steps = {
      {{1, 5}, {1, 9}},
      {{1, 2000}, {1, 1}, {1, 900}, {1, 17}, {1, 64}, {1, 65}},
      {{40, 40}, {5, 700}, {1, 2080}, {0, 0}, {50, 1500}},
      {{96, 2000}},
      {},
      {{0, 0}},
      {{3, 3}, {9, 400}, {1, 100}},
  };
  std::mt19937 random(17);
  for (int i = 0; i < 25; ++i) steps.push_back(random_lengths(&random, kTokens));
  Step step;
  replay(&step, {{1, 5}, {1, 9}}, steps);
}

// A graph of decode steps alone: the kernel for long requests is not in it.
TEST_F(CudaGraphTest, CaptureOfDecodeServesEveryDecodeBatch) {
  std::mt19937 random(18);
  std::vector<Lengths> steps;
  for (int i = 0; i < 25; ++i) steps.push_back(random_lengths(&random, 1));
  Step step;
  step.max_query_len = 1;
  replay(&step, {{1, 5}, {1, 9}}, steps);
}

// A batch that says that all its requests are of one length is one kernel's; a graph that was captured
// after it serves others too.
TEST_F(CudaGraphTest, CaptureAfterRequestsOfOneLength) {
  Step step;
  Plan plan(step.config(true));
  const auto eager = [&](std::int64_t max_query_len, const Lengths& lengths, const char* what) {
    step.max_query_len = max_query_len;
    step.set(lengths);
    step.upload();
    step.run(true, &plan, ctx_);
    check(cudaStreamSynchronize(stream_));
    step.expect_same(what);
  };
  const std::int64_t equal_share = kTokens / kSeqs;
  eager(kTokens, {{1, 5}, {1, 9}}, "any length");
  eager(equal_share, {{16, 700}, {16, 16}, {16, 90}, {16, 2000}, {16, 64}, {16, 17}}, "one length");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  step.work(true, plan, ctx_);
  check(cudaStreamEndCapture(stream_, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  std::mt19937 random(19);
  for (int i = 0; i < 12; ++i) {
    // Every other time the batch's padding makes it look like one of equal lengths.
    eager(i % 2 == 0 ? equal_share : kTokens, random_lengths(&random, 16), "between");
    step.upload();
    check(cudaGraphLaunch(executable, stream_));
    check(cudaStreamSynchronize(stream_));
    step.expect_same("graph");
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
    AttentionConfig config = step.config(true);
    config.auto_cascade = false;
    Plan plan(config);
    const auto eager = [&](std::int64_t prefix, const auto& lengths, const char* what) {
      step.share_blocks(prefix / kBlockSize);
      step.set(lengths);
      step.upload();
      step.run(true, &plan, ctx_, prefix);
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
    if (captures_plan) plan.update(step.batch(true), 1024, ctx_);
    step.work(true, plan, ctx_);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    for (const std::int64_t prefix : {1024, 0, 512, 0}) {
      for (const auto& lengths : {sharing, short_ones}) {
        eager(prefix, lengths, "between");
        step.upload();
        if (!captures_plan) plan.update(step.batch(true), prefix, ctx_);
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
  Plan plan(step.config(true));
  const std::string refusal = refused_in_capture([&] { plan.update(step.batch(true), 0, ctx_); });
  EXPECT_NE(refusal.find("warm up"), std::string::npos) << refusal;
  const std::vector<char> output = step.output.down();
  EXPECT_TRUE(std::all_of(output.begin(), output.end(), [](char byte) { return byte == '\xFF'; }));
  step.run(true, &plan, ctx_);  // it is none the worse for it
  check(cudaStreamSynchronize(stream_));
  step.expect_same("after the refusal");
}

// Block scales need memory of their own at the first call.
TEST_F(CudaGraphTest, AttentionWithoutWarmUpIsRefused) {
  CaseSpec spec;
  spec.seed = 41;
  spec.model_dtype = spec.config.dtype = DType::kBFloat16;
  spec.config.num_heads = 4;
  spec.config.num_kv_heads = 2;
  spec.config.head_size = 64;
  spec.config.block_size = 16;
  spec.sequences = {{1, 40}, {30, 50}};
  spec.output_dtype = DType::kFloat8E4M3;
  spec.block_scale = true;
  CudaJob job(spec);
  job.plan.update(job.batch, 0, ctx_);
  check(cudaStreamSynchronize(stream_));
  const std::string refusal = refused_in_capture([&] { attention(job.plan, job.args, ctx_); });
  EXPECT_NE(refusal.find("warm up"), std::string::npos) << refusal;
  EXPECT_EQ(job.on_device.buffers().damage({}), "");
}

}  // namespace
}  // namespace quire::conformance
