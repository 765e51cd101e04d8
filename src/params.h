// Every struct that crosses from the api into a backend. Plain data: pointers, sizes, strides in
// elements. The api has checked them; backends only trust what lives in index tensors after
// clamping it (sequence_at below).
#pragma once

#include <cstdint>

#include "quire/kv_cache.h"
#include "quire/mask.h"
#include "quire/types.h"
#include "semantics/kv_address.h"
#include "semantics/mask.h"

namespace quire {

// What belongs to the layer.
struct LayerParams {
  std::int32_t num_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t group = 0;  // num_heads / num_kv_heads
  std::int32_t head_size = 0;
  std::int32_t head_size_v = 0;
  std::int32_t block_size = 0;
  Device device;
  DType dtype = DType::kNone;     // of the query
  DType kv_dtype = DType::kNone;  // of K and V as they are stored
  bool token_scales = false;      // with a scale for each token and head
  bool paged = true;              // K and V live in a paged cache; else in key/value tensors
  bool cross = false;             // cross attention: sequence and query lengths are unrelated
  bool batch_invariant = false;
  bool auto_cascade = false;
  Mask mask;
  float softmax_scale = 0.0F;
  float soft_cap = 0.0F;
  const float* alibi_slopes = nullptr;  // [num_heads]
  bool alibi_sqrt = false;
  const float* sinks = nullptr;  // [num_heads]
};

// What belongs to the batch.
struct BatchParams {
  std::int32_t num_seqs = 0;
  std::int64_t num_tokens = 0;                    // num_actual_tokens
  const std::int32_t* query_start_loc = nullptr;  // [num_seqs + 1]
  const std::int32_t* seq_lens = nullptr;         // [num_seqs]
  const std::int32_t* block_table = nullptr;      // [num_seqs, table_width]
  std::int64_t table_stride = 0;
  std::int64_t table_width = 0;
  const std::int32_t* kv_start_loc = nullptr;  // [num_seqs + 1], attention without a cache
  const std::uint8_t* causal = nullptr;        // [num_seqs]
  const std::int32_t* ranges = nullptr;        // [num_seqs, num_ranges, 2]
  std::int32_t num_ranges = 0;
  const std::int32_t* visible_prefix_lens = nullptr;  // [num_seqs]
  const std::int32_t* kv_offset = nullptr;            // [num_seqs] positions of keys and queries,
  const std::int32_t* kv_stride = nullptr;            // where they are not 0, 1 and context_len
  const std::int32_t* q_offset = nullptr;
  const float* qq_bias = nullptr;  // [(num_seqs,) qq_size, qq_size]
  std::int64_t qq_size = 0;
  std::int64_t qq_seq_stride = 0;  // 0: one for all sequences
  std::int64_t qq_row_stride = 0;
  std::int64_t common_prefix_len = 0;
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;

  // Positions are not simply the indices of keys.
  QUIRE_HOST_DEVICE bool has_positions() const {
    return kv_offset != nullptr || kv_stride != nullptr || q_offset != nullptr;
  }
};

// One side of the KV store. Paged: strides.block etc. of [num_blocks, block_size, heads, size].
// Direct: strides.slot is the token stride and there is one block.
struct KvParams {
  void* data = nullptr;
  DType dtype = DType::kNone;  // semantics::kInt4: two elements in each of the row's bytes
  semantics::CacheStrides strides;
  float* token_scales = nullptr;  // [num_blocks, block_size, heads] or null
  semantics::CacheStrides token_scale_strides;
  Scale scale;
};

// One attention call, whole.
struct AttentionParams {
  LayerParams layer;  // with the call's own score, where it has one
  BatchParams batch;
  const void* query = nullptr;  // [num_tokens, num_heads, head_size]
  std::int64_t query_token_stride = 0;
  std::int64_t query_head_stride = 0;
  Scale q_scale;
  KvParams k;
  KvParams v;
  std::int64_t num_blocks = 0;     // paged
  std::int64_t num_kv_tokens = 0;  // direct: rows of key and value
  void* output = nullptr;          // [num_tokens, num_heads, head_size_v]
  DType output_dtype = DType::kNone;
  // It comes right behind a cache write, and all else that it reads was there before that began.
  // (Between others, where there is a gap: with a word more some kernels spill.)
  bool follows_write = false;
  std::int64_t output_token_stride = 0;
  std::int64_t output_head_stride = 0;
  bool has_output_scale = false;
  Scale output_scale;
  float* block_scales = nullptr;  // [num_tokens, groups] or null
  std::int64_t block_scales_token_stride = 0;
  std::int64_t block_scales_group_stride = 0;
  float* lse = nullptr;  // [num_heads, num_tokens] or null
  std::int64_t lse_head_stride = 0;
  std::int64_t lse_token_stride = 0;
};

struct CacheWriteParams {
  Device device;
  const void* key = nullptr;  // [num_slots, num_kv_heads, head_size]
  const void* value = nullptr;
  DType dtype = DType::kNone;
  std::int64_t key_token_stride = 0;
  std::int64_t key_head_stride = 0;
  std::int64_t value_token_stride = 0;
  std::int64_t value_head_stride = 0;
  const std::int64_t* slot_mapping = nullptr;  // [num_slots]
  std::int64_t num_slots = 0;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_size = 0;
  std::int32_t head_size_v = 0;
  KvParams k;
  KvParams v;
};

struct MergePart {
  const void* output = nullptr;  // [num_tokens, num_heads, head_size_v]
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  const float* lse = nullptr;  // [num_heads, num_tokens]
  std::int64_t lse_head_stride = 0;
  std::int64_t lse_token_stride = 0;

