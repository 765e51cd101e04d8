#include "bench/row_check.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "bench/layer.h"

namespace quire::bench {
namespace {

struct Row {
  std::size_t sequence = 0;
  std::int64_t row = 0;      // of the batch
  std::int64_t seq_len = 0;  // that it is the last position of
};

// Of the first, the last, the longest and the longest-queried sequence.
std::vector<Row> sampled_rows(const Workload& workload, const PagedBatch& batch) {
  const std::vector<Sequence>& sequences = workload.batch;
  const auto index_of = [&](auto less) {
    return static_cast<std::size_t>(std::max_element(sequences.begin(), sequences.end(), less) -
                                    sequences.begin());
  };
  const std::size_t chosen[] = {
      0, sequences.size() - 1,
      index_of([](const Sequence& a, const Sequence& b) { return a.seq_len < b.seq_len; }),
      index_of([](const Sequence& a, const Sequence& b) { return a.query_len < b.query_len; })};
  std::vector<Row> rows;
  for (const std::size_t i : chosen) {
    const Sequence& s = sequences[i];
    for (const std::int64_t row : {std::int64_t{0}, s.query_len - 1}) {
      const std::int64_t batch_row = batch.query_start_loc[i] + row;
      const bool known = std::any_of(rows.begin(), rows.end(),
                                     [&](const Row& other) { return other.row == batch_row; });
      if (!known) rows.push_back({i, batch_row, s.seq_len - s.query_len + row + 1});
    }
  }
  return rows;
}

// The rows as a batch of their own, of sequences of one row, over a host copy of their blocks.
class RowsOnCpu {
 public:
  RowsOnCpu(const Workload& workload, const Options& options, const PagedBatch& batch,
            const PagedKvCache& cache, const std::vector<Row>& rows, const ReadBytes& read)
      : workload_(workload), options_(options) {
    options_.device = DeviceType::kCpu;
    options_.backend.clear();
    add_rows(batch, rows);
    copy_blocks(cache, read);
  }

  // `query` and `output` of the rows alone, in host memory.
  void attend(const ConstTensorView& query, const TensorView& output) {
    std::vector<float> sinks(static_cast<std::size_t>(workload_.model.num_heads), kSink);
    TensorView sinks_view;
    if (workload_.model.sinks) {
      sinks_view = TensorView(sinks.data(), DType::kFloat32, {workload_.model.num_heads});
    }
    Plan plan(layer_config(workload_.model, options_, sinks_view));
    plan.update(batch_.metadata());
    AttentionArgs args;
    args.query = query;
    args.kv_cache = layout().view(data_.data(), scales_.data());
    args.output = output;
    attention(plan, args);
  }

 private:
  CacheLayout layout() const {
    return {workload_.model, options_, static_cast<std::int64_t>(blocks_.size())};
  }

  void add_rows(const PagedBatch& batch, const std::vector<Row>& rows) {
    batch_.query_start_loc.push_back(0);
    batch_.max_blocks = batch.max_blocks;
    for (const Row& row : rows) {
      const auto first =
          batch.block_table.begin() + static_cast<std::ptrdiff_t>(row.sequence) * batch.max_blocks;
      for (std::int64_t b = 0; b < batch.max_blocks; ++b) {
        const bool is_used = b * options_.block_size < row.seq_len;
        batch_.block_table.push_back(is_used ? static_cast<std::int32_t>(blocks_.size()) : 0);
        if (is_used) blocks_.push_back(first[b]);
      }
      batch_.seq_lens.push_back(static_cast<std::int32_t>(row.seq_len));
      batch_.query_start_loc.push_back(batch_.query_start_loc.back() + 1);
      batch_.max_seq_len = std::max(batch_.max_seq_len, row.seq_len);
    }
    batch_.num_blocks = static_cast<std::int64_t>(blocks_.size());
    batch_.num_tokens = static_cast<std::int64_t>(rows.size());
    batch_.max_query_len = 1;
  }

  void copy_blocks(const PagedKvCache& cache, const ReadBytes& read) {
    const auto count = static_cast<std::int64_t>(blocks_.size());
    const std::int64_t block_bytes = layout().data_bytes / count;      // K and V
    const std::int64_t part_bytes = layout().scale_bytes / count / 2;  // of K or of V
    data_.resize(static_cast<std::size_t>(count * block_bytes));
    scales_.resize(static_cast<std::size_t>(2 * count * part_bytes));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t block = blocks_[static_cast<std::size_t>(i)];
      read(data_.data() + i * block_bytes,
           static_cast<const char*>(cache.key.data) + block * block_bytes, block_bytes);
      if (part_bytes == 0) continue;
      read(scales_.data() + i * part_bytes,
           static_cast<const char*>(cache.k_scale_cache.data) + block * part_bytes, part_bytes);
      read(scales_.data() + (count + i) * part_bytes,
           static_cast<const char*>(cache.v_scale_cache.data) + block * part_bytes, part_bytes);
    }
  }

  const Workload& workload_;
  Options options_;
  PagedBatch batch_;
  std::vector<std::int32_t> blocks_;  // of the device's cache
  std::vector<char> data_, scales_;
};

}  // namespace

double largest_row_error(const Workload& workload, const Options& options, const PagedBatch& batch,
                         const PagedKvCache& cache, const TensorView& query,
                         const TensorView& output, const ReadBytes& read) {
  const std::vector<Row> rows = sampled_rows(workload, batch);
  const Model& model = workload.model;
  const std::int64_t row_elements = model.num_heads * model.head_size;
  const std::int64_t row_bytes = row_elements * size_of(options.dtype);
  const auto num_rows = static_cast<std::int64_t>(rows.size());
  std::vector<char> queries(static_cast<std::size_t>(num_rows * row_bytes));
  std::vector<char> outputs(queries.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t to = static_cast<std::int64_t>(i) * row_bytes;
    const std::int64_t from = rows[i].row * row_bytes;
    read(queries.data() + to, static_cast<const char*>(query.data) + from, row_bytes);
    read(outputs.data() + to, static_cast<const char*>(output.data) + from, row_bytes);
  }
  std::vector<float> expected(static_cast<std::size_t>(num_rows * row_elements));
  RowsOnCpu(workload, options, batch, cache, rows, read)
      .attend(
          TensorView(queries.data(), options.dtype, {num_rows, model.num_heads, model.head_size}),
          TensorView(expected.data(), DType::kFloat32,
                     {num_rows, model.num_heads, model.head_size}));
  const TensorView got(outputs.data(), options.dtype, {num_rows * row_elements});
  double error = 0.0;
  for (std::int64_t head = 0; head < num_rows * model.num_heads; ++head) {
    double difference = 0.0;
    double largest = 0.0;
    for (std::int64_t i = head * model.head_size; i < (head + 1) * model.head_size; ++i) {
      const double wanted = expected[static_cast<std::size_t>(i)];
      const double value = element(got, i);
      if (!std::isfinite(value)) return std::numeric_limits<double>::infinity();
      difference = std::max(difference, std::fabs(value - wanted));
      largest = std::max(largest, std::fabs(wanted));
    }
    error = std::max(error, difference / largest);
  }
  return error;
}

}  // namespace quire::bench
