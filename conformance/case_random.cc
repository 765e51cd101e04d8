// Draws specs. Frequent things often, odd things often enough: every feature below turns up some
// hundred times in 20,000 cases, and most pairs of features do.
#include <algorithm>
#include <cmath>

#include "conformance/case_parts.h"
#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

// Multiply-adds of a case, and elements in its cache: what keeps 20,000 cases to some minutes.
constexpr double kMaxWork = 2.0e6;
constexpr std::int64_t kMaxCacheElements = 120'000;

std::int64_t cache_elements_of(const CaseSpec& spec) {
  const AttentionConfig& config = spec.config;
  std::int64_t tokens = 0;
  for (const SequenceSpec& s : spec.sequences) {
    tokens += (s.seq_len + config.block_size - 1) / config.block_size * config.block_size;
  }
  return tokens * config.num_kv_heads * (config.head_size + config.value_head_size());
}

// Shortens the sequences, the dearest first, until the case is quick.
void fit_budget(CaseSpec* spec) {
  const bool own_keys = spec->config.type != AttentionType::kEncoderDecoder && !spec->kv_start_loc;
  while (!spec->sequences.empty() &&
         (work_of(*spec) > kMaxWork || cache_elements_of(*spec) > kMaxCacheElements)) {
    const auto s = std::max_element(
        spec->sequences.begin(), spec->sequences.end(), [](const auto& a, const auto& b) {
          return (a.query_len + 1) * a.seq_len < (b.query_len + 1) * b.seq_len;
        });
    if (s->seq_len <= 4) {
      spec->sequences.erase(s);
      continue;
    }
    const bool many_queries = own_keys ? s->query_len * 2 > s->seq_len : s->query_len > s->seq_len;
    if (many_queries) s->query_len = s->query_len * 2 / 3;
    s->seq_len = s->seq_len * 2 / 3;
    if (own_keys) s->query_len = std::min(s->query_len, s->seq_len);
    if (!spec->has_cache() && own_keys) s->seq_len = s->query_len;
  }
}

std::int64_t draw_length(Rng* rng, double most) {
  return std::max<std::int64_t>(1, std::llround(std::exp(rng->unit() * std::log(most))));
}

enum class Mix { kDecode, kSpeculative, kPrefill, kChunkedPrefill, kMixed };

SequenceSpec draw_sequence(Mix mix, Rng* rng) {
  SequenceSpec s;
  if (mix == Mix::kMixed) {
    mix = rng->pick({Mix::kDecode, Mix::kSpeculative, Mix::kPrefill, Mix::kChunkedPrefill});
  }
  switch (mix) {
    case Mix::kDecode: s.query_len = 1; break;
    case Mix::kSpeculative: s.query_len = rng->uniform(2, 9); break;
    default: s.query_len = draw_length(rng, 200); break;
  }
  const bool fresh = mix == Mix::kPrefill || rng->chance(0.1);
  s.seq_len = s.query_len + (fresh ? 0 : draw_length(rng, rng->chance(0.15) ? 5000 : 400));
  if (rng->chance(0.04)) s.query_len = 0;
  if (rng->chance(0.04)) s = {};
  if (rng->chance(0.01)) s.seq_len = 0;  // rows that see nothing
  return s;
}

void draw_batch(CaseSpec* spec, Rng* rng) {
  const Mix mix = rng->pick({Mix::kDecode, Mix::kDecode, Mix::kSpeculative, Mix::kPrefill,
                             Mix::kChunkedPrefill, Mix::kMixed, Mix::kMixed, Mix::kMixed});
  std::int64_t num_seqs = rng->pick<std::int64_t>({1, 1, 2, 3, 4, 5, 8});
  if (rng->chance(0.03)) num_seqs = rng->uniform(9, 40);
  if (rng->chance(0.01)) num_seqs = 0;
  for (std::int64_t i = 0; i < num_seqs; ++i) spec->sequences.push_back(draw_sequence(mix, rng));
  if (spec->config.type == AttentionType::kEncoderDecoder || spec->kv_start_loc) {
    // Keys of their own: any number of them.
    for (SequenceSpec& s : spec->sequences)
      s.seq_len = rng->chance(0.05) ? 0 : draw_length(rng, 300);
  } else if (!spec->has_cache()) {
    for (SequenceSpec& s : spec->sequences) s.seq_len = s.query_len;
  }
}

