#include "conformance/case.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "conformance/case_parts.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

void make_lengths(Case* c) {
  const CaseSpec& spec = c->spec;
  std::vector<std::int32_t> starts{static_cast<std::int32_t>(spec.leading_rows)};
  std::vector<std::int32_t> lens;
  for (const SequenceSpec& s : spec.sequences) {
    starts.push_back(starts.back() + static_cast<std::int32_t>(s.query_len));
    lens.push_back(static_cast<std::int32_t>(s.seq_len));
  }
  for (std::int64_t i = 0; i < spec.padded_sequences; ++i) {
    starts.push_back(starts.back());
    lens.push_back(0);
  }
  c->query_start_loc = make_int32(starts);
  c->seq_lens = make_int32(lens);
}

}  // namespace

// Rows of a packed [Q | K | V] tensor, with a gap between heads, where the case wants strides.
Layout query_layout(const CaseSpec& spec, Rng* rng) {
  if (!spec.strided_query) return {};
  return {.order = {},
          .padding = {0, rng->uniform(0, 3), 8 * rng->uniform(0, 1)},
          .offset = rng->uniform(0, 5),
          .slack = rng->uniform(0, 5)};
}

namespace {

void make_query(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const AttentionConfig& config = spec.config;
  c->query = make_tensor(config.dtype, {spec.num_rows(), config.num_heads, config.head_size},
                         query_layout(spec, rng));
  const Amplitude amplitude = amplitude_of(spec);
  const std::int64_t end = std::min(spec.num_actual_tokens(), spec.num_rows() - spec.padded_rows);
  for (std::int64_t row = spec.leading_rows; row < end; ++row) {
    for (std::int64_t h = 0; h < config.num_heads; ++h) {
      for (std::int64_t d = 0; d < config.head_size; ++d) {
        double x = amplitude.query * rng->normal() / c->q_scale();
        if (spec.data == Data::kExtreme) x = d == 0 ? amplitude.query : 0.0;
        c->query.set({row, h, d}, x);
      }
    }
  }
}

void make_score_tensors(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t num_heads = spec.config.num_heads;
  if (spec.alibi) {
    std::vector<float> slopes(num_heads);
    for (std::int64_t h = 0; h < num_heads; ++h) {
      slopes[h] = static_cast<float>(spec.alibi_max * std::exp2(-static_cast<double>(h % 8)));
    }
    c->alibi_slopes = make_float32(slopes);
  }
  if (spec.sinks) {
    std::vector<float> sinks(num_heads);
    for (float& sink : sinks) sink = static_cast<float>(2 * rng->normal());
    c->sinks = make_float32(sinks);
  }
}

void make_batch_masks(Case* c) {
  const CaseSpec& spec = c->spec;
  const std::int64_t n = c->num_seqs();
  const auto with_sequences = static_cast<std::int64_t>(spec.sequences.size());
  if (spec.causal_flags) {
    c->causal = make_tensor(DType::kBool, {n});
    for (std::int64_t s = 0; s < n; ++s) {
      c->causal.set({s}, s >= with_sequences || spec.sequences[s].causal ? 1 : 0);
    }
  }
  if (spec.visible_prefixes) {
    c->visible_prefix_lens = make_tensor(DType::kInt32, {n});
    for (std::int64_t s = 0; s < n; ++s) {
      c->visible_prefix_lens.set({s}, s < with_sequences ? spec.sequences[s].visible_prefix : 0);
    }
  }
  const auto positions = [&](bool wanted, std::int32_t SequenceSpec::*member, Tensor* tensor) {
    if (!wanted) return;
    *tensor = make_tensor(DType::kInt32, {n});
    for (std::int64_t s = 0; s < n; ++s) {
      tensor->set({s}, s < with_sequences ? spec.sequences[s].*member : 1);
    }
  };
  positions(spec.kv_offsets, &SequenceSpec::kv_offset, &c->kv_offset);
  positions(spec.kv_strides, &SequenceSpec::kv_stride, &c->kv_stride);
  positions(spec.q_offsets, &SequenceSpec::q_offset, &c->q_offset);
  if (!spec.ranges) return;
  std::int64_t width = 1;
  for (const SequenceSpec& s : spec.sequences) {
    width = std::max(width, static_cast<std::int64_t>(s.ranges.size()));
  }
  c->mm_prefix_range = make_tensor(DType::kInt32, {n, width, 2});
  for (std::int64_t s = 0; s < n; ++s) {
    for (std::int64_t r = 0; r < width; ++r) {
      const bool given =
          s < with_sequences && r < static_cast<std::int64_t>(spec.sequences[s].ranges.size());
      c->mm_prefix_range.set({s, r, 0}, given ? spec.sequences[s].ranges[r][0] : 0);
      c->mm_prefix_range.set({s, r, 1}, given ? spec.sequences[s].ranges[r][1] : 0);
    }
  }
}

void make_qq_bias(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t m = spec.qq_bias_size;
  if (m == 0) return;
  c->qq_bias = spec.qq_bias_per_sequence ? make_tensor(DType::kFloat32, {c->num_seqs(), m, m})
                                         : make_tensor(DType::kFloat32, {m, m});
  std::byte* bytes = c->qq_bias.buffer->bytes.data();
  c->qq_bias.for_each_element([&](std::int64_t offset) {
    const bool hidden = spec.qq_bias_has_infinity && rng->chance(0.4);
    const double bias = hidden ? -std::numeric_limits<double>::infinity() : 2 * rng->normal();
    encode(DType::kFloat32, bias, bytes + offset);
  });
}

}  // namespace

