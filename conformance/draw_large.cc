// Draws the specs of large cases: geometries of models that people serve, batches that fill the
// device, contexts to 100,000 keys, within budgets of work and memory that keep a case to some
// tenths of a second of one core.
#include <algorithm>
#include <cmath>

#include "conformance/campaign.h"
#include "conformance/case_parts.h"

namespace quire::conformance {
namespace {

struct Budget {
  double work;                 // multiply-adds
  std::int64_t pool_bytes;     // of K and V
  std::int64_t row_elements;   // of query and output
  std::int64_t table_entries;  // of the block table
  std::int64_t most_sequences;
  double longest;
};

bool is_slow(const AttentionBackend& backend) {
  return backend.instruction_set() == "SCALAR" || std::string(backend.name()) == "reference";
}

Budget draw_budget(const CampaignCase& which, const AttentionBackend& backend, Rng* rng) {
  const bool gpu = backend.device_type() == DeviceType::kCuda;
  if (which.size == Size::kSmall) return {4e6, 256 << 10, 100'000, 4'000, 40, 4000};
  // Most are of medium size; a few are as large as it gets.
  const bool big = rng->chance(0.04);
  const double part = 0.1 + 0.9 * rng->unit();
  if (gpu) {
    return big ? Budget{part * 2e11, 96 << 20, 24'000'000, 3'000'000, 2000, 100'000}
               : Budget{part * 1e10, 24 << 20, 5'000'000, 500'000, 2000, 100'000};
  }
  const double speed = is_slow(backend) ? 0.05 : 1;
  return big ? Budget{part * speed * 4e10, 96 << 20, 16'000'000, 2'000'000, 2000, 100'000}
             : Budget{part * speed * 8e9, 16 << 20, 4'000'000, 400'000, 2000, 100'000};
}

struct Geometry {
  std::int64_t num_heads, num_kv_heads, head_size, head_size_v;
};

void draw_geometry(CaseSpec* spec, Rng* rng) {
  AttentionConfig& config = spec->config;
  if (rng->chance(0.15)) {
    draw_head_sizes(spec, rng);
    draw_heads(spec, rng);
    return;
  }
  const Geometry g = rng->pick<Geometry>({
      {32, 8, 128, 128},  {32, 8, 128, 128},  {64, 8, 128, 128}, {28, 4, 128, 128},
      {16, 8, 256, 256},  {8, 4, 256, 256},   {64, 8, 64, 64},   {16, 1, 576, 512},
      {128, 1, 576, 512}, {32, 32, 128, 128}, {32, 32, 96, 96},  {32, 8, 80, 80},
      {8, 1, 128, 128},   {4, 1, 128, 128},   {24, 8, 64, 64},   {12, 12, 64, 64},
      {40, 8, 128, 128},  {16, 16, 72, 72},   {71, 1, 64, 64},   {16, 16, 192, 128},
  });
  config.num_heads = g.num_heads;
  config.num_kv_heads = g.num_kv_heads;
  config.head_size = g.head_size;
  if (g.head_size_v != g.head_size) config.head_size_v = g.head_size_v;
}

std::int64_t block_bytes(const CaseSpec& spec) {
  const AttentionConfig& config = spec.config;
  return config.block_size * config.num_kv_heads * (config.head_size + config.value_head_size()) *
         size_of(spec.cache_storage());
}

void draw_block_size(CaseSpec* spec, const Budget& budget, Rng* rng) {
  std::int64_t& size = spec->config.block_size;
  size = rng->pick<std::int64_t>({16, 16, 16, 16, 32, 64, 64, 128, 256, 1, 8, 17, 48});
  while (size > 1 && 32 * block_bytes(*spec) > budget.pool_bytes) size = (size + 1) / 2;
  spec->pool_blocks = std::clamp<std::int64_t>(budget.pool_bytes / block_bytes(*spec), 4, 100'000);
}

std::int64_t log_uniform(double low, double high, Rng* rng) {
  return std::llround(low * std::exp(rng->unit() * std::log(std::max(high / low, 1.0))));
}

enum class Mix { kDecode, kSpeculative, kPrefill, kChunked, kMixed };
enum class Lengths { kEqual, kUniform, kSkewed, kOneLong };

std::int64_t draw_query_len(Mix mix, const Budget& budget, Rng* rng) {
  if (mix == Mix::kMixed) {
    mix = rng->pick({Mix::kDecode, Mix::kDecode, Mix::kDecode, Mix::kSpeculative, Mix::kPrefill,
                     Mix::kChunked});
  }
  switch (mix) {
    case Mix::kDecode: return 1;
    case Mix::kSpeculative: return rng->uniform(2, 9);
    default: return log_uniform(4, std::min(budget.longest, 8000.0), rng);
  }
}

bool fits(const CaseSpec& spec, const Budget& budget) {
  const AttentionConfig& config = spec.config;
  std::int64_t rows = 0;
  std::int64_t keys = 0;
  std::int64_t longest = 0;
  for (const SequenceSpec& s : spec.sequences) {
    rows += s.query_len;
    keys += s.seq_len;
    longest = std::max(longest, s.seq_len);
  }
  const std::int64_t row = config.head_size + config.value_head_size();
  const bool keys_fit =
      spec.has_cache()
          ? longest / config.block_size * static_cast<std::int64_t>(spec.sequences.size()) <=
                budget.table_entries
          : keys * config.num_kv_heads * row * 2 <= budget.pool_bytes;
  return keys_fit && rows * config.num_heads * row <= 2 * budget.row_elements &&
         work_of(spec) <= budget.work;
}

void shrink(CaseSpec* spec, Rng* rng) {
  std::vector<SequenceSpec>& sequences = spec->sequences;
  if (sequences.size() > 1 && rng->chance(0.4)) {
    sequences.resize(std::max<std::size_t>(sequences.size() * 3 / 4, 1));
    return;
  }
  const bool shorter_queries = rng->chance(0.5);
  const bool own_keys = spec->config.type == AttentionType::kEncoderDecoder || spec->kv_start_loc;
  for (SequenceSpec& s : sequences) {
    if (shorter_queries && s.query_len > 9) {
      s.query_len = s.query_len * 3 / 4;
    } else if (!shorter_queries || s.seq_len > 64) {
      s.seq_len = std::max<std::int64_t>(s.seq_len * 3 / 4, 1);
    }
    if (!own_keys) s.query_len = std::min(s.query_len, s.seq_len);
    if (!own_keys && !spec->has_cache()) s.seq_len = s.query_len;
  }
}

void draw_large_batch(CaseSpec* spec, const Budget& budget, Rng* rng) {
  const Mix mix = rng->pick({Mix::kDecode, Mix::kDecode, Mix::kDecode, Mix::kSpeculative,
                             Mix::kPrefill, Mix::kChunked, Mix::kMixed, Mix::kMixed, Mix::kMixed});
  const Lengths lengths = rng->pick(
      {Lengths::kEqual, Lengths::kUniform, Lengths::kSkewed, Lengths::kSkewed, Lengths::kOneLong});
  const auto most = static_cast<double>(budget.most_sequences);
  const std::int64_t count = log_uniform(1, rng->chance(0.3) ? most : most / 5, rng);
  const std::int64_t longest = log_uniform(16, budget.longest, rng);
  const bool own_keys = spec->config.type == AttentionType::kEncoderDecoder || spec->kv_start_loc;
  for (std::int64_t i = 0; i < count; ++i) {
    SequenceSpec s;
    s.query_len = draw_query_len(mix, budget, rng);
    switch (lengths) {
      case Lengths::kEqual: s.seq_len = longest; break;
      case Lengths::kUniform: s.seq_len = rng->uniform(1, longest); break;
      case Lengths::kSkewed: s.seq_len = log_uniform(1, static_cast<double>(longest), rng); break;
      case Lengths::kOneLong: s.seq_len = i == 0 ? longest : rng->uniform(1, 200); break;
    }
    const bool fresh = mix == Mix::kPrefill || rng->chance(0.02);
    if (!own_keys) s.query_len = fresh ? s.seq_len : std::min(s.query_len, s.seq_len);
    if (!own_keys && !spec->has_cache()) s.seq_len = s.query_len;
    if (rng->chance(0.02)) s = {};
    if (rng->chance(0.01)) s.query_len = 0;
    if (!own_keys && !spec->has_cache()) s.seq_len = s.query_len;
    spec->sequences.push_back(s);
  }
  rng->shuffle(&spec->sequences);
  for (int i = 0; i < 400 && !fits(*spec, budget); ++i) shrink(spec, rng);
}

// Windows of the models, and more of the lengths that large batches have.
void widen_window(CaseSpec* spec, Rng* rng) {
  Mask& mask = spec->config.mask;
  if (mask.window == WindowKind::kNone) return;
  if (rng->chance(0.5)) mask.window_size = rng->pick<std::int64_t>({128, 512, 1024, 4096, 8192});
}

void fit_mode(CaseSpec* spec, Mode mode, Rng* rng) {
  AttentionConfig& config = spec->config;
  switch (mode) {
    case Mode::kInvariant:
      config.batch_invariant = true;
      spec->cut_rows = 0;
      break;
    case Mode::kCascade: {
      if (rng->chance(0.8)) config.mask.window = WindowKind::kNone;
      config.batch_invariant = rng->chance(0.05);
      config.auto_cascade = !rng->chance(0.2);
      std::int64_t shortest = std::int64_t{1} << 40U;
      for (SequenceSpec& s : spec->sequences) {
        if (s.seq_len > 2 * config.block_size) shortest = std::min(shortest, s.seq_len);
      }
      if (shortest == std::int64_t{1} << 40U) break;
      const std::int64_t blocks = shortest / config.block_size;
      spec->shared_prefix_len = rng->uniform(blocks / 2, blocks) * config.block_size;
      spec->announced_prefix_len = rng->chance(0.6) ? spec->shared_prefix_len : 0;
      break;
    }
    case Mode::kGraph:
    case Mode::kStreams: spec->cut_rows = 0; break;
    case Mode::kWild:
      spec->poison = false;
      spec->write = false;
      // At wild positions it is past what float32 tells apart.
      spec->alibi = config.score.alibi_sqrt = false;
      break;
    default: break;
  }
}

}  // namespace

CaseSpec campaign_spec(const CampaignCase& which, const AttentionBackend& backend) {
  if (which.mode == Mode::kPlain && which.size == Size::kSmall) {
    return random_spec(which.seed, which.index);
  }
  Rng rng(which.seed ^ (static_cast<std::uint64_t>(which.mode) * 2 + 77),
          static_cast<std::uint64_t>(which.index));
  CaseSpec spec;
  spec.seed = which.seed;
  spec.index = which.index;
  const bool decoder_only =
      which.mode == Mode::kCascade || which.mode == Mode::kWrite || which.mode == Mode::kGraph;
  if (!decoder_only) draw_type(&spec, &rng);
  draw_dtypes(&spec, &rng);
  Budget budget = draw_budget(which, backend, &rng);
  if (spec.query_dtype() == DType::kFloat32) budget.work /= 4;
  draw_geometry(&spec, &rng);
  draw_block_size(&spec, budget, &rng);
  draw_large_batch(&spec, budget, &rng);
  draw_features(&spec, &rng);
  widen_window(&spec, &rng);
  if (spec.data == Data::kExtreme) {  // too few distinct scores to tell keys apart
    spec.data = Data::kNormal;
    spec.config.score.softmax_scale = 0;
  }
  if (spec.config.num_heads == 64 && spec.config.head_size == 64 && rng.chance(0.5)) {
    spec.sinks = true;  // gpt-oss
    spec.config.mask.window = WindowKind::kLeft;
    spec.config.mask.window_size = 128;
  }
  if (rng.chance(0.1)) spec.sinks = true;
  spec.wild_blocks = 0;
  fit_mode(&spec, which.mode, &rng);
  return spec;
}

}  // namespace quire::conformance