void draw_window(CaseSpec* spec, Rng* rng) {
  Mask& mask = spec->config.mask;
  const bool decoder = spec->config.type == AttentionType::kDecoder;
  mask.causal = decoder && !rng->chance(0.15);
  if (!rng->chance(0.5)) return;
  mask.window_size = draw_length(rng, 300);
  if (!decoder) {
    mask.window = WindowKind::kBoth;
  } else if (rng->chance(0.25)) {
    mask.window = WindowKind::kChunked;
    mask.chunk_lookback = rng->pick<std::int64_t>({0, 0, 1, 2, 5});
  } else {
    mask.window = rng->chance(mask.causal ? 0.1 : 0.6) ? WindowKind::kBoth : WindowKind::kLeft;
  }
}

void draw_ranges(SequenceSpec* s, Rng* rng) {
  const std::int64_t count = rng->uniform(0, 3);
  const std::int64_t last = std::max<std::int64_t>(s->seq_len - 1, 0);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t start = rng->uniform(0, last);
    std::int64_t end = start + rng->uniform(0, last / 2 + 1);  // may pass seq_len
    if (rng->chance(0.15)) end = start;                        // means none
    if (rng->chance(0.05)) end = start - 1;
    s->ranges.push_back({static_cast<std::int32_t>(start), static_cast<std::int32_t>(end)});
  }
}

void draw_batch_masks(CaseSpec* spec, Rng* rng) {
  if (spec->config.type != AttentionType::kDecoder) {
    // A flag that says "causal" changes nothing here.
    spec->causal_flags = rng->chance(0.1);
    return;
  }
  spec->causal_flags = rng->chance(0.1);
  spec->ranges = rng->chance(0.12);
  spec->visible_prefixes = rng->chance(spec->config.mask.window != WindowKind::kNone ? 0.25 : 0.03);
  for (SequenceSpec& s : spec->sequences) {
    s.causal = !spec->causal_flags || rng->chance(0.5);
    if (spec->ranges) draw_ranges(&s, rng);
    if (spec->visible_prefixes) {
      s.visible_prefix = static_cast<std::int32_t>(rng->uniform(0, s.seq_len + 2));
    }
  }
}

void draw_score(CaseSpec* spec, Rng* rng) {
  Score& score = spec->config.score;
  if (rng->chance(0.03)) {
    spec->data = Data::kExtreme;
  } else if (rng->chance(0.12)) {
    spec->data = Data::kPeaked;
  }
  if (is_float8(spec->query_dtype()) ||
      (spec->has_cache() && size_of(spec->cache_storage()) == 1)) {
    spec->data = spec->data == Data::kExtreme ? Data::kNormal : spec->data;
  }
  spec->sinks = rng->chance(0.15);
  if (spec->data == Data::kExtreme) {
    // Exact in float32 only if nothing is added, and 1 is the scale.
    score.softmax_scale = 1.0F;
    return;
  }
  if (rng->chance(0.3)) {
    // Around 1 / sqrt(head_size). In float32, scores that reach 50 carry errors that no float32
    // arithmetic turns into weights good to 1e-5.
    const double most = spec->query_dtype() == DType::kFloat32 ? 1.3 : 3.0;
    const double factor = (0.2 + (most - 0.2) * rng->unit()) * (rng->chance(0.1) ? -1 : 1);
    const auto head_size = static_cast<double>(spec->config.head_size);
    score.softmax_scale = static_cast<float>(factor / std::sqrt(head_size));
  }
  if (rng->chance(0.15)) score.soft_cap = rng->pick({1.0F, 5.0F, 30.0F, 50.0F});
  if (rng->chance(0.12)) {
    spec->alibi = true;
    score.alibi_sqrt = rng->chance(0.4);
    std::int64_t longest = 1;
    for (const SequenceSpec& s : spec->sequences) longest = std::max(longest, s.seq_len);
    // Keys ahead of the query gain slope * distance: in float32 more than some tens is not 1e-5.
    const bool ahead = !spec->config.mask.causal || spec->causal_flags || spec->ranges;
    spec->alibi_max = ahead ? std::min(0.5, 8.0 / static_cast<double>(longest)) : 0.5;
  }
  if (rng->chance(0.08)) {
    spec->qq_bias_size = rng->uniform(1, 40);
    spec->qq_bias_per_sequence = rng->chance(0.5);
    spec->qq_bias_has_infinity = rng->chance(0.5);
  }
}

