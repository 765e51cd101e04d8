// One case of the conformance suite: a layer, a batch, and how everything lies in memory. A
// CaseSpec says what is wanted in a few numbers; build_case() makes the tensors.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "conformance/tensor.h"
#include "quire/quire.h"

namespace quire::conformance {

enum class CacheLayout : std::uint8_t {
  kNhd,        // [num_blocks, 2, block_size, num_kv_heads, head_size], through from_combined()
  kHnd,        // the same shape, heads outside slots
  kPacked,     // [num_blocks, num_kv_heads, block_size, head_size + head_size_v], from_packed()
  kPackedNhd,  // rows of K and V side by side, slots outside heads
  kSeparate,   // two tensors
};

// How the numbers are drawn.
enum class Data : std::uint8_t {
  kNormal,
  kPeaked,   // scores of some tens: softmax near one-hot
  kExtreme,  // scores up to the largest finite value of the narrower type, with ties, exact in fp32
};

struct SequenceSpec {
  std::int64_t query_len = 0;
  std::int64_t seq_len = 0;  // encoders: keys of the sequence
  bool causal = true;        // used if CaseSpec::causal_flags
  std::vector<std::array<std::int32_t, 2>> ranges;
  std::int32_t visible_prefix = 0;
  std::int32_t kv_offset = 0;  // these three if CaseSpec says so
  std::int32_t kv_stride = 1;
  std::int32_t q_offset = 0;
};

struct CaseSpec {
  std::uint64_t seed = 0;   // what the line that reproduces the case names
  std::int64_t index = -1;  // -1: made by hand

  AttentionConfig config;  // its tensors are made by build_case()
  // Dtype of key and value; that of the query too unless it is fp8.
  DType model_dtype = DType::kFloat32;
  std::vector<SequenceSpec> sequences;
  Data data = Data::kNormal;

  // Features that come with a tensor.
  bool alibi = false;
  double alibi_max = 0.5;  // the steepest slope
  bool sinks = false;
  bool causal_flags = false;
  bool ranges = false;
  bool visible_prefixes = false;
  bool kv_offsets = false;
  bool kv_strides = false;
  bool q_offsets = false;
  std::int64_t qq_bias_size = 0;
  bool qq_bias_per_sequence = false;
  bool qq_bias_has_infinity = false;
  bool kv_start_loc = false;

  // Sharing: the first `shared_prefix_len` tokens (whole blocks) of all sequences that are long
  // enough lie in the same blocks; `announced_prefix_len` is what the plan is told.
  std::int64_t shared_prefix_len = 0;
  std::int64_t announced_prefix_len = 0;
  std::int64_t loner = -1;  // this sequence does not share

  // Padding and dirt.
  std::int64_t leading_rows = 0;  // rows of the query before the first sequence's
  std::int64_t padded_rows = 0;   // rows behind the last sequence's
  std::int64_t counted_rows = 0;  // of these, the ones that num_actual_tokens counts
  std::int64_t cut_rows = 0;      // rows of the last sequences that num_actual_tokens cuts off
  std::int64_t padded_sequences = 0;
  std::int64_t max_query_len = 0;  // what the batch says
  std::int64_t extra_blocks = 1;   // of the cache, used by nobody
  std::int64_t extra_table_width = 1;
  std::int64_t wild_blocks = 0;  // table entries that name no block of the cache

  // Large cases: > 0: sequences share this many blocks of noise in their tables (case_large.cc),
  // and what no row of a sequence sees is poison, unless `poison` is off.
  std::int64_t pool_blocks = 0;
  bool poison = true;

  // Memory.
  CacheLayout layout = CacheLayout::kNhd;
  std::int64_t page_padding = 0;    // elements behind each block
  std::int64_t storage_offset = 0;  // elements before the cache
  bool inline_scales = false;       // per-token-head scales behind each row
  bool strided_query = false;       // rows of a packed QKV tensor
  bool scales_in_memory = false;

  // The call.
  bool write = true;  // this step's K and V go through write_kv_cache() first
  bool lse = true;
  DType output_dtype = DType::kNone;  // none: model_dtype
  bool output_3d = false;
  bool output_strided = false;
  bool block_scale = false;  // fp8 output with computed scales, else with a static one
  float output_scale = 0.02F;
  int threads = 0;  // 0: the default pool
  static constexpr int kBackwardPool = -1;
  bool replan = false;  // the plan served another batch before
  bool repeat = false;  // run twice: equal bits

  bool is_large() const { return pool_blocks > 0; }
  DType query_dtype() const { return config.dtype; }
  DType out_dtype() const { return output_dtype == DType::kNone ? model_dtype : output_dtype; }
  bool has_cache() const {
    return config.type == AttentionType::kDecoder || config.type == AttentionType::kEncoderDecoder;
  }
  DType cache_storage() const { return storage_dtype(config.kv_cache_dtype, model_dtype); }
  std::int64_t num_rows() const;  // of query and output
  std::int64_t num_actual_tokens() const;
};

// The tensors. Caches are as attention sees them; `before` holds their buffers as they are before
// this step's write.
struct Case {
  CaseSpec spec;

  Tensor query;
  Tensor key_cache, value_cache, k_scale_cache, v_scale_cache;
  Tensor combined;  // kNhd, kHnd, kPacked: the one tensor that both caches are views of
  std::vector<std::pair<std::shared_ptr<Buffer>, Buffer>> before;  // buffer, its earlier content
  Tensor key, value, slot_mapping;  // this step's K and V, or an encoder's

  Tensor query_start_loc, seq_lens, block_table;
  Tensor causal, mm_prefix_range, visible_prefix_lens, qq_bias, kv_start_loc;
  Tensor kv_offset, kv_stride, q_offset;
  Tensor alibi_slopes, sinks;
  Tensor scales;                           // float32: q, k, v, output scale
  Tensor output, lse, output_block_scale;  // poisoned

  std::int64_t num_seqs() const { return query_start_loc.shape[0] - 1; }
  float q_scale() const { return static_cast<float>(scales.get({0})); }
  float k_scale() const { return static_cast<float>(scales.get({1})); }
  float v_scale() const { return static_cast<float>(scales.get({2})); }
};

// Deterministic in the spec (its seed and index).
Case build_case(const CaseSpec& spec);

// The random case `index` of `seed`.
CaseSpec random_spec(std::uint64_t seed, std::int64_t index);

// What the case is made of, in a line or two.
std::string describe(const CaseSpec& spec);

}  // namespace quire::conformance
