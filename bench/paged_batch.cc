#include "bench/paged_batch.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>

namespace quire::bench {
namespace {

std::int64_t first_needed_block(const Sequence& sequence, const Model& model,
                                std::int64_t block_size) {
  return (sequence.seq_len - needed_keys(sequence, model.sliding_window)) / block_size;
}

std::int64_t blocks_of(const Sequence& sequence, std::int64_t block_size) {
  return (sequence.seq_len + block_size - 1) / block_size;
}

TensorView view_of(std::vector<std::int32_t>& values, std::initializer_list<std::int64_t> shape) {
  return TensorView(values.data(), DType::kInt32, shape);
}

}  // namespace

std::int64_t count_blocks(const Workload& workload, std::int64_t block_size) {
  std::int64_t count = 0;
  for (const Sequence& s : workload.batch) {
    count += blocks_of(s, block_size) - first_needed_block(s, workload.model, block_size);
    count -= workload.shared_prefix / block_size;
  }
  return count + workload.shared_prefix / block_size;
}

PagedBatch make_paged_batch(const Workload& workload, std::int64_t block_size, std::uint64_t seed) {
  PagedBatch batch;
  batch.num_tokens = workload.num_tokens();
  batch.num_blocks = count_blocks(workload, block_size);
  batch.max_query_len = workload.max_query_len();
  batch.max_seq_len = workload.max_seq_len();
  batch.max_blocks = blocks_of({1, batch.max_seq_len}, block_size);
  if (std::max(batch.num_blocks, batch.num_tokens) > std::numeric_limits<std::int32_t>::max()) {
    throw std::runtime_error(workload.name + ": too large for 32-bit block numbers and rows");
  }

  std::mt19937_64 random(seed);
  std::vector<std::int32_t> order(static_cast<std::size_t>(batch.num_blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);

  // The first of them are shared.
  const std::int64_t shared = workload.shared_prefix / block_size;
  auto next = static_cast<std::size_t>(shared);
  batch.query_start_loc.push_back(0);
  for (const Sequence& s : workload.batch) {
    const std::size_t row = batch.block_table.size();
    batch.block_table.resize(row + static_cast<std::size_t>(batch.max_blocks), 0);
    const std::int64_t first = first_needed_block(s, workload.model, block_size);
    for (std::int64_t b = 0; b < blocks_of(s, block_size); ++b) {
      std::int32_t& block = batch.block_table[row + static_cast<std::size_t>(b)];
      if (b < shared) {
        block = order[static_cast<std::size_t>(b)];
      } else {
        block = b < first ? order[random() % order.size()] : order[next++];
      }
    }
    for (std::int64_t pos = s.seq_len - s.query_len; pos < s.seq_len; ++pos) {
      const std::int64_t block =
          batch.block_table[row + static_cast<std::size_t>(pos / block_size)];
      batch.slot_mapping.push_back(block * block_size + pos % block_size);
    }
    batch.seq_lens.push_back(static_cast<std::int32_t>(s.seq_len));
    batch.query_start_loc.push_back(batch.query_start_loc.back() +
                                    static_cast<std::int32_t>(s.query_len));
  }
  return batch;
}

CommonAttentionMetadata PagedBatch::metadata() {
  const auto num_seqs = static_cast<std::int64_t>(seq_lens.size());
  CommonAttentionMetadata common;
  common.query_start_loc = view_of(query_start_loc, {num_seqs + 1});
  common.seq_lens = view_of(seq_lens, {num_seqs});
  common.block_table = view_of(block_table, {num_seqs, max_blocks});
  common.slot_mapping = TensorView(slot_mapping.data(), DType::kInt64, {num_tokens});
  common.num_actual_tokens = num_tokens;
  common.max_query_len = max_query_len;
  common.max_seq_len = max_seq_len;
  return common;
}

}  // namespace quire::bench
