// A workload as the index tensors of one scheduler step over a paged cache in random page order.
#pragma once

#include <cstdint>
#include <vector>

#include "bench/workload.h"
#include "quire/metadata.h"

namespace quire::bench {

// In host memory. A batch on another device copies the four arrays.
struct PagedBatch {
  std::vector<std::int32_t> query_start_loc;  // [num_seqs + 1]
  std::vector<std::int32_t> seq_lens;         // [num_seqs]
  std::vector<std::int32_t> block_table;      // [num_seqs, max_blocks]
  std::vector<std::int64_t> slot_mapping;     // [num_tokens], of the query rows' tokens
  std::int64_t max_blocks = 0;
  std::int64_t num_blocks = 0;  // of the cache that the table refers to
  std::int64_t num_tokens = 0;
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;

  // Views of the arrays.
  CommonAttentionMetadata metadata();
};

// Each sequence gets blocks of its own behind the shared prefix, all in random order. Blocks in
// front of every sliding window are not allocated, as engines free them: their table entries name
// any other block. Throws std::runtime_error if the batch is too large for 32-bit indices.
PagedBatch make_paged_batch(const Workload& workload, std::int64_t block_size, std::uint64_t seed);

// The num_blocks of that batch.
std::int64_t count_blocks(const Workload& workload, std::int64_t block_size);

}  // namespace quire::bench
