#include "conformance/subset.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "conformance/case_parts.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

Tensor clone(const Tensor& tensor) {
  Tensor copy = tensor;
  copy.buffer = std::make_shared<Buffer>(*tensor.buffer);
  return copy;
}

// The entries `chosen` of dimension 0, then zeros up to `total`; in the layout of `tensor` if that
// is its size.
Tensor gathered(const Tensor& tensor, const std::vector<std::int64_t>& chosen, std::int64_t total) {
  if (!tensor) return {};
  Sizes shape = tensor.shape;
  shape[0] = total;
  const Tensor to = total == tensor.shape[0] ? clone(tensor) : make_tensor(tensor.dtype, shape);
  const std::int64_t size = size_of(tensor.dtype);
  Sizes inner(shape.begin() + 1, shape.end());
  const auto copy_entry = [&](std::int64_t at, std::int64_t from) {
    // Innermost dimensions are contiguous in all tensors of the suite.
    const std::int64_t run = inner.empty() ? 1 : inner.back();
    const std::int64_t middle = inner.size() == 2 ? inner[0] : 1;
    for (std::int64_t m = 0; m < middle; ++m) {
      const std::int64_t to_offset =
          at * to.strides[0] + (inner.size() == 2 ? m * to.strides[1] : 0);
      std::byte* target = to.buffer->bytes.data() + to.offset + to_offset * size;
      if (from < 0) {
        std::memset(target, 0, run * size);
        continue;
      }
      const std::int64_t from_offset =
          from * tensor.strides[0] + (inner.size() == 2 ? m * tensor.strides[1] : 0);
      std::memcpy(target, tensor.buffer->bytes.data() + tensor.offset + from_offset * size,
                  run * size);
    }
  };
  const auto count = static_cast<std::int64_t>(chosen.size());
  for (std::int64_t i = 0; i < total; ++i) copy_entry(i, i < count ? chosen[i] : -1);
  return to;
}

// Places [starts[s], starts[s + 1]) of the chosen sequences, one after the other; `leading` places
// of nobody before.
std::vector<std::int64_t> places_of(const Tensor& starts, const std::vector<std::int64_t>& chosen,
                                    std::int64_t leading) {
  std::vector<std::int64_t> places(leading, -1);
  for (const std::int64_t s : chosen) {
    const auto end = static_cast<std::int64_t>(starts.get({s + 1}));
    for (auto row = static_cast<std::int64_t>(starts.get({s})); row < end; ++row) {
      places.push_back(row);
    }
  }
  return places;
}

Tensor starts_of(const Tensor& starts, const std::vector<std::int64_t>& chosen,
                 std::int64_t leading, std::int64_t total) {
  std::vector<std::int32_t> values{static_cast<std::int32_t>(leading)};
  for (const std::int64_t s : chosen) {
    values.push_back(values.back() +
                     static_cast<std::int32_t>(starts.get({s + 1}) - starts.get({s})));
  }
  values.resize(total + 1, values.back());
  return make_int32(values);
}

}  // namespace

Case subset_of(const Case& c, const std::vector<std::int64_t>& chosen,
               const SubsetPadding& padding) {
  Case subset = c;
  CaseSpec& spec = subset.spec;
  spec.sequences.clear();
  for (const std::int64_t s : chosen) spec.sequences.push_back(c.spec.sequences[s]);
  spec.leading_rows = padding.leading_rows;
  spec.padded_rows = padding.rows;
  spec.counted_rows = padding.counted_rows;
  spec.padded_sequences = padding.sequences;
  spec.cut_rows = 0;
  spec.write = false;
  spec.announced_prefix_len = 0;
  spec.loner = -1;
  const std::int64_t total = static_cast<std::int64_t>(chosen.size()) + padding.sequences;
  subset.slot_mapping = {};
  subset.query_start_loc = starts_of(c.query_start_loc, chosen, padding.leading_rows, total);
  subset.seq_lens = gathered(c.seq_lens, chosen, total);
  subset.block_table = gathered(c.block_table, chosen, total);
  subset.causal = gathered(c.causal, chosen, total);
  subset.mm_prefix_range = gathered(c.mm_prefix_range, chosen, total);
  subset.visible_prefix_lens = gathered(c.visible_prefix_lens, chosen, total);
  subset.kv_offset = gathered(c.kv_offset, chosen, total);
  subset.kv_stride = gathered(c.kv_stride, chosen, total);
  subset.q_offset = gathered(c.q_offset, chosen, total);
  if (spec.qq_bias_per_sequence) subset.qq_bias = gathered(c.qq_bias, chosen, total);
  const std::vector<std::int64_t> rows = places_of(c.query_start_loc, chosen, padding.leading_rows);
  subset.query = gathered(c.query, rows, spec.num_rows());
  if (!spec.has_cache()) {
    const Tensor& starts = c.kv_start_loc ? c.kv_start_loc : c.query_start_loc;
    const std::int64_t leading = c.kv_start_loc ? 0 : padding.leading_rows;
    const std::vector<std::int64_t> keys = places_of(starts, chosen, leading);
    const auto count = static_cast<std::int64_t>(keys.size()) + padding.rows;
    subset.key = gathered(c.key, keys, count);
    subset.value = gathered(c.value, keys, count);
    if (c.kv_start_loc) subset.kv_start_loc = starts_of(starts, chosen, 0, total);
  }
  Rng rng(spec.seed, static_cast<std::uint64_t>(total));
  make_outputs(&subset, &rng);
  return subset;
}

