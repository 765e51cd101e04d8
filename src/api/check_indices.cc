// Context::check_indices: the data of index tensors and of scales, looked at before anything runs.
#include <algorithm>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/lower.h"
#include "plan/cascade_tensors.h"

namespace quire::api {
namespace {

std::string entry(const char* name, std::int64_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

// Reads tensors of one device to the host.
class Reader {
 public:
  Reader(const Backend& backend, Device device, const Context& ctx)
      : backend_(backend), device_(device), ctx_(ctx) {}

  template <class T>
  std::vector<T> read(const T* from, std::int64_t count) const {
    std::vector<T> values(static_cast<std::size_t>(std::max<std::int64_t>(count, 0)));
    if (!values.empty()) {
      backend_.read(device_, values.data(), from, values.size() * sizeof(T), ctx_);
    }
    return values;
  }

  // A scale in memory must be what a host value must be.
  void check_scale(const char* name, const Scale& scale) const {
    if (scale.data != nullptr) check::scale_value(name, read(scale.data, 1)[0]);
  }

 private:
  const Backend& backend_;
  Device device_;
  const Context& ctx_;
};

// A batch whose per-sequence tensors (all but the block table and the bias) lie on the host, so
// that sequence_at() can be asked what each sequence sees.
class HostBatch {
 public:
  HostBatch(const Reader& reader, const BatchParams& batch) : params(batch) {
    const std::int64_t num_seqs = batch.num_seqs;
    copy(reader, &params.query_start_loc, num_seqs + 1);
    copy(reader, &params.seq_lens, num_seqs);
    copy(reader, &params.kv_start_loc, num_seqs + 1);
    copy(reader, &params.ranges, num_seqs * batch.num_ranges * 2);
    copy(reader, &params.visible_prefix_lens, num_seqs);
    copy(reader, &params.kv_offset, num_seqs);
    copy(reader, &params.kv_stride, num_seqs);
    copy(reader, &params.q_offset, num_seqs);
    if (batch.causal != nullptr) causal_ = reader.read(batch.causal, num_seqs);
    if (batch.causal != nullptr) params.causal = causal_.data();
  }
  HostBatch(const HostBatch&) = delete;
  HostBatch& operator=(const HostBatch&) = delete;

  BatchParams params;

 private:
  void copy(const Reader& reader, const std::int32_t** data, std::int64_t count) {
    if (*data == nullptr) return;
    copies_.push_back(reader.read(*data, count));
    *data = copies_.back().data();
  }

  std::vector<std::vector<std::int32_t>> copies_;
  std::vector<std::uint8_t> causal_;
};

void check_ascending(const char* name, const std::int32_t* start, std::int32_t num_seqs) {
  for (std::int32_t s = 0; s < num_seqs; ++s) {
    check::that(
        start[s + 1] >= start[s], entry(name, s + 1),
        [&] { return "at least the entry before it, " + std::to_string(start[s]); }, start[s + 1]);
  }
}

// Which logical blocks hold a key that some row of the sequence sees.
std::vector<bool> needed_blocks(const LayerParams& layer, const Sequence& seq) {
  const std::int64_t block_size = layer.block_size;
  const std::int64_t num_blocks = (seq.mask.kv_len + block_size - 1) / block_size;
  // How many more rows see block b than see the one before it.
  std::vector<std::int64_t> change(static_cast<std::size_t>(num_blocks) + 1);
  for (std::int64_t row = 0; row < seq.query_len; ++row) {
    const semantics::Spans visible =
        semantics::row_spans(seq.mask, seq.position(seq.first_row + row));
    for (const semantics::Span span : {visible.prefix, visible.main}) {
      const semantics::Span keys = semantics::clip(span, 0, seq.mask.kv_len);
      if (keys.empty()) continue;
      ++change[keys.begin / block_size];
      --change[(keys.end - 1) / block_size + 1];
    }
  }
  std::vector<bool> needed(static_cast<std::size_t>(num_blocks));
  std::int64_t rows = 0;
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    rows += change[b];
    needed[b] = rows > 0;
  }
  return needed;
}

void check_block_table(const Reader& reader, const AttentionParams& params) {
  const LayerParams& layer = params.layer;
  const BatchParams& batch = params.batch;
  const HostBatch host(reader, batch);
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    const std::vector<bool> needed =
        needed_blocks(layer, sequence_at(layer, host.params, params.num_kv_tokens, s));
    const auto num_blocks = static_cast<std::int64_t>(needed.size());
    const std::vector<std::int32_t> row =
        reader.read(batch.block_table + s * batch.table_stride, num_blocks);
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      check::that(!needed[b] || (row[b] >= 0 && row[b] < params.num_blocks),
                  entry(entry("block_table", s).c_str(), b),
                  "a block from 0 to " + std::to_string(params.num_blocks - 1), row[b]);
    }
  }
}

void check_key_rows(const Reader& reader, const AttentionParams& params) {
  const BatchParams& batch = params.batch;
  if (batch.kv_start_loc == nullptr) return;
  const std::int32_t last = reader.read(batch.kv_start_loc + batch.num_seqs, 1)[0];
  check::that(last <= params.num_kv_tokens, entry("kv_start_loc", batch.num_seqs),
              "at most the rows of key, " + std::to_string(params.num_kv_tokens), last);
}

