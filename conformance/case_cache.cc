// The cache of a case: blocks, layout, contents before and after this step's write.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "conformance/case_parts.h"
#include "conformance/expected.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

std::int64_t blocks_of(const CaseSpec& spec, std::int64_t tokens) {
  return (tokens + spec.config.block_size - 1) / spec.config.block_size;
}

bool shares_prefix(const CaseSpec& spec, std::int64_t s) {
  return s != spec.loner && spec.sequences[s].seq_len >= spec.shared_prefix_len;
}

std::int64_t count_blocks(const CaseSpec& spec) {
  std::int64_t count = blocks_of(spec, spec.shared_prefix_len) + spec.extra_blocks;
  for (const SequenceSpec& s : spec.sequences) count += blocks_of(spec, s.seq_len);
  return std::max<std::int64_t>(count, 1);
}

// Bytes from one slot's row to the next: the elements, and room for a float32 scale behind them.
std::int64_t row_elements(std::int64_t elements, DType storage, bool inline_scale) {
  if (!inline_scale) return elements;
  const std::int64_t bytes = elements * size_of(storage);
  return ((bytes + 3) / 4 * 4 + 4) / size_of(storage);
}

Tensor inline_scale_view(const Tensor& cache, std::int64_t elements) {
  const std::int64_t size = size_of(cache.dtype);
  const std::int64_t behind = (elements * size + 3) / 4 * 4;
  Sizes strides;
  for (int d = 0; d < 3; ++d) strides.push_back(cache.strides[d] * size / 4);
  return view_of(cache.buffer, DType::kFloat32, {cache.shape[0], cache.shape[1], cache.shape[2]},
                 strides, cache.offset + behind);
}

struct CacheShape {
  std::int64_t num_blocks, block_size, num_kv_heads;
  std::int64_t head_size, head_size_v;  // as stored
  std::int64_t row_k, row_v;            // elements of a row in memory
};

// Two tensors, K's rows at the start of `row` elements and V's behind them if packed.
void lay_out_packed(Case* c, const CacheShape& n, bool heads_outside) {
  const CaseSpec& spec = c->spec;
  const std::int64_t row = n.row_k + n.row_v;
  // Inline scales need blocks at multiples of 4 bytes.
  const std::int64_t unit = spec.inline_scales ? 4 : 1;
  Layout layout;
  layout.offset = spec.storage_offset * unit;
  layout.padding = {0, spec.page_padding > 0 ? 1 : 0, 0, 0};
  const Sizes shape = heads_outside ? Sizes{n.num_blocks, n.num_kv_heads, n.block_size, row}
                                    : Sizes{n.num_blocks, n.block_size, n.num_kv_heads, row};
  const Tensor whole = make_tensor(spec.cache_storage(), shape, layout);
  const std::int64_t slot_stride = whole.strides[heads_outside ? 2 : 1];
  const std::int64_t head_stride = whole.strides[heads_outside ? 1 : 2];
  const Sizes strides{whole.strides[0], slot_stride, head_stride, 1};
  c->key_cache =
      view_of(whole.buffer, whole.dtype, {n.num_blocks, n.block_size, n.num_kv_heads, n.head_size},
              strides, whole.offset);
  c->value_cache = view_of(whole.buffer, whole.dtype,
                           {n.num_blocks, n.block_size, n.num_kv_heads, n.head_size_v}, strides,
                           whole.offset + n.row_k * size_of(whole.dtype));
  // from_packed() knows rows of K and V and nothing between them.
  if (heads_outside && !spec.inline_scales) c->combined = whole;
}

Tensor lay_out_one(const CaseSpec& spec, const CacheShape& n, std::int64_t size, std::int64_t row) {
  const std::int64_t unit = spec.inline_scales ? 4 : 1;
  Layout layout;
  layout.offset = spec.storage_offset * unit;
  layout.padding = {0, spec.page_padding > 0 ? 1 : 0, 0, row - size};
  if (spec.layout == CacheLayout::kHnd) layout.order = {0, 2, 1, 3};
  // make_tensor() counts the scale behind the last row as padding: keep it.
  layout.slack = row - size;
  return make_tensor(spec.cache_storage(), {n.num_blocks, n.block_size, n.num_kv_heads, size},
                     layout);
}

