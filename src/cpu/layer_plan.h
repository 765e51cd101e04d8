// The CPU backend's plan and workspace: everything a call needs. Memory only grows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace quire::cpu {

inline ThreadPool& pool_of(const Context& ctx) {
  return ctx.threads != nullptr ? *ctx.threads : default_thread_pool();
}

class CpuPlan final : public LayerPlan {
 public:
  explicit CpuPlan(const LayerParams& layer) : layer_(layer) {}

  // Cuts the batch for as many threads as the pool of `ctx` has.
  void update(const BatchParams& batch, const Context& ctx) override;
  void attention(const AttentionParams& params, const Context& ctx) override;

  // Scratch for threads [0, num_threads): a call may bring a larger pool than the plan's.
  void reserve_workers(int num_threads);
  // The unquantised outputs of block-scale output, [num_tokens, num_heads * head_size_v].
  float* reserve_block_output(std::int64_t count);

  const WorkPlan& work() const { return work_; }
  Scratch& scratch(int worker) { return scratch_[static_cast<std::size_t>(worker)]; }
  // A partial of the running schedule: of an item, rows head_rows() apart for each kv head.
  Partial partial(const Schedule& schedule, std::int64_t index) const;
  // What one row of WorkPlan::shared_rows and one head saw in the shared prefix.
  Partial prefix_partial(std::int64_t shared_row, std::int32_t head) const;

  std::int32_t padded_k() const {
    return static_cast<std::int32_t>(round_up(layer_.head_size, kPadK));
  }
  std::int32_t padded_v() const {
    return static_cast<std::int32_t>(round_up(layer_.head_size_v, kPadV));
  }

  std::int64_t workspace_bytes() const override;
  std::string to_string() const override { return cpu::to_string(layer_, work_); }

 private:
  std::int64_t partial_floats(const Schedule& schedule) const;
  void size_scratch(Scratch* scratch) const;

  LayerParams layer_;
  WorkPlan work_;
  std::vector<Scratch> scratch_;
  AlignedFloats partials_;
  AlignedFloats prefix_partials_;
  AlignedFloats block_output_;
};

void run_cache_write(const CacheWriteParams& params, ThreadPool& pool);
void run_merge(const MergeParams& params, ThreadPool& pool);

// pool.run with any callable f(index, worker); allocates nothing.
template <class F>
void parallel_for(ThreadPool& pool, std::int64_t count, F& f) {
  pool.run(
      count,
      [](void* context, std::int64_t index, int worker) {
        (*static_cast<F*>(context))(index, worker);
      },
      &f);
}

}  // namespace quire::cpu