Case shuffled(const Case& c, Rng* rng) {
  std::vector<std::int64_t> chosen(c.spec.sequences.size());
  std::iota(chosen.begin(), chosen.end(), 0);
  rng->shuffle(&chosen);
  if (!chosen.empty() && rng->chance(0.7)) {
    chosen.resize(rng->uniform(0, static_cast<std::int64_t>(chosen.size())));
  }
  std::int64_t rows = c.spec.leading_rows;
  for (const std::int64_t s : chosen) rows += c.spec.sequences[s].query_len;
  SubsetPadding padding;
  padding.leading_rows = c.spec.leading_rows;
  padding.rows = c.spec.num_rows() - rows;
  padding.counted_rows = c.spec.num_actual_tokens() - rows;
  padding.sequences = c.num_seqs() - static_cast<std::int64_t>(chosen.size());
  Case other = subset_of(c, chosen, padding);
  other.output = c.output;
  other.lse = c.lse;
  other.output_block_scale = c.output_block_scale;
  return other;
}

std::vector<std::pair<const Tensor*, const Tensor*>> batch_tensors(const Case& c,
                                                                   const Case& other) {
  std::vector<std::pair<const Tensor*, const Tensor*>> pairs;
  for (const auto& [to, from] :
       {std::pair{&c.query, &other.query}, std::pair{&c.query_start_loc, &other.query_start_loc},
        std::pair{&c.seq_lens, &other.seq_lens}, std::pair{&c.block_table, &other.block_table},
        std::pair{&c.causal, &other.causal}, std::pair{&c.mm_prefix_range, &other.mm_prefix_range},
        std::pair{&c.visible_prefix_lens, &other.visible_prefix_lens},
        std::pair{&c.kv_offset, &other.kv_offset}, std::pair{&c.kv_stride, &other.kv_stride},
        std::pair{&c.q_offset, &other.q_offset}, std::pair{&c.qq_bias, &other.qq_bias}}) {
    if (*to) pairs.emplace_back(to, from);
  }
  return pairs;
}

std::string same_rows(const Case& c, const Actual& whole, const Case& subset, const Actual& part,
                      const std::vector<std::int64_t>& chosen) {
  const AttentionConfig& config = c.spec.config;
  const std::int64_t bytes = config.value_head_size() * size_of(c.output.dtype);
  const std::int64_t groups = c.output_block_scale ? c.output_block_scale.shape[1] * 4 : 0;
  for (std::size_t k = 0; k < chosen.size(); ++k) {
    const auto first = static_cast<std::int64_t>(c.query_start_loc.get({chosen[k]}));
    const auto now =
        static_cast<std::int64_t>(subset.query_start_loc.get({static_cast<std::int64_t>(k)}));
    for (std::int64_t i = 0; i < c.spec.sequences[chosen[k]].query_len; ++i) {
      bool same = true;
      for (std::int64_t head = 0; head < config.num_heads; ++head) {
        same &= std::memcmp(&whole.output[output_offset(c, first + i, head)],
                            &part.output[output_offset(subset, now + i, head)], bytes) == 0;
        if (!c.lse) continue;
        same &= std::memcmp(&whole.lse[lse_offset(c, first + i, head)],
                            &part.lse[lse_offset(subset, now + i, head)], 4) == 0;
      }
      if (groups > 0) {
        same &= std::memcmp(&whole.output_block_scale[(first + i) * groups],
                            &part.output_block_scale[(now + i) * groups], groups) == 0;
      }
      if (!same) {
        return "row " + std::to_string(i) + " of sequence " + std::to_string(chosen[k]) +
               " has other bits";
      }
    }
  }
  return {};
}

std::string compare_elements(const Case& c, const Actual& a, const Actual& b) {
  const AttentionConfig& config = c.spec.config;
  const std::int64_t size = config.value_head_size();
  const double tolerance = 2 * std::max(tolerance_of(c.spec), is_float8(c.output.dtype) ? 7e-2 : 0);
  std::vector<double> va(size);
  std::vector<double> vb(size);
  for (std::int64_t row = 0; row < c.spec.num_rows(); ++row) {
    for (std::int64_t head = 0; head < config.num_heads; ++head) {
      decode_row(c.output.dtype, &a.output[output_offset(c, row, head)], size, va.data());
      decode_row(c.output.dtype, &b.output[output_offset(c, row, head)], size, vb.data());
      double squares = 0;
      for (const double x : va) squares += x * x;
      const double scale = std::sqrt(squares / static_cast<double>(size));
      const double step = smallest_step(c.output.dtype) * 2;
      for (std::int64_t d = 0; d < size; ++d) {
        const bool equal =
            (std::isnan(va[d]) && std::isnan(vb[d])) || va[d] == vb[d] ||
            std::fabs(va[d] - vb[d]) <= tolerance * (2 * scale + std::fabs(va[d])) + step;
        if (!equal) {
          return "output[" + std::to_string(row) + "][" + std::to_string(head) + "][" +
                 std::to_string(d) + "] is " + std::to_string(va[d]) + " and " +
                 std::to_string(vb[d]) + " (row scale " + std::to_string(scale) + ")";
        }
      }
      if (!c.lse) continue;
      const double la = decode(DType::kFloat32, &a.lse[lse_offset(c, row, head)]);
      const double lb = decode(DType::kFloat32, &b.lse[lse_offset(c, row, head)]);
      const bool equal = (std::isnan(la) && std::isnan(lb)) || la == lb ||
                         std::fabs(la - lb) <= tolerance * (1 + std::fabs(la));
      if (!equal) {
        return "lse[" + std::to_string(head) + "][" + std::to_string(row) + "] is " +
               std::to_string(la) + " and " + std::to_string(lb);
      }
    }
  }
  return {};
}

}  // namespace quire::conformance