void draw_sharing(CaseSpec* spec, Rng* rng) {
  if (spec->config.type != AttentionType::kDecoder || spec->sequences.size() < 2) return;
  if (!rng->chance(0.2)) {
    // A promise about nothing: no two sequences share a block.
    if (rng->chance(0.02)) spec->announced_prefix_len = rng->uniform(1, 100);
    return;
  }
  std::vector<std::int64_t> lengths;
  for (const SequenceSpec& s : spec->sequences) lengths.push_back(s.seq_len);
  std::sort(lengths.begin(), lengths.end());
  // Mostly what all sequences can share; sometimes more, which short sequences then do not.
  const std::int64_t longest = rng->chance(0.3) ? lengths[lengths.size() / 2] : lengths.front();
  const std::int64_t block_size = spec->config.block_size;
  if (longest < block_size) return;
  spec->shared_prefix_len = rng->uniform(1, longest / block_size) * block_size;
  if (rng->chance(0.6)) {
    spec->announced_prefix_len = spec->shared_prefix_len + rng->uniform(0, block_size - 1);
    if (rng->chance(0.1)) spec->announced_prefix_len += 2 * block_size;  // more than was kept
  }
  if (rng->chance(0.15)) {
    spec->loner = rng->uniform(0, static_cast<std::int64_t>(spec->sequences.size()) - 1);
  }
}

// Positions that are not the keys' indices: a shard, or the middle of a sequence. Queries lie among
// the keys' positions or around them.
void draw_positions(CaseSpec* spec, Rng* rng) {
  const bool sliding = spec->config.mask.window != WindowKind::kChunked;
  spec->config.mask.clamp_ranges = spec->ranges && sliding && rng->chance(0.5);
  const double often = spec->shared_prefix_len > 0 ? 0.03 : 0.12;  // nothing is shared then
  if (spec->data == Data::kExtreme || !rng->chance(often)) return;
  spec->kv_offsets = rng->chance(0.7);
  spec->kv_strides = rng->chance(0.6);
  spec->q_offsets = rng->chance(0.7);
  std::int64_t longest = 1;
  for (SequenceSpec& s : spec->sequences) {
    if (spec->kv_offsets) s.kv_offset = static_cast<std::int32_t>(draw_length(rng, 3000) - 1);
    if (spec->kv_strides) s.kv_stride = rng->pick<std::int32_t>({1, 2, 2, 3, 4, 8, 77});
    const std::int64_t span = s.seq_len * s.kv_stride;
    if (spec->q_offsets) {
      s.q_offset =
          static_cast<std::int32_t>(s.kv_offset + rng->uniform(std::min(span, span / 3), span + 9));
    }
    const std::int64_t query = spec->q_offsets ? s.q_offset : s.seq_len;
    longest = std::max({longest, s.kv_offset + span, query + s.query_len});
    for (auto& range : s.ranges) {
      for (std::int32_t& end : range) end = s.kv_offset + end * s.kv_stride;
    }
    s.visible_prefix += s.visible_prefix > 0 ? s.kv_offset : 0;
  }
  // Keys ahead of the query may gain slope * distance, see draw_score().
  spec->alibi_max = std::min(spec->alibi_max, 8.0 / static_cast<double>(longest));
}

