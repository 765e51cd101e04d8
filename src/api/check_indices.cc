// Context::check_indices: the data of index tensors, looked at before anything runs.
#include <algorithm>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/lower.h"

namespace quire::api {
namespace {

std::string entry(const char* name, std::int64_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

// `count` entries of an index tensor on the host.
template <class T>
std::vector<T> read(const Backend& backend, Device device, const T* from, std::int64_t count,
                    const Context& ctx) {
  std::vector<T> values(static_cast<std::size_t>(count));
  if (count > 0) backend.read(device, values.data(), from, values.size() * sizeof(T), ctx);
  return values;
}

// Positions are at least 0 and below 2^31, those of all keys and rows; strides at least 1.
void check_positions(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                     const std::vector<std::int32_t>& start, const Context& ctx) {
  const auto values = [&](const std::int32_t* from, std::int32_t absent) {
    if (from == nullptr) return std::vector<std::int32_t>(batch.num_seqs, absent);
    return read(backend, layer.device, from, batch.num_seqs, ctx);
  };
  if (!batch.has_positions()) return;
  const std::vector<std::int32_t> kv_offset = values(batch.kv_offset, 0);
  const std::vector<std::int32_t> kv_stride = values(batch.kv_stride, 1);
  const std::vector<std::int32_t> q_offset = values(batch.q_offset, 0);
  // Keys of attention without a cache are counted by kv_start_loc.
  const std::vector<std::int32_t> seq_lens = values(layer.paged ? batch.seq_lens : nullptr, 0);
  constexpr std::int64_t kEnd = std::int64_t{1} << 31;
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t last_key = std::max<std::int64_t>(std::int64_t{seq_lens[s]} - 1, 0);
    const std::int64_t last_row = std::max(start[s + 1] - start[s] - 1, 0);
    check::that(kv_stride[s] >= 1, entry("kv_stride", s), "at least 1", kv_stride[s]);
    check::that(kv_offset[s] >= 0 && kv_offset[s] + last_key * kv_stride[s] < kEnd,
                entry("kv_offset", s), "at least 0, and the last key's position below 2^31",
                kv_offset[s]);
    check::that(q_offset[s] >= 0 && q_offset[s] + last_row < kEnd, entry("q_offset", s),
                "at least 0, and the last row's position below 2^31", q_offset[s]);
  }
}

}  // namespace

void check_batch_indices(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                         const Context& ctx) {
  const std::vector<std::int32_t> start =
      read(backend, layer.device, batch.query_start_loc, batch.num_seqs + 1, ctx);
  check::that(start[0] == 0, "query_start_loc[0]", "0", start[0]);
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    check::that(start[s + 1] >= start[s], entry("query_start_loc", s + 1),
                "at least the entry before it, " + std::to_string(start[s]), start[s + 1]);
  }
  // Rows past num_actual_tokens are padding and may be named.
  check_positions(backend, layer, batch, start, ctx);
  if (!layer.paged) return;
  const std::int64_t reachable = batch.table_width * layer.block_size;
  const std::vector<std::int32_t> seq_lens =
      read(backend, layer.device, batch.seq_lens, batch.num_seqs, ctx);
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t seq_len = seq_lens[s];
    const std::int64_t query_len = start[s + 1] - start[s];
    check::that(seq_len >= 0, entry("seq_lens", s), "at least 0", seq_len);
    check::that(seq_len <= reachable, entry("seq_lens", s),
                "at most block_table's width times block_size, " + std::to_string(reachable),
                seq_len);
    const bool own_keys = !layer.cross && batch.q_offset == nullptr;
    check::that(!own_keys || seq_len == 0 || query_len <= seq_len, entry("seq_lens", s),
                "at least the query length " + std::to_string(query_len), seq_len);
  }
}

void check_block_table(const Backend& backend, const AttentionParams& params, const Context& ctx) {
  const LayerParams& layer = *params.layer;
  const BatchParams& batch = *params.batch;
  if (!layer.paged) return;
  const std::vector<std::int32_t> seq_lens =
      read(backend, layer.device, batch.seq_lens, batch.num_seqs, ctx);
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t blocks =
        (seq_lens[s] + std::int64_t{layer.block_size} - 1) / layer.block_size;
    const std::int64_t used = clamp_index(blocks, 0, batch.table_width);
    const std::vector<std::int32_t> row =
        read(backend, layer.device, batch.block_table + s * batch.table_stride, used, ctx);
    for (std::int64_t b = 0; b < used; ++b) {
      check::that(row[b] >= 0 && row[b] < params.num_blocks,
                  "block_table[" + std::to_string(s) + "][" + std::to_string(b) + "]",
                  "a block from 0 to " + std::to_string(params.num_blocks - 1), row[b]);
    }
  }
}

void check_slots(const CacheWriteParams& params, const Context& ctx) {
  const std::int64_t num_slots = params.num_blocks * params.block_size;
  const std::vector<std::int64_t> slots =
      read(pick_backend(params.device, "", "kv_cache.key"), params.device, params.slot_mapping,
           params.num_slots, ctx);
  for (std::int64_t i = 0; i < params.num_slots; ++i) {
    check::that(slots[i] < num_slots, entry("slot_mapping", i),
                "a slot below " + std::to_string(num_slots) + ", or negative to skip", slots[i]);
  }
}

}  // namespace quire::api