// Every token has a slot of its own: two in one slot would lose one of them.
void check_duplicates(const std::vector<std::int64_t>& slots) {
  std::vector<std::int64_t> order;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= 0) order.push_back(static_cast<std::int64_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return slots[a] < slots[b]; });
  // The first token whose slot an earlier one has, and that one.
  std::int64_t second = -1;
  std::int64_t first = -1;
  for (std::size_t n = 1; n < order.size(); ++n) {
    if (slots[order[n]] != slots[order[n - 1]]) continue;
    if (second >= 0 && order[n] > second) continue;
    second = order[n];
    first = order[n - 1];
  }
  check::that(second < 0, entry("slot_mapping", second), "a slot that no other token has", [&] {
    return std::to_string(slots[second]) + ", the same as " + entry("slot_mapping", first);
  });
}

// Positions are at least 0 and below 2^31, those of all keys and rows; strides at least 1.
void check_positions(const LayerParams& layer, const BatchParams& host) {
  const auto value = [](const std::int32_t* values, std::int32_t s, std::int64_t absent) {
    return values != nullptr ? std::int64_t{values[s]} : absent;
  };
  constexpr std::int64_t kEnd = std::int64_t{1} << 31;
  for (std::int32_t s = 0; host.has_positions() && s < host.num_seqs; ++s) {
    const std::int64_t kv_offset = value(host.kv_offset, s, 0);
    const std::int64_t kv_stride = value(host.kv_stride, s, 1);
    const std::int64_t q_offset = value(host.q_offset, s, 0);
    // Keys of attention without a cache are counted by kv_start_loc.
    const std::int64_t seq_len = layer.paged ? host.seq_lens[s] : 0;
    const std::int64_t last_key = std::max<std::int64_t>(seq_len - 1, 0);
    const std::int64_t last_row = std::max<std::int64_t>(
        std::int64_t{host.query_start_loc[s + 1]} - host.query_start_loc[s] - 1, 0);
    check::that(kv_stride >= 1, entry("kv_stride", s), "at least 1", kv_stride);
    check::that(kv_offset >= 0 && kv_offset + last_key * kv_stride < kEnd, entry("kv_offset", s),
                "at least 0, and the last key's position below 2^31", kv_offset);
    check::that(q_offset >= 0 && q_offset + last_row < kEnd, entry("q_offset", s),
                "at least 0, and the last row's position below 2^31", q_offset);
  }
}

}  // namespace

void check_batch_indices(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                         const Context& ctx) {
  const Reader reader(backend, layer.device, ctx);
  const HostBatch host(reader, batch);
  const std::int32_t* start = host.params.query_start_loc;
  check::that(start[0] == 0, "query_start_loc[0]", "0", start[0]);
  check_ascending("query_start_loc", start, batch.num_seqs);
  // Rows past num_actual_tokens are padding and may be named.
  check_positions(layer, host.params);
  if (const std::int32_t* kv_start = host.params.kv_start_loc; kv_start != nullptr) {
    check::that(kv_start[0] >= 0, "kv_start_loc[0]", "at least 0", kv_start[0]);
    check_ascending("kv_start_loc", kv_start, batch.num_seqs);
  }
  if (!layer.paged) return;
  const std::int64_t reachable = batch.table_width * layer.block_size;
  for (std::int32_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t seq_len = host.params.seq_lens[s];
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

// Cascade tensors that a caller filled.
void check_cascade_data(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                        const AttentionMetadata& metadata, const Context& ctx) {
  const Reader reader(backend, layer.device, ctx);
  const HostBatch host(reader, batch);
  const auto compare = [&](const char* name, const ConstTensorView& view, std::int32_t at) {
    if (!view) return;
    const std::vector<std::int32_t> values =
        reader.read(check::data<const std::int32_t>(view), view.shape[0]);
    for (std::int64_t i = 0; i < view.shape[0]; ++i) {
      const std::int32_t wanted = planning::cascade_entry(host.params, at + i);
      // vLLM does not cut off at 0 where a sequence, padding say, is shorter than the prefix.
      const bool shorter = at == planning::kSuffixKvLens && wanted == 0;
      check::that(
          values[i] == wanted || (shorter && values[i] < 0), entry(name, i),
          [&] { return std::to_string(wanted); }, values[i]);
    }
  };
  compare("cu_prefix_query_lens", metadata.cu_prefix_query_lens, 0);
  compare("prefix_kv_lens", metadata.prefix_kv_lens, planning::kPrefixKvLens);
  compare("suffix_kv_lens", metadata.suffix_kv_lens, planning::kSuffixKvLens);
}

void check_call_data(const Backend& backend, const AttentionParams& params, const Context& ctx) {
  const Reader reader(backend, params.layer.device, ctx);
  reader.check_scale("q_scale", params.q_scale);
  reader.check_scale("kv_cache.k_scale", params.k.scale);
  reader.check_scale("kv_cache.v_scale", params.v.scale);
  reader.check_scale("output_scale", params.output_scale);
  if (params.layer.paged) {
    check_block_table(reader, params);
  } else {
    check_key_rows(reader, params);
  }
}

void check_write_data(const Backend& backend, const CacheWriteParams& params, const Context& ctx) {
  const Reader reader(backend, params.device, ctx);
  reader.check_scale("kv_cache.k_scale", params.k.scale);
  reader.check_scale("kv_cache.v_scale", params.v.scale);
  const std::int64_t num_slots = params.num_blocks * params.block_size;
  const std::vector<std::int64_t> slots = reader.read(params.slot_mapping, params.num_slots);
  for (std::int64_t i = 0; i < params.num_slots; ++i) {
    check::that(slots[i] < num_slots, entry("slot_mapping", i),
                "a slot below " + std::to_string(num_slots) + ", or negative to skip", slots[i]);
  }
  check_duplicates(slots);
}

}  // namespace quire::api
