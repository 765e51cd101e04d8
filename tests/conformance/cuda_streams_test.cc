// Plans on streams of their own, at the same time: every result is what it is alone, to the bit.
#include <memory>
#include <thread>
#include <vector>

#include "tests/conformance/cuda_fixture.h"

namespace quire::conformance {
namespace {

using Jobs = std::vector<std::unique_ptr<CudaJob>>;

CaseSpec layer_spec(DType dtype, KvCacheDType cache, std::vector<SequenceSpec> sequences) {
  CaseSpec spec;
  spec.seed = 21;
  spec.model_dtype = spec.config.dtype = dtype;
  spec.config.num_heads = 8;
  spec.config.num_kv_heads = 2;
  spec.config.head_size = 128;
  spec.config.block_size = 16;
  spec.config.kv_cache_dtype = cache;
  spec.sequences = std::move(sequences);
  return spec;
}

// Batches that differ in everything, each large enough to be under way when the next one starts.
Jobs make_jobs() {
  std::vector<CaseSpec> specs;
  specs.push_back(
      layer_spec(DType::kBFloat16, KvCacheDType::kAuto, {{1, 4000}, {1, 700}, {1, 33}, {1, 2100}}));
  specs.push_back(
      layer_spec(DType::kFloat16, KvCacheDType::kFp8E4M3, {{300, 600}, {1, 1500}, {90, 90}}));
  specs.push_back(layer_spec(DType::kFloat32, KvCacheDType::kAuto, {{40, 400}, {1, 900}}));
  specs.push_back(
      layer_spec(DType::kBFloat16, KvCacheDType::kAuto, {{1, 900}, {2, 850}, {1, 999}}));
  specs.back().shared_prefix_len = specs.back().announced_prefix_len = 800;
  specs.back().config.score.soft_cap = 30.0F;
  Jobs jobs;
  for (const CaseSpec& spec : specs) jobs.push_back(std::make_unique<CudaJob>(spec));
  return jobs;
}

std::vector<Actual> results_alone(const Jobs& jobs) {
  std::vector<Actual> results;
  for (const auto& job : jobs) {
    job->launch();
    results.push_back(job->result());
    EXPECT_EQ(compare(job->made, results.back(), reference_attention(job->made)), "");
  }
  return results;
}

void expect_results(const Jobs& jobs, const std::vector<Actual>& wanted) {
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const Actual got = jobs[i]->result();
    EXPECT_TRUE(got.output == wanted[i].output && got.lse == wanted[i].lse)
        << describe(jobs[i]->made.spec);
    EXPECT_EQ(jobs[i]->on_device.damage(), "");
  }
}

class CudaStreamsTest : public CudaTest {};

TEST_F(CudaStreamsTest, AtTheSameTimeAsAlone) {
  const Jobs jobs = make_jobs();
  const std::vector<Actual> alone = results_alone(jobs);
  for (const auto& job : jobs) job->poison_outputs();
  for (int round = 0; round < 20; ++round) {
    for (const auto& job : jobs) job->launch();
  }
  expect_results(jobs, alone);
}

TEST_F(CudaStreamsTest, FromThreadsOfTheirOwn) {
  const Jobs jobs = make_jobs();
  const std::vector<Actual> alone = results_alone(jobs);
  for (const auto& job : jobs) job->poison_outputs();
  std::vector<std::thread> threads;
  for (const auto& job : jobs) {
    threads.emplace_back([&job] {
      for (int round = 0; round < 20; ++round) job->launch();
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_results(jobs, alone);
}

// The limit of shared memory belongs to a kernel and the process. A plan that needs little of it, made
// later, must not lower it for one that needs more (the campaign found that it did).
TEST_F(CudaStreamsTest, PlansThatShareAKernelKeepTheirLimits) {
  CaseSpec small = layer_spec(DType::kFloat32, KvCacheDType::kAuto, {{3, 40}});
  small.config.head_size = 16;
  CudaJob before(layer_spec(DType::kFloat32, KvCacheDType::kAuto, {{3, 40}}));
  CudaJob after(small);
  for (CudaJob* job : {&before, &after}) {
    job->launch();
    EXPECT_EQ(compare(job->made, job->result(), reference_attention(job->made)), "");
  }
}

}  // namespace
}  // namespace quire::conformance