// vLLM's [num_blocks, 2, block_size, num_kv_heads, head_size].
void lay_out_combined(Case* c, const CacheShape& n) {
  const CaseSpec& spec = c->spec;
  const std::int64_t unit = spec.inline_scales ? 4 : 1;
  Layout layout{.order = {},
                .padding = {0, 0, 0, 0, n.row_k - n.head_size},
                .offset = spec.storage_offset * unit,
                .slack = n.row_k - n.head_size};
  layout.padding[1] = spec.page_padding > 0 ? 1 : 0;
  if (spec.layout == CacheLayout::kHnd) layout.order = {0, 1, 3, 2, 4};
  const Tensor whole = make_tensor(
      spec.cache_storage(), {n.num_blocks, 2, n.block_size, n.num_kv_heads, n.head_size}, layout);
  const Sizes shape{n.num_blocks, n.block_size, n.num_kv_heads, n.head_size};
  const Sizes strides{whole.strides[0], whole.strides[2], whole.strides[3], whole.strides[4]};
  c->combined = whole;
  c->key_cache = view_of(whole.buffer, whole.dtype, shape, strides, whole.offset);
  c->value_cache = view_of(whole.buffer, whole.dtype, shape, strides,
                           whole.offset + whole.strides[1] * size_of(whole.dtype));
}

// Whatever no token occupies: NaN in floats and scales, sometimes infinity.
void fill_garbage(const Case& c, Rng* rng) {
  for (const Tensor* tensor : {&c.key_cache, &c.value_cache, &c.k_scale_cache, &c.v_scale_cache}) {
    if (!*tensor) continue;
    const bool infinite =
        rng->chance(0.3) && tensor->dtype != DType::kFloat8E4M3 && tensor->dtype != DType::kInt8;
    std::byte element[8];
    fill_poison(tensor->dtype, element, 1);
    if (tensor->dtype == DType::kFloat8E5M2)
      element[0] = infinite ? std::byte{0x7C} : element[0];
    else if (infinite)
      encode(tensor->dtype, std::numeric_limits<double>::infinity(), element);
    std::byte* bytes = tensor->buffer->bytes.data();
    const std::int64_t size = size_of(tensor->dtype);
    tensor->for_each_element(
        [&](std::int64_t offset) { std::memcpy(bytes + offset, element, size); });
  }
}

// A head vector of K or V in the model's dtype.
void draw_row(const CaseSpec& spec, bool is_key, std::int64_t size, Rng* rng,
              std::vector<std::byte>* row) {
  const Amplitude amplitude = amplitude_of(spec);
  const std::int64_t element = size_of(spec.model_dtype);
  row->resize(size * element);
  const double extreme = amplitude.key * rng->pick({1.0, 1.0, 0.5, 0.0, -1.0});
  for (std::int64_t d = 0; d < size; ++d) {
    double x = (is_key ? amplitude.key : amplitude.value) * rng->normal();
    if (is_key && spec.data == Data::kExtreme) x = d == 0 ? extreme : 0.0;
    encode(spec.model_dtype, x, row->data() + d * element);
  }
}

struct Token {
  std::int64_t block, slot;
  std::int64_t row = -1;  // of this step's key and value, or -1: from an earlier step
};

// Draws one head vector and puts it into the cache, and into this step's tensor if it is new.
void put_row(Case* c, const Token& token, std::int64_t head, bool is_key, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const Tensor& cache = is_key ? c->key_cache : c->value_cache;
  const Tensor& scales = is_key ? c->k_scale_cache : c->v_scale_cache;
  const Tensor& fresh = is_key ? c->key : c->value;
  const std::int64_t size = is_key ? spec.config.head_size : spec.config.value_head_size();
  std::vector<std::byte> row;
  draw_row(spec, is_key, size, rng, &row);
  if (token.row >= 0) std::memcpy(fresh.at({token.row, head, 0}), row.data(), row.size());
  float own_scale = 0;
  quantise_row(spec.config.kv_cache_dtype, spec.model_dtype, row.data(), size,
               is_key ? c->k_scale() : c->v_scale(), cache.dtype,
               cache.at({token.block, token.slot, head, 0}), &own_scale);
  if (scales) scales.set({token.block, token.slot, head}, own_scale);
}

void put_token(Case* c, const Token& token, Rng* rng) {
  for (std::int64_t head = 0; head < c->spec.config.num_kv_heads; ++head) {
    put_row(c, token, head, true, rng);
    put_row(c, token, head, false, rng);
  }
}

void remember_before(Case* c) {
  for (const Tensor* tensor :
       {&c->key_cache, &c->value_cache, &c->k_scale_cache, &c->v_scale_cache}) {
    if (!*tensor) continue;
    const bool known = std::any_of(c->before.begin(), c->before.end(), [&](const auto& entry) {
      return entry.first == tensor->buffer;
    });
    if (!known) c->before.emplace_back(tensor->buffer, *tensor->buffer);
  }
}