void draw_memory(CaseSpec* spec, Rng* rng) {
  spec->layout = rng->pick({CacheLayout::kNhd, CacheLayout::kNhd, CacheLayout::kHnd,
                            CacheLayout::kPacked, CacheLayout::kPackedNhd, CacheLayout::kSeparate});
  if (rng->chance(0.2)) spec->page_padding = 1;
  if (rng->chance(0.2)) spec->storage_offset = rng->uniform(1, 40);
  spec->inline_scales = is_per_token_head(spec->config.kv_cache_dtype) && rng->chance(0.4);
  spec->strided_query = rng->chance(0.3);
  spec->scales_in_memory = rng->chance(0.3);
  spec->extra_blocks = rng->uniform(0, 3);
  spec->extra_table_width = rng->uniform(0, 4);
  if (rng->chance(0.04)) spec->wild_blocks = rng->uniform(1, 3);
}

void draw_padding(CaseSpec* spec, Rng* rng) {
  if (rng->chance(0.03)) spec->leading_rows = rng->uniform(1, 3);
  if (rng->chance(0.2)) spec->padded_rows = rng->uniform(1, 9);
  if (rng->chance(0.15)) spec->padded_sequences = rng->uniform(1, 4);
  if (rng->chance(0.03) && !spec->sequences.empty()) {
    spec->cut_rows = std::min<std::int64_t>(rng->uniform(1, 5), spec->num_actual_tokens());
  }
}

