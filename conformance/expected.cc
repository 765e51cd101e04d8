#include "conformance/expected.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "conformance/int4.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// In eight running sums, which the compiler may keep in vector registers: the order of one running
// sum it must not change.
double dot_product(const double* a, const double* b, std::int64_t size) {
  double sums[8] = {};
  std::int64_t d = 0;
  for (; d + 8 <= size; d += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[d + lane] * b[d + lane];
  }
  for (; d < size; ++d) sums[0] += a[d] * b[d];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// One sequence of the batch, in the words of semantics.md.
struct Sequence {
  std::int64_t s;
  std::int64_t first_row, query_len, seq_len, context_len;
  std::int64_t kv_offset, kv_stride, q_offset;  // positions

  std::int64_t key_position(std::int64_t j) const { return kv_offset + j * kv_stride; }
};

Sequence sequence_at(const Case& c, std::int64_t s) {
  Sequence sequence{};
  sequence.s = s;
  sequence.first_row = static_cast<std::int64_t>(c.query_start_loc.get({s}));
  sequence.query_len =
      static_cast<std::int64_t>(c.query_start_loc.get({s + 1})) - sequence.first_row;
  sequence.seq_len = static_cast<std::int64_t>(c.seq_lens.get({s}));
  if (!c.spec.has_cache()) {
    // Without a cache keys and queries are the same tokens, unless kv_start_loc says otherwise.
    sequence.seq_len =
        c.kv_start_loc
            ? static_cast<std::int64_t>(c.kv_start_loc.get({s + 1}) - c.kv_start_loc.get({s}))
            : sequence.query_len;
  }
  sequence.context_len = sequence.seq_len - sequence.query_len;
  const auto entry = [s](const Tensor& tensor, std::int64_t absent) {
    return tensor ? static_cast<std::int64_t>(tensor.get({s})) : absent;
  };
  sequence.kv_offset = entry(c.kv_offset, 0);
  sequence.kv_stride = entry(c.kv_stride, 1);
  sequence.q_offset = entry(c.q_offset, sequence.context_len);
  return sequence;
}

// One row of K or V of a sequence, dequantised. A block that is not there reads as zeros.
void read_row(const Case& c, const Sequence& sequence, std::int64_t kv_head, bool is_key,
              std::int64_t j, double* to) {
  const bool cached = c.spec.has_cache();
  const Tensor& rows = cached ? (is_key ? c.key_cache : c.value_cache) : (is_key ? c.key : c.value);
  const std::int64_t size = is_key ? c.spec.config.head_size : c.spec.config.value_head_size();
  if (!cached) {
    const Tensor& starts = c.kv_start_loc ? c.kv_start_loc : c.query_start_loc;
    const auto first = static_cast<std::int64_t>(starts.get({sequence.s}));
    decode_row(rows.dtype, rows.at({first + j, kv_head, 0}), size, to);
    return;
  }
  const Tensor& scales = is_key ? c.k_scale_cache : c.v_scale_cache;
  const std::int64_t block_size = c.spec.config.block_size;
  const auto block = static_cast<std::int64_t>(c.block_table.get({sequence.s, j / block_size}));
  if (block < 0 || block >= rows.shape[0]) {
    std::fill_n(to, size, 0.0);
    return;
  }
  const std::byte* row = rows.at({block, j % block_size, kv_head, 0});
  if (c.spec.config.kv_cache_dtype == KvCacheDType::kInt4PerTokenHead) {
    const auto scale = static_cast<float>(scales.get({block, j % block_size, kv_head}));
    return read_int4_row(reinterpret_cast<const std::uint8_t*>(row), scale, size, to);
  }
  decode_row(rows.dtype, row, size, to);
  double scale = 1;
  if (is_per_tensor_fp8(c.spec.config.kv_cache_dtype)) scale = is_key ? c.k_scale() : c.v_scale();
  if (scales) scale = scales.get({block, j % block_size, kv_head});
  if (scale == 1) return;
  for (std::int64_t d = 0; d < size; ++d) to[d] *= scale;
}

// Rows of K or V of one sequence and kv head: [seq_len, size].
std::vector<double> gather(const Case& c, const Sequence& sequence, std::int64_t kv_head,
                           bool is_key) {
  const std::int64_t size = is_key ? c.spec.config.head_size : c.spec.config.value_head_size();
  std::vector<double> gathered(sequence.seq_len * size);
  for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
    read_row(c, sequence, kv_head, is_key, j, gathered.data() + j * size);
  }
  return gathered;
}

bool in_one_range(const Case& c, std::int64_t s, std::int64_t p, std::int64_t j) {
  if (!c.mm_prefix_range) return false;
  for (std::int64_t r = 0; r < c.mm_prefix_range.shape[1]; ++r) {
    const auto start = static_cast<std::int64_t>(c.mm_prefix_range.get({s, r, 0}));
    const auto end = static_cast<std::int64_t>(c.mm_prefix_range.get({s, r, 1}));
    if (start < end && start <= p && p <= end && start <= j && j <= end) return true;
  }
  return false;
}