// This step's key and value, and slots: all skipped until a token takes one.
void make_step_tensors(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  const std::int64_t rows = spec.num_rows();
  Layout layout;
  if (spec.strided_query) layout.padding = {0, rng->uniform(0, 2), 8 * rng->uniform(0, 1)};
  c->key = make_tensor(spec.model_dtype, {rows, config.num_kv_heads, config.head_size}, layout);
  c->value =
      make_tensor(spec.model_dtype, {rows, config.num_kv_heads, config.value_head_size()}, layout);
  c->slot_mapping = make_tensor(DType::kInt64, {rows});
  const std::int64_t slots = c->key_cache.shape[0] * config.block_size;
  for (std::int64_t row = 0; row < rows; ++row) {
    constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    c->slot_mapping.set_int64(row, rng->pick<std::int64_t>({-1, -1, -1, kMin, slots, kMax}));
  }
}

// Calls visit(sequence, j) for each key that some row of this step sees. The others may hold
// anything.
template <class Visit>
void for_each_seen_key(const Case& c, Visit visit) {
  const CaseSpec& spec = c.spec;
  std::int64_t first_row = spec.leading_rows;
  for (std::int64_t s = 0; s < static_cast<std::int64_t>(spec.sequences.size()); ++s) {
    const SequenceSpec& sequence = spec.sequences[s];
    const std::int64_t rows =
        std::clamp<std::int64_t>(spec.num_actual_tokens() - first_row, 0, sequence.query_len);
    for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
      std::int64_t i = 0;
      while (i < rows && !is_visible(c, s, i, j)) ++i;
      if (i < rows) visit(s, j);
    }
    first_row += sequence.query_len;
  }
}

std::vector<bool> seen_slots(const Case& c) {
  const std::int64_t block_size = c.spec.config.block_size;
  std::vector<bool> seen(c.key_cache.shape[0] * block_size, false);
  for_each_seen_key(c, [&](std::int64_t s, std::int64_t j) {
    const auto block = static_cast<std::int64_t>(c.block_table.get({s, j / block_size}));
    if (block < 0 || block >= c.key_cache.shape[0]) return;
    seen[block * block_size + j % block_size] = true;
  });
  return seen;
}

// Fills the tokens of earlier steps, or those that this step writes (`fresh`): once each, however
// many sequences share them.
void put_tokens(Case* c, bool fresh, std::vector<bool>* filled, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t block_size = spec.config.block_size;
  std::int64_t first_row = spec.leading_rows;
  for (std::size_t s = 0; s < spec.sequences.size(); ++s) {
    const SequenceSpec& sequence = spec.sequences[s];
    const std::int64_t context_len = sequence.seq_len - sequence.query_len;
    for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
      const std::int64_t row = first_row + (j - context_len);
      const bool written = spec.write && j >= context_len && row < spec.num_actual_tokens();
      if (written != fresh) continue;
      const auto block = static_cast<std::int64_t>(
          c->block_table.get({static_cast<std::int64_t>(s), j / block_size}));
      if (block < 0 || block >= c->key_cache.shape[0]) continue;
      const std::int64_t slot = block * block_size + j % block_size;
      if ((*filled)[slot]) continue;
      (*filled)[slot] = true;
      if (fresh) c->slot_mapping.set_int64(row, slot);
      put_token(c, {block, j % block_size, fresh ? row : -1}, rng);
    }
    first_row += sequence.query_len;
  }
}

}  // namespace

std::int32_t wild_block(std::int64_t num_blocks, Rng* rng) {
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  const auto n = static_cast<std::int32_t>(num_blocks);
  return rng->pick({kMin, kMax, -1, n, n + 1, -n - 1, 1 << 30});
}

// Names no block, or a block of garbage: neither may be looked at.
std::int32_t table_padding(std::int64_t num_blocks, Rng* rng) {
  if (rng->chance(0.5)) return wild_block(num_blocks, rng);
  return static_cast<std::int32_t>(rng->uniform(0, num_blocks - 1));
}

void lay_out_cache(Case* c, std::int64_t num_blocks) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  const DType storage = spec.cache_storage();
  CacheShape n{num_blocks,
               config.block_size,
               config.num_kv_heads,
               stored_head_size(config.kv_cache_dtype, config.head_size),
               stored_head_size(config.kv_cache_dtype, config.value_head_size()),
               0,
               0};
  n.row_k = row_elements(n.head_size, storage, spec.inline_scales);
  n.row_v = row_elements(n.head_size_v, storage, spec.inline_scales);
  const bool combinable = n.head_size == n.head_size_v;
  if (spec.layout == CacheLayout::kPacked || spec.layout == CacheLayout::kPackedNhd) {
    lay_out_packed(c, n, spec.layout == CacheLayout::kPacked);
  } else if (spec.layout == CacheLayout::kSeparate || !combinable) {
    c->key_cache = lay_out_one(spec, n, n.head_size, n.row_k);
    c->value_cache = lay_out_one(spec, n, n.head_size_v, n.row_v);
  } else {
    lay_out_combined(c, n);
  }
  if (!is_per_token_head(config.kv_cache_dtype)) return;
  if (spec.inline_scales) {
    c->k_scale_cache = inline_scale_view(c->key_cache, n.head_size);
    c->v_scale_cache = inline_scale_view(c->value_cache, n.head_size_v);
  } else {
    const Sizes shape{n.num_blocks, n.block_size, n.num_kv_heads};
    c->k_scale_cache = make_tensor(DType::kFloat32, shape);
    Layout heads_outside;
    heads_outside.order = {0, 2, 1};
    c->v_scale_cache = make_tensor(DType::kFloat32, shape, heads_outside);
  }
}