void make_outputs(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const std::int64_t rows = spec.num_rows();
  const std::int64_t heads = spec.config.num_heads;
  const std::int64_t size = spec.config.value_head_size();
  Layout layout;
  if (spec.output_strided) {
    layout.offset = rng->uniform(0, 7);
    layout.slack = rng->uniform(0, 7);
    layout.padding = {rng->uniform(0, 2), 8 * rng->uniform(0, 3)};
    if (spec.output_3d) {
      layout.padding = {rng->uniform(0, 2), rng->uniform(0, 2), 8 * rng->uniform(0, 2)};
      if (rng->chance(0.3)) layout.order = {1, 0, 2};
    }
  }
  const Sizes shape = spec.output_3d ? Sizes{rows, heads, size} : Sizes{rows, heads * size};
  c->output = make_tensor(spec.out_dtype(), shape, layout);
  if (spec.lse) {
    Layout lse_layout;
    lse_layout.padding = {0, rng->uniform(0, 3)};
    c->lse = make_tensor(DType::kFloat32, {heads, rows}, lse_layout);
  }
  if (spec.block_scale) {
    c->output_block_scale = make_tensor(DType::kFloat32, {rows, (heads * size + 127) / 128});
  }
}

namespace {

void make_scales(Case* c, Rng* rng) {
  const CaseSpec& spec = c->spec;
  const bool fp8_cache = is_per_tensor_fp8(spec.config.kv_cache_dtype);
  const auto draw = [&](bool used) {
    return used ? static_cast<float>(0.02 + 0.05 * rng->unit()) : 1.0F;
  };
  c->scales = make_float32(
      {draw(is_float8(spec.query_dtype())), draw(fp8_cache), draw(fp8_cache), spec.output_scale});
}

}  // namespace

std::int64_t CaseSpec::num_rows() const {
  std::int64_t rows = leading_rows + padded_rows;
  for (const SequenceSpec& s : sequences) rows += s.query_len;
  return rows;
}

std::int64_t CaseSpec::num_actual_tokens() const {
  return std::max<std::int64_t>(num_rows() - padded_rows + counted_rows - cut_rows, 0);
}

Amplitude amplitude_of(const CaseSpec& spec) {
  // Scores of 40 and more are not good to 1e-5 in float32, whoever sums them up.
  const bool is_fp32 = spec.query_dtype() == DType::kFloat32;
  if (spec.data == Data::kPeaked) return {is_fp32 ? 2.5 : 4.0, 2.0, 1.0};
  if (spec.data == Data::kNormal) return {1.0, 1.0, 1.0};
  const bool has_half = spec.query_dtype() == DType::kFloat16 ||
                        spec.model_dtype == DType::kFloat16 ||
                        (spec.has_cache() && spec.cache_storage() == DType::kFloat16);
  // The product is the largest finite value of the narrower type: 65504, or bf16's 0x1.FEp127.
  if (has_half) return {256.0, 65504.0 / 256.0, 1.0};
  return {0x1p64, 0x1.FEp63, 1.0};
}

Case build_case(const CaseSpec& spec) {
  Case c;
  c.spec = spec;
  Rng rng(spec.seed ^ 0xC0FFEEU, static_cast<std::uint64_t>(spec.index));
  make_lengths(&c);
  make_scales(&c, &rng);
  if (spec.is_large()) {
    make_large_query(&c, &rng);
  } else {
    make_query(&c, &rng);
  }
  make_score_tensors(&c, &rng);
  make_batch_masks(&c);
  make_qq_bias(&c, &rng);
  if (spec.is_large() && spec.has_cache()) {
    make_pooled_cache(&c, &rng);
  } else if (spec.is_large()) {
    make_large_encoder_keys(&c, &rng);
  } else if (spec.has_cache()) {
    make_block_table(&c, &rng);
    make_cache(&c, &rng);
  } else {
    make_encoder_keys(&c, &rng);
  }
  make_outputs(&c, &rng);
  return c;
}

}  // namespace quire::conformance