std::int64_t chunk_of(std::int64_t position, std::int64_t size) {
  return static_cast<std::int64_t>(
      std::floor(static_cast<double>(position) / static_cast<double>(size)));
}

bool in_window(const Case& c, std::int64_t s, bool causal, std::int64_t p, std::int64_t j) {
  const Mask& mask = c.spec.config.mask;
  const std::int64_t size = mask.window_size;
  if (c.visible_prefix_lens) {
    const double prefix = c.visible_prefix_lens.get({s});
    if (prefix > 0 && static_cast<double>(j) < prefix) return true;
  }
  switch (mask.window) {
    case WindowKind::kNone: return true;
    case WindowKind::kLeft: return p - j < size && (causal || j - p < size);
    case WindowKind::kBoth: return std::abs(p - j) < size;
    case WindowKind::kChunked: return chunk_of(p, size) - chunk_of(j, size) <= mask.chunk_lookback;
  }
  return false;
}

// Of positions.
bool allowed(const Case& c, std::int64_t s, std::int64_t p, std::int64_t j) {
  const AttentionConfig& config = c.spec.config;
  bool causal = config.type == AttentionType::kDecoder && config.mask.causal;
  if (c.causal && c.causal.get({s}) == 0) causal = false;
  const bool base = !causal || j <= p;
  const bool window = in_window(c, s, causal, p, j);
  const bool range = in_one_range(c, s, p, j);
  if (config.mask.clamp_ranges && config.mask.window != WindowKind::kNone) {
    return window && (base || range);
  }
  return (base && window) || range;
}

// Steps 1 to 5, less the mask, for one query row and one key that it sees.
double visible_score(const Case& c, const Sequence& sequence, std::int64_t head, std::int64_t i,
                     std::int64_t j, double dot) {
  const Score& config = c.spec.config.score;
  const std::int64_t p = sequence.q_offset + i;
  const std::int64_t position = sequence.key_position(j);
  const double scale = config.softmax_scale != 0.0F
                           ? config.softmax_scale
                           : 1.0 / std::sqrt(static_cast<double>(c.spec.config.head_size));
  double s = scale * dot;
  if (config.soft_cap > 0) s = config.soft_cap * std::tanh(s / config.soft_cap);
  if (c.alibi_slopes) {
    const double slope = c.alibi_slopes.get({head});
    const auto distance = static_cast<double>(p - position);
    if (config.alibi_sqrt) {
      s += slope * (position <= p ? -std::sqrt(distance) : 0.0);
    } else {
      s += slope * -distance;
    }
  }
  const std::int64_t n = j - sequence.context_len;
  const std::int64_t m = c.spec.qq_bias_size;
  const bool own_keys = c.spec.config.type != AttentionType::kEncoderDecoder && !c.kv_start_loc;
  if (c.qq_bias && own_keys && n >= 0 && n < m && i < m) {
    const double bias =
        c.spec.qq_bias_per_sequence ? c.qq_bias.get({sequence.s, i, n}) : c.qq_bias.get({i, n});
    s = bias == -kInfinity ? bias : s + bias;  // hidden, whatever the score
  }
  return s;
}

// Steps 1 to 5.
double score(const Case& c, const Sequence& sequence, std::int64_t head, std::int64_t i,
             std::int64_t j, double dot) {
  if (!allowed(c, sequence.s, sequence.q_offset + i, sequence.key_position(j))) return -kInfinity;
  return visible_score(c, sequence, head, i, j, dot);
}

// Softmax over the scores and the weighted sum of the values, for one row and head.
void attend_row(const Case& c, const std::vector<double>& scores, const std::vector<double>& values,
                std::int64_t head, double* out, double* lse) {
  const std::int64_t size = c.spec.config.value_head_size();
  double highest = -kInfinity;
  for (const double s : scores) highest = std::max(highest, s);
  if (c.sinks) highest = std::max(highest, c.sinks.get({head}));
  const bool has_nan =
      std::any_of(scores.begin(), scores.end(), [](double s) { return std::isnan(s); });
  *lse = -kInfinity;
  if (highest == -kInfinity && !has_nan) return;
  if (highest == -kInfinity) highest = 0;  // every score seen is NaN
  double denominator = c.sinks ? std::exp(c.sinks.get({head}) - highest) : 0.0;
  for (std::size_t j = 0; j < scores.size(); ++j) {
    if (scores[j] == -kInfinity) continue;
    const double weight = std::exp(scores[j] - highest);
    denominator += weight;
    for (std::int64_t d = 0; d < size; ++d) out[d] += weight * values[j * size + d];
  }
  for (std::int64_t d = 0; d < size; ++d) out[d] /= denominator;
  *lse = highest + std::log(denominator);
}

