// Two sequences over one paged cache: write this step's K and V, plan, attend.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "quire/quire.h"

int main() {
  constexpr std::int64_t kHeads = 4, kKvHeads = 2, kHeadSize = 64, kBlocks = 8, kBlockSize = 16;
  using enum quire::DType;

  // The cache: one allocation, blocks handed out in any order.
  std::vector<float> cache_data(kBlocks * 2 * kBlockSize * kKvHeads * kHeadSize);
  const auto cache = quire::PagedKvCache::from_combined(quire::TensorView(
      cache_data.data(), kFloat32, {kBlocks, 2, kBlockSize, kKvHeads, kHeadSize}));

  // The batch: sequence 0 prefills 20 tokens (blocks 5 and 2), sequence 1 one token (block 7).
  const std::vector<std::int32_t> query_start_loc = {0, 20, 21}, seq_lens = {20, 1};
  const std::vector<std::int32_t> block_table = {5, 2, 7, 0};
  std::vector<std::int64_t> slots;
  for (int token = 0; token < 20; ++token) {
    slots.push_back(block_table[token / kBlockSize] * kBlockSize + token % kBlockSize);
  }
  slots.push_back(7 * kBlockSize);
  quire::CommonAttentionMetadata batch;
  batch.query_start_loc = {query_start_loc.data(), kInt32, {3}};
  batch.seq_lens = {seq_lens.data(), kInt32, {2}};
  batch.block_table = {block_table.data(), kInt32, {2, 2}};
  batch.num_actual_tokens = 21;

  // K is the same everywhere, so a query weighs all keys it sees alike; V is the token's number.
  const std::vector<float> query(21 * kHeads * kHeadSize, 0.5F);
  const std::vector<float> key(21 * kKvHeads * kHeadSize, 1.0F);
  std::vector<float> value(key.size()), output(query.size());
  for (std::size_t i = 0; i < value.size(); ++i) {
    value[i] = static_cast<float>(i / (kKvHeads * kHeadSize));
  }

  try {
    quire::write_kv_cache({key.data(), kFloat32, {21, kKvHeads, kHeadSize}},
                          {value.data(), kFloat32, {21, kKvHeads, kHeadSize}}, cache,
                          {slots.data(), kInt64, {21}});
    quire::Plan plan({.dtype = kFloat32,
                      .num_heads = kHeads,
                      .num_kv_heads = kKvHeads,
                      .head_size = kHeadSize,
                      .block_size = kBlockSize});
    plan.update(batch);
    quire::attention(plan, {.query = {query.data(), kFloat32, {21, kHeads, kHeadSize}},
                            .kv_cache = cache,
                            .output = {output.data(), kFloat32, {21, kHeads * kHeadSize}}});
    std::printf("backend %s: token 19 sees the mean of 0..19 = %.2f, token 20 itself = %.2f\n",
                plan.backend_name(), output[19 * kHeads * kHeadSize],
                output[20 * kHeads * kHeadSize]);
  } catch (const quire::Error& error) {
    std::fprintf(stderr, "hello: %s\n", error.what());
    return 1;
  }
}
