// Workloads: what a benchmark runs, read from a file, and what each costs by definition.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quire::bench {

// The attention layer of a model.
struct Model {
  std::string name;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t sliding_window = 0;  // 0: none
  float soft_cap = 0.0F;            // 0: none
  bool sinks = false;
};

// One sequence of a batch: its query rows are the last `query_len` of its `seq_len` positions.
struct Sequence {
  std::int64_t query_len = 0;
  std::int64_t seq_len = 0;
  friend bool operator==(const Sequence&, const Sequence&) = default;
};

struct Workload {
  std::string name;
  Model model;
  std::vector<Sequence> batch;
  std::int64_t shared_prefix = 0;  // first keys that all sequences have in common, in their past
  double scale = 1.0;

  std::int64_t num_tokens() const;  // query rows
  std::int64_t max_query_len() const;
  std::int64_t max_seq_len() const;
};

// Bytes of one element of the query and the output, bits of one of K and V as they are stored, and
// bytes of the scale of their rows, where each has one of its own.
struct ElementSizes {
  std::int64_t query = 2;
  std::int64_t kv_bits = 16;
  std::int64_t kv_scale = 0;
  std::int64_t kv_row(std::int64_t head_size) const { return head_size * kv_bits / 8 + kv_scale; }
};

// Visible (query, key) pairs of one sequence under causality and the sliding window.
std::int64_t visible_pairs(const Sequence& sequence, std::int64_t sliding_window);
// Keys that at least one query row of the sequence sees.
std::int64_t needed_keys(const Sequence& sequence, std::int64_t sliding_window);

// 4 * pairs * num_heads * head_size: a multiplication and an addition for Q K and for P V.
std::int64_t flops(const Workload& workload);
// Each needed K and V row once, the query and the output.
std::int64_t bytes(const Workload& workload, const ElementSizes& sizes = {});

// K and V of the new tokens: read in the query's dtype, written as the cache stores them.
std::int64_t write_bytes(const Workload& workload, const ElementSizes& sizes = {});

// Reads and checks a workload file (see bench/cases/workloads.json). Throws std::runtime_error that
// names the file, the workload and the member that is wrong; stored flops and bytes that the
// definitions above do not give are such an error.
std::vector<Workload> load_workloads(const std::string& path);

// The workload with about `scale` (0 < scale <= 1) of its flops, in the same shape: decoding and
// prefilling sequences are thinned out alike, evenly over the lengths that occur, and when a kind
// is down to one sequence its length shrinks instead. 1 is the workload itself.
Workload scaled(const Workload& workload, double scale);

}  // namespace quire::bench