  QUIRE_HOST_DEVICE const void* row(DType dtype, std::int64_t token, std::int64_t head) const {
    return static_cast<const char*>(output) +
           (token * token_stride + head * head_stride) * size_of(dtype);
  }
  QUIRE_HOST_DEVICE const float* lse_at(std::int64_t token, std::int64_t head) const {
    return lse + head * lse_head_stride + token * lse_token_stride;
  }
};

struct MergeParams {
  MergePart a;
  MergePart b;
  MergePart result;  // its output and lse are written; lse may be null
  Device device;
  DType dtype = DType::kNone;
  std::int64_t num_tokens = 0;
  std::int32_t num_heads = 0;
  std::int32_t head_size_v = 0;
};

// Keys of a sequence; more are not looked at. The rest of 2^31 lets kernels round key indices up in
// 32 bits.
inline constexpr std::int64_t kMostKeys = 0x7FFFFC00;

// One sequence of the batch with everything resolved and clamped: whatever the index tensors hold,
// rows lie in [0, num_tokens), keys in what the block table (or key tensor) has, and every position
// of a row in 32 bits.
struct Sequence {
  std::int64_t first_row = 0;
  std::int64_t query_len = 0;
  std::int64_t context_len = 0;   // index of this step's first key, where keys are its own tokens
  std::int64_t first_pos = 0;     // position of the first row
  std::int64_t first_kv_row = 0;  // direct attention: row of key 0
  semantics::SequenceMask mask;

  QUIRE_HOST_DEVICE std::int64_t position(std::int64_t row) const {
    return first_pos + (row - first_row);
  }
};

QUIRE_HOST_DEVICE std::int64_t clamp_index(std::int64_t value, std::int64_t low,
                                           std::int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// Entries s and s + 1 of an offset tensor: not negative and in order.
QUIRE_HOST_DEVICE semantics::Span offsets_at(const std::int32_t* start_loc, std::int32_t s) {
  const std::int64_t begin = semantics::max_of(start_loc[s], 0);
  return {begin, semantics::max_of(start_loc[s + 1], begin)};
}

// What sequence `s` of the batch may see of its `kv_len` keys.
QUIRE_HOST_DEVICE semantics::SequenceMask sequence_mask(const LayerParams& layer,
                                                        const BatchParams& batch, std::int32_t s,
                                                        std::int64_t kv_len) {
  semantics::SequenceMask mask;
  mask.kv_len = kv_len;
  if (batch.kv_offset != nullptr) mask.kv_offset = batch.kv_offset[s];
  if (batch.kv_stride != nullptr) {
    mask.kv_stride = batch.kv_stride[s] > 1 ? batch.kv_stride[s] : 1;
  }
  mask.causal = layer.mask.causal && (batch.causal == nullptr || batch.causal[s] != 0);
  mask.clamp_ranges = layer.mask.clamp_ranges;
  mask.window = layer.mask.window;
  if (mask.window == WindowKind::kLeft && !mask.causal) mask.window = WindowKind::kBoth;
  mask.window_size = layer.mask.window_size;
  mask.chunk_lookback = layer.mask.chunk_lookback;
  mask.visible_prefix = batch.visible_prefix_lens ? batch.visible_prefix_lens[s] : 0;
  mask.num_ranges = batch.num_ranges;
  mask.ranges = batch.ranges + static_cast<std::int64_t>(s) * batch.num_ranges * 2;
  return mask;
}

// `num_kv_tokens`: rows of the key tensor of direct attention; not used by paged attention.
QUIRE_HOST_DEVICE Sequence sequence_at(const LayerParams& layer, const BatchParams& batch,
                                       std::int64_t num_kv_tokens, std::int32_t s) {
  using semantics::max_of;
  using semantics::min_of;
  Sequence seq;
  const semantics::Span rows = offsets_at(batch.query_start_loc, s);
  seq.first_row = min_of(rows.begin, batch.num_tokens);
  seq.query_len = min_of(rows.end, batch.num_tokens) - seq.first_row;

  std::int64_t seq_len;
  std::int64_t reachable;
  if (layer.paged) {
    seq_len = max_of(batch.seq_lens[s], 0);
    reachable = batch.table_width * layer.block_size;
  } else {
    const semantics::Span keys =
        offsets_at(batch.kv_start_loc ? batch.kv_start_loc : batch.query_start_loc, s);
    seq_len = keys.end - keys.begin;
    seq.first_kv_row = min_of(keys.begin, num_kv_tokens);
    reachable = num_kv_tokens - seq.first_kv_row;
  }
  // Rows cut off at num_tokens keep their positions: the full query length counts.
  seq.context_len = seq_len - (rows.end - rows.begin);
  seq.first_pos = seq.context_len;
  if (batch.q_offset != nullptr) {
    seq.first_pos = min_of(batch.q_offset[s], 0x7FFFFFFF - seq.query_len);
  }
  seq.mask = sequence_mask(layer, batch, s, min_of(seq_len, min_of(reachable, kMostKeys)));
  return seq;
}

}  // namespace quire