void attend_head(const Case& c, const Sequence& sequence, std::int64_t head, Expected* expected) {
  const AttentionConfig& config = c.spec.config;
  const std::int64_t kv_head = head / (config.num_heads / config.num_kv_heads);
  const std::vector<double> keys = gather(c, sequence, kv_head, true);
  const std::vector<double> values = gather(c, sequence, kv_head, false);
  std::vector<double> q(config.head_size);
  std::vector<double> scores(sequence.seq_len);
  for (std::int64_t i = 0; i < sequence.query_len; ++i) {
    const std::int64_t row = sequence.first_row + i;
    if (!expected->written[row]) continue;
    decode_row(c.query.dtype, c.query.at({row, head, 0}), config.head_size, q.data());
    for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
      double dot = 0;
      for (std::int64_t d = 0; d < config.head_size; ++d) {
        dot += q[d] * keys[j * config.head_size + d];
      }
      scores[j] = score(c, sequence, head, i, j, dot * c.q_scale());
    }
    attend_row(c, scores, values, head, expected->out(row, head),
               &expected->lse[head * expected->num_rows + row]);
  }
}

}  // namespace

bool is_visible(const Case& c, std::int64_t s, std::int64_t i, std::int64_t j) {
  const Sequence sequence = sequence_at(c, s);
  return allowed(c, s, sequence.q_offset + i, sequence.key_position(j));
}

std::vector<bool> written_rows(const Case& c) {
  std::vector<bool> written(c.spec.num_rows(), false);
  const auto begin = static_cast<std::int64_t>(c.query_start_loc.get({0}));
  const auto end = static_cast<std::int64_t>(c.query_start_loc.get({c.num_seqs()}));
  for (std::int64_t row = begin; row < std::min(end, c.spec.num_actual_tokens()); ++row) {
    written[row] = true;
  }
  return written;
}

Expected empty_expected(const Case& c) {
  const AttentionConfig& config = c.spec.config;
  Expected expected;
  expected.num_rows = c.spec.num_rows();
  expected.num_heads = config.num_heads;
  expected.head_size_v = config.value_head_size();
  expected.written = written_rows(c);
  expected.output.assign(expected.num_rows * expected.num_heads * expected.head_size_v, 0.0);
  expected.lse.assign(expected.num_rows * expected.num_heads, -kInfinity);
  return expected;
}

RowOfHeads literal_row(const Case& c, const RowPlace& place) {
  const AttentionConfig& config = c.spec.config;
  const Sequence sequence = sequence_at(c, place.s);
  const std::int64_t kv_head = place.first_head / (config.num_heads / config.num_kv_heads);
  const std::int64_t size = config.head_size;
  const std::int64_t size_v = config.value_head_size();
  std::vector<std::int64_t> visible;
  for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
    if (allowed(c, place.s, sequence.q_offset + place.i, sequence.key_position(j))) {
      visible.push_back(j);
    }
  }
  const auto n = static_cast<std::int64_t>(visible.size());
  std::vector<double> q(place.count * size);
  for (std::int64_t h = 0; h < place.count; ++h) {
    const std::byte* row = c.query.at({sequence.first_row + place.i, place.first_head + h, 0});
    decode_row(c.query.dtype, row, size, q.data() + h * size);
  }
  std::vector<double> scores(place.count * n);
  std::vector<double> row(std::max(size, size_v));
  for (std::int64_t v = 0; v < n; ++v) {
    read_row(c, sequence, kv_head, true, visible[v], row.data());
    for (std::int64_t h = 0; h < place.count; ++h) {
      const double dot = dot_product(q.data() + h * size, row.data(), size) * c.q_scale();
      scores[h * n + v] =
          visible_score(c, sequence, place.first_head + h, place.i, visible[v], dot);
    }
  }
  RowOfHeads result{std::vector<double>(place.count * size_v, 0.0),
                    std::vector<double>(place.count, -kInfinity)};
  for (std::int64_t h = 0; h < place.count; ++h) {
    double* weights = scores.data() + h * n;
    const double sink = c.sinks ? c.sinks.get({place.first_head + h}) : -kInfinity;
    const double highest = std::max(sink, n > 0 ? *std::max_element(weights, weights + n) : sink);
    if (highest == -kInfinity) {
      std::fill_n(weights, n, 0.0);
      continue;
    }
    double denominator = std::exp(sink - highest);
    for (std::int64_t v = 0; v < n; ++v) {
      weights[v] = std::exp(weights[v] - highest);
      denominator += weights[v];
    }
    for (std::int64_t v = 0; v < n; ++v) weights[v] /= denominator;
    result.lse[h] = highest + std::log(denominator);
  }
  for (std::int64_t v = 0; v < n; ++v) {
    read_row(c, sequence, kv_head, false, visible[v], row.data());
    for (std::int64_t h = 0; h < place.count; ++h) {
      const double weight = scores[h * n + v];
      double* out = result.output.data() + h * size_v;
      for (std::int64_t d = 0; d < size_v; ++d) out[d] += weight * row[d];
    }
  }
  return result;
}

Expected literal_attention(const Case& c) {
  Expected expected = empty_expected(c);
  for (std::int64_t s = 0; s < c.num_seqs(); ++s) {
    const Sequence sequence = sequence_at(c, s);
    for (std::int64_t head = 0; head < c.spec.config.num_heads; ++head) {
      attend_head(c, sequence, head, &expected);
    }
  }
  return expected;
}

}  // namespace quire::conformance
