// One workload's layer on the CPU: caches, batch, plan and tensors, ready to be called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "bench/bench.h"
#include "bench/machine.h"
#include "bench/paged_batch.h"
#include "bench/workload.h"
#include "quire/quire.h"

namespace quire::bench {

// A paged cache of one layer with its memory.
class Cache {
 public:
  Cache(const Model& model, const Options& options, std::int64_t num_blocks);

  const PagedKvCache& view() const { return view_; }
  std::int64_t num_bytes() const {
    return static_cast<std::int64_t>(data_.size() + scales_.size());
  }

 private:
  Buffer data_;
  Buffer scales_;  // per token and head
  PagedKvCache view_;
};

class CpuLayer {
 public:
  // Allocates `num_caches` caches and fills them. `options` and `threads` must outlive the layer.
  CpuLayer(const Workload& workload, const Options& options, std::int64_t num_caches,
           ThreadPool& threads);

  // What is timed. Call number `call` uses cache number call % num_caches.
  void plan();
  void write(std::size_t call);
  void attend(std::size_t call);

  const TensorView& output() const { return output_; }

  std::int64_t cache_bytes() const { return caches_.front().num_bytes(); }
  std::int64_t workspace_bytes() const { return plan_.workspace_bytes(); }

 private:
  TensorView sinks_of(const Model& model);
  TensorView tensor(Buffer* memory, std::initializer_list<std::int64_t> shape) const;
  const PagedKvCache& cache(std::size_t call) const;
  void fill(const Cache& target);

  const Options& options_;
  std::int64_t announced_prefix_;
  PagedBatch batch_;
  Context context_;
  std::vector<float> sinks_;
  Plan plan_;
  Buffer query_data_;
  Buffer output_data_;
  Buffer key_data_;
  Buffer value_data_;
  TensorView query_;
  TensorView output_;
  TensorView key_;
  TensorView value_;
  std::vector<Cache> caches_;
};

}  // namespace quire::bench
