// The tensors of large cases: contexts of 100,000 keys and batches of 2,000 sequences in some tens
// of megabytes. Sequences share the blocks of a pool, in any order and as often as they like: what
// attention does with a block does not depend on who else reads it. What no row of a sequence sees
// lies in blocks of poison between the others, as if they were another tenant's.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "conformance/case_parts.h"
#include "conformance/noise.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

struct Range {
  std::int64_t begin, end;  // end is not in it
};

// Deviation of noise of that dtype that stands for numbers of about `deviation`.
double code_deviation(DType dtype, double deviation) {
  switch (dtype) {
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2: return 16 * deviation;  // scales are about 0.05
    case DType::kInt8: return 24 * deviation;
    default: return deviation;
  }
}

// Keys of sequence s that a row of it may see, in order: every key outside is dead. May hold a key
// more than needed, never one less.
std::vector<Range> live_keys(const CaseSpec& spec, const SequenceSpec& s) {
  const Mask& mask = spec.config.mask;
  if (!spec.poison) return {{0, s.seq_len}};
  if (s.query_len == 0 || s.seq_len == 0) return {};
  const std::int64_t offset = spec.kv_offsets ? s.kv_offset : 0;
  const std::int64_t stride = spec.kv_strides ? s.kv_stride : 1;
  const std::int64_t first = spec.q_offsets ? s.q_offset : s.seq_len - s.query_len;
  const std::int64_t last = first + s.query_len - 1;
  // All in positions, which become indices at the end.
  const bool causal = spec.config.type == AttentionType::kDecoder && mask.causal &&
                      (!spec.causal_flags || s.causal);
  constexpr std::int64_t kFar = std::int64_t{1} << 50U;
  Range window{-kFar, causal ? last + 1 : kFar};
  switch (mask.window) {
    case WindowKind::kNone: break;
    case WindowKind::kLeft: window.begin = first - mask.window_size + 1; break;
    case WindowKind::kBoth:
      window = {first - mask.window_size + 1, std::min(window.end, last + mask.window_size)};
      break;
    case WindowKind::kChunked: {
      const std::int64_t chunk = first >= 0 ? first / mask.window_size : -kFar / mask.window_size;
      window.begin = (chunk - mask.chunk_lookback) * mask.window_size;
      break;
    }
  }
  std::vector<Range> ranges{window};
  if (spec.visible_prefixes) ranges.push_back({-kFar, s.visible_prefix});
  for (const auto& [start, end] : s.ranges) {
    const bool seen = start < end && end >= first && start <= last;
    if (spec.ranges && seen) ranges.push_back({start, std::int64_t{end} + 1});
  }
  for (Range& range : ranges) {
    const auto index_from = [&](std::int64_t position) {
      return position <= offset ? 0 : (position - offset + stride - 1) / stride;
    };
    range = {index_from(range.begin), index_from(range.end)};
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> merged;
  for (Range range : ranges) {
    range = {std::max<std::int64_t>(range.begin, 0), std::min(range.end, s.seq_len)};
    if (range.begin >= range.end) continue;
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

// Chooses the blocks of every sequence's table. Blocks are numbered in order of creation first, and
// shuffled over the cache in the end.
class PooledBlocks {
 public:
  PooledBlocks(const CaseSpec& spec, Rng* rng)
      : spec_(spec), rng_(rng), block_size_(spec.config.block_size) {
    for (std::int64_t i = 0; i < spec.pool_blocks; ++i) add({0, block_size_});
    dead_ = std::max<std::int64_t>(spec.pool_blocks / 8, 1);
    for (std::int64_t i = 0; i < dead_; ++i) add({0, 0});
    private_left_ = spec.pool_blocks;
    for (std::int64_t i = 0; i < blocks_of(spec.shared_prefix_len); ++i) {
      shared_.push_back(any_full());
    }
  }

  // The table of a sequence; `writes` is set if this step's tokens got slots of their own.
  std::vector<std::int32_t> table_of(std::int64_t s, bool* writes) {
    const SequenceSpec& sequence = spec_.sequences[s];
    const std::int64_t context_len = sequence.seq_len - sequence.query_len;
    const std::int64_t blocks = blocks_of(sequence.seq_len);
    const bool shares = s != spec_.loner && sequence.seq_len >= spec_.shared_prefix_len;
    const auto common = shares ? static_cast<std::int64_t>(shared_.size()) : 0;
    const std::int64_t first_private = context_len / block_size_;
    *writes = spec_.write && sequence.query_len > 0 && context_len >= 0 &&
              first_private >= common && blocks - first_private <= private_left_;
    if (*writes) private_left_ -= blocks - first_private;
    const std::vector<Range> live = live_keys(spec_, sequence);
    std::size_t range = 0;
    std::vector<std::int32_t> table(blocks);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t begin = b * block_size_;
      while (range < live.size() && live[range].end <= begin) ++range;
      Range needed{0, 0};  // slots of the block
      for (std::size_t r = range; r < live.size() && live[r].begin < begin + block_size_; ++r) {
        if (needed.end == 0) needed.begin = std::max<std::int64_t>(live[r].begin - begin, 0);
        needed.end = std::min(live[r].end - begin, block_size_);
      }
      if (*writes && b >= first_private) {
        needed.end = std::clamp<std::int64_t>(context_len - begin, 0, needed.end);
        table[b] = add({std::min(needed.begin, needed.end), needed.end});
      } else if (b < common) {
        // Another sequence may need what this one does not.
        table[b] = shared_[b];
      } else {
        table[b] = block_with(needed);
      }
    }
    return table;
  }

  // Padding that names a block may name any.
  std::int32_t dead() {
    if (rng_->chance(0.1)) return kWild;
    return static_cast<std::int32_t>(spec_.pool_blocks + rng_->uniform(0, dead_ - 1));
  }

  const std::vector<Range>& filled() const { return filled_; }
  static constexpr std::int32_t kWild = -1;

 private:
  std::int64_t blocks_of(std::int64_t tokens) const {
    return (tokens + block_size_ - 1) / block_size_;
  }

  std::int32_t add(Range filled) {
    filled_.push_back(filled);
    return static_cast<std::int32_t>(filled_.size()) - 1;
  }

  std::int32_t any_full() {
    return static_cast<std::int32_t>(rng_->uniform(0, spec_.pool_blocks - 1));
  }

  // A block that holds numbers in these slots and, if there is room for one, nowhere else.
  std::int32_t block_with(Range needed) {
    if (needed.end <= needed.begin) return dead();
    if (needed.begin == 0 && needed.end == block_size_) return any_full();
    const auto key = std::make_pair(needed.begin, needed.end);
    const auto known = partial_.find(key);
    if (known != partial_.end()) return known->second;
    if (static_cast<std::int64_t>(partial_.size()) > spec_.pool_blocks / 2) return any_full();
    return partial_[key] = add(needed);
  }

  const CaseSpec& spec_;
  Rng* rng_;
  std::int64_t block_size_;
  std::int64_t dead_;
  std::int64_t private_left_;
  std::vector<Range> filled_;  // slots of each block that hold numbers
  std::vector<std::int32_t> shared_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::int32_t> partial_;
};

// What rows of K or V (or their scales) are filled with.
class RowSource {
 public:
  RowSource(const CaseSpec& spec, const Tensor& cache, bool is_key, Rng* rng)
      : rng_(rng), dtype_(cache.dtype), bytes_(cache.shape[3] * size_of(cache.dtype)) {
    deviation_ = code_deviation(dtype_, is_key ? amplitude_of(spec).key : 1.0);
    if (dtype_ == DType::kInt8) deviation_ = code_deviation(dtype_, 1.0);
    poison_.resize(bytes_);
    fill_poison(dtype_, poison_.data(), cache.shape[3]);
    if (rng->chance(0.3) && dtype_ != DType::kFloat8E4M3 && dtype_ != DType::kInt8) {
      std::byte infinity[4];
      if (dtype_ == DType::kFloat8E5M2) {
        infinity[0] = std::byte{0x7C};
      } else {
        encode(dtype_, std::numeric_limits<double>::infinity(), infinity);
      }
      for (std::int64_t i = 0; i < bytes_; ++i) poison_[i] = infinity[i % size_of(dtype_)];
    }
  }

  void fill(std::byte* row) const { std::memcpy(row, noise(dtype_, deviation_, rng_), bytes_); }
  void poison(std::byte* row) const { std::memcpy(row, poison_.data(), bytes_); }

 private:
  Rng* rng_;
  DType dtype_;
  std::int64_t bytes_;
  double deviation_;
  std::vector<std::byte> poison_;
};

// A step of which 16 cover noise of that amplitude once rotated, and a zero point about the middle.
float int4_scale(double amplitude, const Tensor& cache, Rng* rng) {
  const std::int64_t size = 2 * cache.shape[3];
  const auto block = static_cast<double>(size & -size);
  const auto step = static_cast<float>(amplitude * std::sqrt(block) * (0.15 + 0.1 * rng->unit()));
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(step);
  return std::bit_cast<float>(bits / 16 * 16 + static_cast<std::uint32_t>(rng->uniform(6, 9)));
}

// Fills the slots of all blocks: numbers, or poison.
void fill_cache(const Case& c, const Tensor& cache, const Tensor& scales, bool is_key,
                const std::vector<Range>& filled, Rng* rng) {
  const RowSource source(c.spec, cache, is_key, rng);
  const double amplitude = is_key ? amplitude_of(c.spec).key : 1.0;
  for (std::int64_t block = 0; block < cache.shape[0]; ++block) {
    for (std::int64_t slot = 0; slot < cache.shape[1]; ++slot) {
      const bool full = filled[block].begin <= slot && slot < filled[block].end;
      for (std::int64_t head = 0; head < cache.shape[2]; ++head) {
        std::byte* row = cache.at({block, slot, head, 0});
        full ? source.fill(row) : source.poison(row);
        if (!scales) continue;
        const double scale = amplitude * (0.02 + 0.05 * rng->unit());
        float value = full ? static_cast<float>(scale) : std::numeric_limits<float>::quiet_NaN();
        if (full && cache.dtype == DType::kUInt8) value = int4_scale(amplitude, cache, rng);
        std::memcpy(scales.at({block, slot, head}), &value, sizeof value);
      }
    }
  }
}

// Rows [begin, end) of query, key or value.
void fill_rows(const Tensor& rows, double deviation, Range range, Rng* rng) {
  const std::int64_t bytes = rows.shape[2] * size_of(rows.dtype);
  deviation = code_deviation(rows.dtype, deviation);
  for (std::int64_t row = range.begin; row < range.end; ++row) {
    for (std::int64_t head = 0; head < rows.shape[1]; ++head) {
      std::memcpy(rows.at({row, head, 0}), noise(rows.dtype, deviation, rng), bytes);
    }
  }
}

void make_key_and_value(Case* c, std::int64_t rows, Range filled, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  const Layout layout{.order = {},
                      .padding = {0, spec.strided_query ? 1 : 0, spec.strided_query ? 8 : 0},
                      .offset = 0,
                      .slack = 0};
  const Sizes shape{rows, config.num_kv_heads, config.head_size};
  c->key = make_tensor(spec.model_dtype, shape, layout);
  const Sizes shape_v{rows, config.num_kv_heads, config.value_head_size()};
  c->value = make_tensor(spec.model_dtype, shape_v, layout);
  if (!spec.poison) filled = {0, rows};
  fill_rows(c->key, amplitude_of(spec).key, filled, rng);
  fill_rows(c->value, 1.0, filled, rng);
}

}  // namespace

void make_large_query(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  c->query = make_tensor(config.dtype, {spec.num_rows(), config.num_heads, config.head_size},
                         query_layout(spec, rng));
  const std::int64_t end = std::min(spec.num_actual_tokens(), spec.num_rows() - spec.padded_rows);
  const Range filled = spec.poison ? Range{spec.leading_rows, end} : Range{0, spec.num_rows()};
  fill_rows(c->query, amplitude_of(spec).query, filled, rng);
}

void make_pooled_cache(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t block_size = spec.config.block_size;
  PooledBlocks pool(spec, rng);
  std::vector<std::vector<std::int32_t>> tables;
  std::vector<bool> writes;
  std::int64_t width = std::max<std::int64_t>(spec.extra_table_width, 1);
  for (std::size_t s = 0; s < spec.sequences.size(); ++s) {
    bool writes_this = false;
    tables.push_back(pool.table_of(static_cast<std::int64_t>(s), &writes_this));
    writes.push_back(writes_this);
    width =
        std::max(width, static_cast<std::int64_t>(tables.back().size()) + spec.extra_table_width);
  }
  const auto num_blocks = static_cast<std::int64_t>(pool.filled().size()) + spec.extra_blocks;
  std::vector<std::int32_t> place(num_blocks);
  std::iota(place.begin(), place.end(), 0);
  rng->shuffle(&place);
  std::vector<Range> filled(num_blocks, {0, spec.poison ? 0 : block_size});
  for (std::size_t b = 0; spec.poison && b < pool.filled().size(); ++b)
    filled[place[b]] = pool.filled()[b];

  Layout layout;
  layout.padding = {0, rng->uniform(0, 3)};
  c->block_table = make_tensor(DType::kInt32, {c->num_seqs(), width}, layout);
  const auto set_entry = [&](std::int64_t s, std::int64_t i, std::int32_t block) {
    std::memcpy(c->block_table.at({s, i}), &block, sizeof block);
  };
  for (std::int64_t s = 0; s < c->num_seqs(); ++s) {
    const bool real = s < static_cast<std::int64_t>(tables.size());
    const std::int64_t used = real ? static_cast<std::int64_t>(tables[s].size()) : 0;
    for (std::int64_t i = 0; i < used; ++i) {
      const std::int32_t block = tables[s][i];
      set_entry(s, i, block == PooledBlocks::kWild ? wild_block(num_blocks, rng) : place[block]);
    }
    for (std::int64_t i = used; i < width; ++i) set_entry(s, i, table_padding(num_blocks, rng));
  }

  lay_out_cache(c, num_blocks);
  fill_cache(*c, c->key_cache, c->k_scale_cache, true, filled, rng);
  fill_cache(*c, c->value_cache, c->v_scale_cache, false, filled, rng);
  if (!spec.write) return;
  const std::int64_t rows = spec.num_rows();
  make_key_and_value(c, rows, {spec.leading_rows, rows - spec.padded_rows}, rng);
  c->slot_mapping = make_tensor(DType::kInt64, {rows});
  for (std::int64_t row = 0; row < rows; ++row) c->slot_mapping.set_int64(row, -1);
  std::int64_t row = spec.leading_rows;
  for (std::size_t s = 0; s < spec.sequences.size(); ++s) {
    const SequenceSpec& sequence = spec.sequences[s];
    for (std::int64_t i = 0; i < sequence.query_len; ++i, ++row) {
      if (!writes[s]) continue;
      const std::int64_t j = sequence.seq_len - sequence.query_len + i;
      const std::int64_t block = place[tables[s][j / block_size]];
      c->slot_mapping.set_int64(row, block * block_size + j % block_size);
    }
  }
}

void make_large_encoder_keys(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  std::vector<std::int32_t> starts{
      static_cast<std::int32_t>(spec.kv_start_loc ? 0 : spec.leading_rows)};
  for (std::int64_t s = 0; s < c->num_seqs(); ++s) {
    const bool real = s < static_cast<std::int64_t>(spec.sequences.size());
    starts.push_back(starts.back() +
                     static_cast<std::int32_t>(real ? spec.sequences[s].seq_len : 0));
  }
  make_key_and_value(c, starts.back() + spec.padded_rows, {starts.front(), starts.back()}, rng);
  if (spec.kv_start_loc) c->kv_start_loc = make_int32(starts);
}

}  // namespace quire::conformance