void draw_output(CaseSpec* spec, Rng* rng) {
  if (rng->chance(0.2)) {
    spec->output_dtype = rng->pick({DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  }
  if (rng->chance(0.15)) {
    spec->output_dtype = DType::kFloat8E4M3;
    spec->block_scale = rng->chance(0.5);
    spec->output_scale = rng->pick({0.02F, 0.005F, 0.0005F, 0.1F});  // one of them saturates
  }
  spec->output_3d = rng->chance(0.5);
  spec->output_strided = rng->chance(0.25);
  spec->lse = rng->chance(0.5);
}

// What a host that pads its batches says: rows that num_actual_tokens counts although no sequence
// owns them, and the longest query, exactly or as a bound.
void draw_said_lengths(CaseSpec* spec, Rng* rng) {
  if (spec->padded_rows > 0 && spec->cut_rows == 0 && rng->chance(0.5)) {
    spec->counted_rows = rng->uniform(1, spec->padded_rows);
  }
  if (!rng->chance(0.5)) return;
  for (const SequenceSpec& s : spec->sequences) {
    spec->max_query_len = std::max(spec->max_query_len, s.query_len);
  }
  if (rng->chance(0.3)) spec->max_query_len += rng->uniform(0, 40);
}

}  // namespace

double work_of(const CaseSpec& spec) {
  const AttentionConfig& config = spec.config;
  double pairs = 0;
  for (const SequenceSpec& s : spec.sequences) {
    pairs += static_cast<double>(s.query_len) * static_cast<double>(s.seq_len);
  }
  return pairs * static_cast<double>(config.num_heads) *
         static_cast<double>(config.head_size + config.value_head_size());
}

void draw_type(CaseSpec* spec, Rng* rng) {
  if (rng->chance(0.2)) {
    spec->config.type = rng->pick({AttentionType::kEncoder, AttentionType::kEncoderOnly,
                                   AttentionType::kEncoderDecoder, AttentionType::kEncoderDecoder});
  }
  spec->kv_start_loc = !spec->has_cache() && rng->chance(0.4);
}

void draw_dtypes(CaseSpec* spec, Rng* rng) {
  AttentionConfig& config = spec->config;
  spec->model_dtype = rng->pick({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  config.dtype = spec->model_dtype;
  if (!spec->has_cache()) return;
  config.kv_cache_dtype = rng->pick(
      {KvCacheDType::kAuto, KvCacheDType::kAuto, KvCacheDType::kAuto, KvCacheDType::kFloat16,
       KvCacheDType::kBFloat16, KvCacheDType::kFloat32, KvCacheDType::kFp8E4M3,
       KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E5M2, KvCacheDType::kInt8PerTokenHead,
       KvCacheDType::kFp8E4M3PerTokenHead, KvCacheDType::kInt4PerTokenHead});
  if (is_per_tensor_fp8(config.kv_cache_dtype) && rng->chance(0.4)) {
    config.dtype = DType::kFloat8E4M3;
  }
}

namespace {

void draw_any_head_sizes(AttentionConfig* config, Rng* rng) {
  if (rng->chance(0.6)) {
    config->head_size = rng->pick<std::int64_t>({64, 64, 128, 128, 128, 32, 96, 256});
    return;
  }
  if (rng->chance(0.3)) {  // V of another size
    const std::int64_t pair = rng->uniform(0, 4);
    const std::int64_t sizes[5][2] = {{192, 128}, {576, 512}, {64, 128}, {40, 8}, {24, 33}};
    config->head_size = sizes[pair][0];
    config->head_size_v = sizes[pair][1];
    return;
  }
  config->head_size =
      rng->pick<std::int64_t>({8, 9, 16, 20, 33, 40, 72, 80, 100, 112, 160, 192, 257, 512, 576});
  if (rng->chance(0.3)) config->head_size = rng->uniform(8, 576);
}

}  // namespace

void draw_head_sizes(CaseSpec* spec, Rng* rng) {
  AttentionConfig& config = spec->config;
  draw_any_head_sizes(&config, rng);
  if (config.kv_cache_dtype != KvCacheDType::kInt4PerTokenHead) return;
  config.head_size += config.head_size % 2;
  config.head_size_v += config.head_size_v % 2;
}

void draw_heads(CaseSpec* spec, Rng* rng) {
  AttentionConfig& config = spec->config;
  config.num_kv_heads = rng->pick<std::int64_t>({1, 1, 2, 2, 3, 4, 8});
  std::int64_t group = rng->pick<std::int64_t>({1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 12, 16});
  if (rng->chance(0.03)) group = 71;  // Falcon
  while (config.num_kv_heads > 1 && group * config.num_kv_heads > 32) config.num_kv_heads /= 2;
  config.num_heads = group * config.num_kv_heads;
}

void draw_features(CaseSpec* spec, Rng* rng) {
  draw_window(spec, rng);
  draw_batch_masks(spec, rng);
  draw_score(spec, rng);
  draw_sharing(spec, rng);
  draw_memory(spec, rng);
  draw_padding(spec, rng);
  draw_output(spec, rng);
  spec->write = spec->config.type == AttentionType::kDecoder && rng->chance(0.6);
  spec->config.batch_invariant = rng->chance(0.15);
  spec->config.auto_cascade = !rng->chance(0.2);
  spec->threads = rng->pick({0, 0, 0, 0, 1, 2, 3, 16, CaseSpec::kBackwardPool});
  spec->replan = rng->chance(0.15);
  spec->repeat = rng->chance(0.15);
  draw_positions(spec, rng);
  draw_said_lengths(spec, rng);
}

CaseSpec random_spec(std::uint64_t seed, std::int64_t index) {
  Rng rng(seed, static_cast<std::uint64_t>(index));
  CaseSpec spec;
  spec.seed = seed;
  spec.index = index;
  AttentionConfig& config = spec.config;
  draw_type(&spec, &rng);
  draw_dtypes(&spec, &rng);
  draw_head_sizes(&spec, &rng);
  draw_heads(&spec, &rng);
  config.block_size = rng.pick<std::int64_t>({16, 16, 16, 32, 64, 128, 1, 2, 8, 17, 48, 256});
  draw_batch(&spec, &rng);
  fit_budget(&spec);
  draw_features(&spec, &rng);
  return spec;
}

std::string describe(const CaseSpec& spec) {
  const AttentionConfig& config = spec.config;
  const char* const types[] = {"decoder", "encoder", "encoder-only", "cross"};
  const char* const windows[] = {"none", "left", "both", "chunked"};
  const char* const layouts[] = {"NHD", "HND", "packed", "packed NHD", "separate"};
  const char* const data[] = {"normal", "peaked", "extreme"};
  std::string text = types[static_cast<int>(config.type)];
  const auto number = [&](const char* name, std::int64_t value) {
    if (value != 0) text += std::string(" ") + name + "=" + std::to_string(value);
  };
  const auto flag = [&](const char* name, bool value) {
    if (value) text += std::string(" ") + name;
  };
  text += std::string(" query=") + to_string(spec.query_dtype()) +
          " model=" + to_string(spec.model_dtype) + " output=" + to_string(spec.out_dtype());
  if (spec.has_cache()) {
    text += std::string(" cache=") + to_string(config.kv_cache_dtype) + " " +
            layouts[static_cast<int>(spec.layout)];
    number("block_size", config.block_size);
  }
  text += " heads=" + std::to_string(config.num_heads) + "/" + std::to_string(config.num_kv_heads);
  text += " head_size=" + std::to_string(config.head_size) + "/" +
          std::to_string(config.value_head_size());
  flag("full", config.type == AttentionType::kDecoder && !config.mask.causal);
  if (config.mask.window != WindowKind::kNone) {
    text += std::string(" window=") + windows[static_cast<int>(config.mask.window)];
    number("size", config.mask.window_size);
    number("lookback", config.mask.chunk_lookback);
  }
  text += std::string(" data=") + data[static_cast<int>(spec.data)];
  flag("soft_cap", config.score.soft_cap > 0);
  flag(config.score.alibi_sqrt ? "alibi_sqrt" : "alibi", spec.alibi);
  flag("sinks", spec.sinks);
  flag("causal_flags", spec.causal_flags);
  flag("ranges", spec.ranges);
  flag("clamp_ranges", config.mask.clamp_ranges);
  flag("visible_prefixes", spec.visible_prefixes);
  flag("kv_offset", spec.kv_offsets);
  flag("kv_stride", spec.kv_strides);
  flag("q_offset", spec.q_offsets);
  number("qq_bias", spec.qq_bias_size);
  flag("kv_start_loc", spec.kv_start_loc);
  number("shared", spec.shared_prefix_len);
  number("announced", spec.announced_prefix_len);
  number("leading_rows", spec.leading_rows);
  number("padded_rows", spec.padded_rows);
  number("counted_rows", spec.counted_rows);
  number("cut_rows", spec.cut_rows);
  number("padded_sequences", spec.padded_sequences);
  number("max_query_len", spec.max_query_len);
  number("wild_blocks", spec.wild_blocks);
  flag("block_scale", spec.block_scale);
  flag("batch_invariant", config.batch_invariant);
  flag("write", spec.write);
  number("threads", spec.threads);
  flag("replan", spec.replan);
  number("pool_blocks", spec.pool_blocks);
  number("sequences", static_cast<std::int64_t>(spec.sequences.size()));
  text += " [query_len/seq_len:";
  for (std::size_t s = 0; s < spec.sequences.size(); ++s) {
    if (s == 12) {
      text += " ...";
      break;
    }
    text += " " + std::to_string(spec.sequences[s].query_len) + "/" +
            std::to_string(spec.sequences[s].seq_len);
  }
  return text + "]";
}

}  // namespace quire::conformance
