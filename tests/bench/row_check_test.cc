// The check of a device's output, on a layer in host memory.
#include "bench/row_check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "bench/layer.h"
#include "bench/paged_batch.h"
#include "bench/random_data.h"

namespace quire::bench {
namespace {

class RowCheck : public testing::TestWithParam<KvCacheDType> {
 protected:
  RowCheck() {
    workload_.name = "w";
    workload_.model = {.name = "m",
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .head_size = 32,
                       .sliding_window = 40,
                       .soft_cap = 20.0F,
                       .sinks = true};
    workload_.batch = {{1, 100}, {30, 70}, {3, 215}, {1, 1}};
    options_.kv_cache_dtype = GetParam();
    options_.dtype = DType::kFloat32;
    options_.backend = "reference";
    batch_ = make_paged_batch(workload_, options_.block_size, 1);
    query_ = tensor(&query_data_, {batch_.num_tokens, 4, 32});
    output_ = tensor(&output_data_, {batch_.num_tokens, 4, 32});
    const CacheLayout layout(workload_.model, options_, batch_.num_blocks);
    cache_data_.resize(static_cast<std::size_t>(layout.data_bytes));
    scales_.resize(static_cast<std::size_t>(layout.scale_bytes));
    cache_ = layout.view(cache_data_.data(), scales_.data());
    attend();
  }

  TensorView tensor(std::vector<float>* data, std::initializer_list<std::int64_t> shape) {
    const TensorView view(nullptr, DType::kFloat32, shape);
    data->resize(static_cast<std::size_t>(view.num_elements()));
    NormalSource(DType::kFloat32, ++seed_).fill(data->data(), data->size());
    return TensorView(data->data(), DType::kFloat32, shape);
  }

  void attend() {
    const std::int64_t num_slots = batch_.num_blocks * options_.block_size;
    std::vector<std::int64_t> slots(static_cast<std::size_t>(num_slots));
    std::iota(slots.begin(), slots.end(), 0);
    std::vector<float> keys, values;
    write_kv_cache(tensor(&keys, {num_slots, 2, 32}), tensor(&values, {num_slots, 2, 32}), cache_,
                   TensorView(slots.data(), DType::kInt64, {num_slots}));
    std::vector<float> sinks(4, kSink);
    const TensorView sinks_view(sinks.data(), DType::kFloat32, {4});
    Plan plan(layer_config(workload_.model, options_, sinks_view));
    plan.update(batch_.metadata());
    AttentionArgs args;
    args.query = query_;
    args.kv_cache = cache_;
    args.output = output_;
    attention(plan, args);
  }

  double error() const {
    return largest_row_error(workload_, options_, batch_, cache_, query_, output_,
                             [](void* to, const void* from, std::int64_t bytes) {
                               std::memcpy(to, from, static_cast<std::size_t>(bytes));
                             });
  }

  Workload workload_;
  Options options_;
  PagedBatch batch_;
  std::uint64_t seed_ = 0;
  std::vector<float> query_data_, output_data_;
  std::vector<char> cache_data_, scales_;
  TensorView query_, output_;
  PagedKvCache cache_;
};

TEST_P(RowCheck, SeesWrongRows) {
  EXPECT_LT(error(), 1e-4);
  // The last row of the second sequence.
  float* row = output_data_.data() + std::ptrdiff_t{30} * 4 * 32;
  const float right = row[5];
  row[5] += 10.0F;
  EXPECT_GT(error(), 1.0);
  row[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error(), std::numeric_limits<double>::infinity());
  row[5] = right;
  EXPECT_LT(error(), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(CacheDTypes, RowCheck,
                         testing::Values(KvCacheDType::kAuto, KvCacheDType::kFp8E4M3,
                                         KvCacheDType::kInt8PerTokenHead,
                                         KvCacheDType::kInt4PerTokenHead),
                         [](const auto& param) { return std::string(to_string(param.param)); });

}  // namespace
}  // namespace quire::bench
