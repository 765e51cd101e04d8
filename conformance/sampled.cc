#include "conformance/sampled.h"

#include <algorithm>
#include <cstring>

#include "conformance/expected.h"

namespace quire::conformance {
namespace {

// Multiply-adds of float64 that a case's samples may cost, and how many samples that may be.
constexpr double kOracleWork = 1e8;
constexpr int kMostSamples = 48;

// A bit pattern above this one, sign aside, is NaN.
template <class T>
bool any_above(const std::byte* bytes, std::int64_t count, T highest) {
  constexpr T kMagnitude = static_cast<T>(~(T{1} << (8 * sizeof(T) - 1)));
  bool any = false;
  for (std::int64_t i = 0; i < count; ++i) {
    T bits;
    std::memcpy(&bits, bytes + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    any |= static_cast<T>(bits & kMagnitude) > highest;
  }
  return any;
}

bool any_nan(DType dtype, const std::byte* bytes, std::int64_t count) {
  switch (dtype) {
    case DType::kFloat32: return any_above<std::uint32_t>(bytes, count, 0x7F800000U);
    case DType::kFloat16: return any_above<std::uint16_t>(bytes, count, 0x7C00U);
    case DType::kBFloat16: return any_above<std::uint16_t>(bytes, count, 0x7F80U);
    case DType::kFloat8E4M3: return any_above<std::uint8_t>(bytes, count, 0x7EU);
    default: return false;
  }
}

std::string place_of(std::int64_t row, std::int64_t head) {
  return "[" + std::to_string(row) + "][" + std::to_string(head) + "]";
}

std::string scan(const Case& c, const Actual& actual, const std::vector<bool>& written) {
  const AttentionConfig& config = c.spec.config;
  for (std::int64_t row = 0; row < c.spec.num_rows(); ++row) {
    if (!written[row]) continue;
    for (std::int64_t head = 0; head < config.num_heads; ++head) {
      const std::byte* values = &actual.output[output_offset(c, row, head)];
      if (any_nan(c.output.dtype, values, config.value_head_size())) {
        return "output" + place_of(row, head) + " was not written, or is NaN";
      }
      if (c.lse && any_nan(DType::kFloat32, &actual.lse[lse_offset(c, row, head)], 1)) {
        return "lse" + place_of(head, row) + " was not written, or is NaN";
      }
    }
    if (!c.output_block_scale) continue;
    const std::int64_t groups = c.output_block_scale.shape[1];
    const std::byte* scales = &actual.output_block_scale[row * groups * 4];
    if (any_nan(DType::kFloat32, scales, groups)) {
      return "output_block_scale[" + std::to_string(row) + "] was not written, or is NaN";
    }
  }
  return compare_untouched(c, actual, written);
}

// Rows where work is cut: ends, and edges of tiles.
std::int64_t draw_row(std::int64_t query_len, Rng* rng) {
  switch (rng->uniform(0, 4)) {
    case 0: return 0;
    case 1: return query_len - 1;
    case 2: {
      const std::int64_t tile = rng->pick<std::int64_t>({16, 32, 64, 128});
      const std::int64_t edge = rng->uniform(0, query_len / tile) * tile - rng->uniform(0, 1);
      return std::clamp<std::int64_t>(edge, 0, query_len - 1);
    }
    default: return rng->uniform(0, query_len - 1);
  }
}

}  // namespace

std::string check_sampled(const Case& c, const Actual& actual, Rng* rng) {
  const AttentionConfig& config = c.spec.config;
  const std::vector<bool> written = written_rows(c);
  std::string problem = scan(c, actual, written);
  if (!problem.empty()) return problem;
  std::vector<std::int64_t> sequences;  // that have rows
  for (std::int64_t s = 0; s < c.num_seqs(); ++s) {
    const auto first = static_cast<std::int64_t>(c.query_start_loc.get({s}));
    const auto end = static_cast<std::int64_t>(c.query_start_loc.get({s + 1}));
    if (first < end && written[first]) sequences.push_back(s);
  }
  if (sequences.empty()) return {};
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  double work = 0;
  for (int n = 0; n < kMostSamples && (n < 3 || work < kOracleWork); ++n) {
    const std::int64_t s =
        n % 8 == 0 ? sequences.back()
                   : sequences[rng->uniform(0, static_cast<std::int64_t>(sequences.size()) - 1)];
    const auto first = static_cast<std::int64_t>(c.query_start_loc.get({s}));
    const auto end = static_cast<std::int64_t>(c.query_start_loc.get({s + 1}));
    RowPlace place{s, draw_row(end - first, rng), 0, group};
    if (!written[first + place.i]) continue;  // cut off
    const std::int64_t kv_head = rng->uniform(0, config.num_kv_heads - 1);
    const double keys = c.spec.has_cache() ? c.seq_lens.get({s})
                        : c.kv_start_loc   ? c.kv_start_loc.get({s + 1}) - c.kv_start_loc.get({s})
                                           : static_cast<double>(end - first);
    const double head_work =
        (keys + 1) * static_cast<double>(config.head_size + config.value_head_size());
    // Of a group that costs too much, a few heads.
    const auto affordable = static_cast<std::int64_t>(kOracleWork / 4 / head_work);
    place.count = std::clamp<std::int64_t>(affordable, 1, group);
    place.first_head = kv_head * group + rng->uniform(0, group - place.count);
    work += head_work * static_cast<double>(place.count + 1);
    problem = compare_row(c, actual, place, literal_row(c, place));
    if (!problem.empty()) return problem;
  }
  return {};
}

}  // namespace quire::conformance
