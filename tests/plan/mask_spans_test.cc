// src/semantics/mask.h against the definition, key by key: what a row sees (exactly), what a tile
// must load (at least), which keys need no element mask (at most).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "conformance/random.h"
#include "params.h"

namespace quire::semantics {
namespace {

using conformance::Rng;

// Whether the query at p sees key j; docs/guide/semantics.md, step 3.
bool sees(const SequenceMask& mask, std::int64_t p, std::int64_t j) {
  const std::int64_t key = mask.kv_offset + j * mask.kv_stride;
  const auto chunk_of = [&](std::int64_t position) {
    std::int64_t chunk = position / mask.window_size;
    if (position % mask.window_size < 0) --chunk;
    return chunk;
  };
  bool window = true;
  if (mask.window == WindowKind::kLeft) window = p - key < mask.window_size;
  if (mask.window == WindowKind::kBoth) {
    window = p - key < mask.window_size && key - p < mask.window_size;
  }
  if (mask.window == WindowKind::kChunked) {
    window = chunk_of(p) - chunk_of(key) <= mask.chunk_lookback;
  }
  if (mask.visible_prefix > 0 && key < mask.visible_prefix) window = true;
  bool range = false;
  for (std::int32_t r = 0; r < mask.num_ranges; ++r) {
    const std::int64_t start = mask.ranges[2 * r];
    const std::int64_t end = mask.ranges[2 * r + 1];
    range |= start < end && start <= p && p <= end && start <= key && key <= end;
  }
  const bool base = !mask.causal || key <= p;
  const bool clamped = mask.clamp_ranges && mask.window != WindowKind::kNone;
  return clamped ? window && (base || range) : (base && window) || range;
}

struct RandomMask {
  SequenceMask mask;
  std::vector<std::int32_t> ranges;
  std::int64_t span = 0;  // positions from the first key to behind the last
};

RandomMask random_mask(Rng* rng) {
  RandomMask r;
  SequenceMask& mask = r.mask;
  mask.kv_len = rng->uniform(0, 40);
  mask.kv_offset = rng->pick<std::int32_t>({0, 0, 3, 100, -7});
  mask.kv_stride = rng->pick<std::int32_t>({1, 1, 1, 2, 3, 11});
  r.span = mask.kv_len * mask.kv_stride;
  mask.causal = rng->chance(0.7);
  mask.window = rng->pick({WindowKind::kNone, WindowKind::kBoth, WindowKind::kChunked});
  if (mask.causal && rng->chance(0.3)) mask.window = WindowKind::kLeft;
  mask.window_size = rng->uniform(1, rng->chance(0.5) ? 5 : r.span + 2);
  mask.chunk_lookback = rng->uniform(0, 3);
  mask.clamp_ranges = mask.window != WindowKind::kChunked && rng->chance(0.5);
  const auto position = [&] {
    return mask.kv_offset + static_cast<std::int32_t>(rng->uniform(-3, r.span + 3));
  };
  if (rng->chance(0.4)) mask.visible_prefix = position();
  const std::int64_t num_ranges = rng->chance(0.5) ? rng->uniform(1, 3) : 0;
  for (std::int64_t i = 0; i < 2 * num_ranges; ++i) {
    r.ranges.push_back(position());
  }
  mask.num_ranges = static_cast<std::int32_t>(num_ranges);
  return r;
}

std::string keys_of(const Spans& spans) {
  return "[" + std::to_string(spans.prefix.begin) + ", " + std::to_string(spans.prefix.end) +
         ") and [" + std::to_string(spans.main.begin) + ", " + std::to_string(spans.main.end) + ")";
}

// "" or what is wrong with spans as such.
std::string malformed(const SequenceMask& mask, const Spans& spans) {
  for (const Span span : {spans.prefix, spans.main}) {
    if (span.begin < 0 || span.end < span.begin || span.end > mask.kv_len) {
      return keys_of(spans) + " of " + std::to_string(mask.kv_len) + " keys";
    }
  }
  if (spans.prefix.begin != 0) return "the prefix begins at a key";
  const bool apart = spans.main.empty() || spans.prefix.end <= spans.main.begin;
  return apart ? "" : "the spans overlap";
}

TEST(MaskSpans, FollowTheDefinition) {
  for (std::uint64_t index = 0; index < 20'000; ++index) {
    Rng rng(33, index);
    RandomMask r = random_mask(&rng);
    SequenceMask& mask = r.mask;
    mask.ranges = r.ranges.data();
    const std::int64_t first = mask.kv_offset + rng.uniform(-5, r.span + 5);
    const std::int64_t last = first + rng.uniform(0, 9);
    const Spans all = union_spans(mask, first, last);
    const Spans common = common_spans(mask, first, last);
    ASSERT_EQ(malformed(mask, all), "") << index;
    ASSERT_EQ(malformed(mask, common), "") << index;
    for (std::int64_t p = first; p <= last; ++p) {
      const Spans row = row_spans(mask, p);
      ASSERT_EQ(malformed(mask, row), "") << index;
      for (std::int64_t j = 0; j < mask.kv_len; ++j) {
        const bool seen = sees(mask, p, j);
        ASSERT_EQ(row.contains(j), seen)
            << index << ": p " << p << ", key " << j << ", row sees " << keys_of(row);
        ASSERT_TRUE(all.contains(j) || !seen) << index << ": p " << p << ", key " << j;
        ASSERT_TRUE(seen || !common.contains(j)) << index << ": p " << p << ", key " << j;
      }
    }
  }
}

// The largest and smallest numbers that a batch and a layer can hold.
TEST(MaskSpans, StayInsideTheKeysWhateverTheNumbers) {
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  for (std::uint64_t index = 0; index < 20'000; ++index) {
    Rng rng(34, index);
    const auto wild = [&] {
      return rng.pick<std::int32_t>({kMin, kMin + 1, -1, 0, 1, 64, kMax - 1, kMax});
    };
    RandomMask r = random_mask(&rng);
    SequenceMask& mask = r.mask;
    for (std::int32_t& bound : r.ranges) bound = wild();
    mask.ranges = r.ranges.data();
    mask.kv_len = rng.pick<std::int64_t>({0, 1, 64, kMostKeys});
    mask.kv_offset = wild();
    mask.kv_stride = rng.pick<std::int32_t>({1, 2, kMax});
    mask.window_size = rng.pick<std::int64_t>({1, 2, kMax});
    mask.chunk_lookback = rng.pick<std::int64_t>({0, 1, kMax});
    mask.visible_prefix = wild();
    const std::int64_t first = wild();
    const std::int64_t last = std::max<std::int64_t>(first, wild());
    ASSERT_EQ(malformed(mask, row_spans(mask, first)), "") << index;
    ASSERT_EQ(malformed(mask, union_spans(mask, first, last)), "") << index;
    ASSERT_EQ(malformed(mask, common_spans(mask, first, last)), "") << index;
  }
}

// Offsets below 0 count as 0, decreasing ones as none, lengths end with the tensors.
TEST(MaskSpans, WildOffsetsAndPositionsAreClamped) {
  constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();
  LayerParams layer;
  layer.paged = false;
  const std::vector<std::int32_t> starts{kMin, 2, 19, 7, kMax};
  const std::vector<std::int32_t> q_offset{kMax, kMax, kMax, kMax};
  BatchParams batch;
  batch.num_seqs = 4;
  batch.num_tokens = 84;
  batch.query_start_loc = starts.data();
  const std::int64_t rows[] = {2, 17, 0, 77};
  const std::int64_t keys[] = {2, 17, 0, 93};
  for (std::int32_t s = 0; s < 4; ++s) {
    batch.q_offset = nullptr;
    const Sequence seq = sequence_at(layer, batch, 100, s);
    EXPECT_EQ(seq.query_len, rows[s]) << s;
    EXPECT_EQ(seq.mask.kv_len, keys[s]) << s;
    EXPECT_EQ(seq.first_kv_row, std::max(starts[s], 0)) << s;
    EXPECT_EQ(seq.position(seq.first_row), 0) << s;
    EXPECT_EQ(sequence_at(layer, batch, kMax, 3).mask.kv_len, kMostKeys);
    batch.q_offset = q_offset.data();
    const Sequence late = sequence_at(layer, batch, 100, s);
    EXPECT_LE(late.position(late.first_row + late.query_len), kMax) << s;
  }
}

}  // namespace
}  // namespace quire::semantics
