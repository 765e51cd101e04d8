// A workload's layer as it is on every device: its configuration, its cache's layout, the check of
// its output.
#pragma once

#include <cstdint>
#include <string>

#include "bench/bench.h"
#include "bench/workload.h"
#include "quire/quire.h"

namespace quire::bench {

// The tokens that fill a cache: so many random ones, again and again.
inline constexpr std::int64_t kFillTokens = 2048;

// The logit of every head's sink, of models that have them.
inline constexpr float kSink = 0.5F;

// `sinks` on the options' device; empty for models without them.
AttentionConfig layer_config(const Model& model, const Options& options, const TensorView& sinks);

// One layer's cache, in the memory of the options' device.
struct CacheLayout {
  CacheLayout(const Model& model, const Options& options, std::int64_t num_blocks);

  std::int64_t data_bytes = 0;
  std::int64_t scale_bytes = 0;  // per token and head; 0 for other caches

  PagedKvCache view(void* data, void* scales) const;

 private:
  const Model& model_;
  const Options& options_;
  std::int64_t num_blocks_;
};

// Of a contiguous tensor in host memory, fp16, bf16 or fp32.
double element(const TensorView& tensor, std::int64_t i);

// Throws std::runtime_error if the output (in host memory) is not finite or all zeros: a benchmark
// of wrong results is worth nothing.
void check_output(const TensorView& output, const std::string& name);

}  // namespace quire::bench