void make_block_table(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t num_blocks = count_blocks(spec);
  std::vector<std::int32_t> free(num_blocks);
  std::iota(free.begin(), free.end(), 0);
  rng->shuffle(&free);
  const auto take = [&] {
    const std::int32_t block = free.back();
    free.pop_back();
    return block;
  };
  std::vector<std::int32_t> shared(blocks_of(spec, spec.shared_prefix_len));
  std::generate(shared.begin(), shared.end(), take);

  std::int64_t width = spec.extra_table_width;
  for (const SequenceSpec& s : spec.sequences) {
    width = std::max(width, blocks_of(spec, s.seq_len) + spec.extra_table_width);
  }
  Layout layout;
  layout.padding = {0, rng->uniform(0, 3)};
  c->block_table = make_tensor(DType::kInt32, {c->num_seqs(), width}, layout);
  for (std::int64_t s = 0; s < c->num_seqs(); ++s) {
    const bool real = s < static_cast<std::int64_t>(spec.sequences.size());
    const std::int64_t used = real ? blocks_of(spec, spec.sequences[s].seq_len) : 0;
    const std::int64_t common =
        real && shares_prefix(spec, s) ? static_cast<std::int64_t>(shared.size()) : 0;
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int32_t block =
          i < common ? shared[i] : (i < used ? take() : table_padding(num_blocks, rng));
      c->block_table.set({s, i}, block);
    }
  }
  for (std::int64_t i = 0; i < spec.wild_blocks && !spec.sequences.empty(); ++i) {
    const std::int64_t s = rng->uniform(0, static_cast<std::int64_t>(spec.sequences.size()) - 1);
    const std::int64_t used = blocks_of(spec, spec.sequences[s].seq_len);
    if (used > 0) {
      c->block_table.set({s, rng->uniform(0, used - 1)}, wild_block(num_blocks, rng));
    }
  }
}

void make_cache(Case* c, Rng* rng) {
  lay_out_cache(c, count_blocks(c->spec));
  fill_garbage(*c, rng);
  if (c->spec.write) make_step_tensors(c, rng);
  // What no row sees stays garbage: freed blocks that other sequences use may look like that.
  std::vector<bool> filled = seen_slots(*c);
  filled.flip();
  // Earlier steps' tokens first: a shared block may be old for one sequence and new for another.
  put_tokens(c, false, &filled, rng);
  remember_before(c);
  if (c->spec.write) put_tokens(c, true, &filled, rng);
}

void make_encoder_keys(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  std::vector<std::int32_t> starts{
      static_cast<std::int32_t>(spec.kv_start_loc ? 0 : spec.leading_rows)};
  for (std::int64_t s = 0; s < c->num_seqs(); ++s) {
    const bool real = s < static_cast<std::int64_t>(spec.sequences.size());
    starts.push_back(starts.back() +
                     static_cast<std::int32_t>(real ? spec.sequences[s].seq_len : 0));
  }
  const std::int64_t rows = starts.back() + spec.padded_rows;
  Layout layout;
  layout.padding = {0, spec.strided_query ? 1 : 0, 0};
  c->key = make_tensor(spec.model_dtype, {rows, config.num_kv_heads, config.head_size}, layout);
  c->value =
      make_tensor(spec.model_dtype, {rows, config.num_kv_heads, config.value_head_size()}, layout);
  if (spec.kv_start_loc) c->kv_start_loc = make_int32(starts);
  std::vector<std::byte> row;
  for_each_seen_key(*c, [&](std::int64_t s, std::int64_t j) {
    const std::int64_t r = starts[s] + j;
    for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
      draw_row(spec, true, config.head_size, rng, &row);
      std::memcpy(c->key.at({r, head, 0}), row.data(), row.size());
      draw_row(spec, false, config.value_head_size(), rng, &row);
      std::memcpy(c->value.at({r, head, 0}), row.data(), row.size());
    }
  });
}

}  // namespace quire::conformance
