// Masks as spans: which keys a query position sees. The same few lines say what a tile must load
// (union_spans: plans), which keys need no element mask (common_spans: main loops) and what one row
// sees (row_spans: element masks).
#pragma once

#include <cstdint>

#include "quire/mask.h"
#include "semantics/host_device.h"

namespace quire::semantics {

// Half-open [begin, end), of keys or of positions; empty if end <= begin.
struct Span {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  QUIRE_HOST_DEVICE bool empty() const { return end <= begin; }
  QUIRE_HOST_DEVICE bool contains(std::int64_t j) const { return begin <= j && j < end; }
};

// A visible set: `prefix` starts at 0 and ends at or before `main` begins; either may be empty.
struct Spans {
  Span prefix;
  Span main;
  QUIRE_HOST_DEVICE bool contains(std::int64_t j) const {
    return prefix.contains(j) || main.contains(j);
  }
  QUIRE_HOST_DEVICE bool empty() const { return prefix.empty() && main.empty(); }
};

QUIRE_HOST_DEVICE std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
QUIRE_HOST_DEVICE std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Farther than any position; sums with positions stay inside 64 bits.
inline constexpr std::int64_t kFarPosition = std::int64_t{1} << 62;

// The mask of one sequence, with what the layer and the batch say about it. Windows, ranges and the
// visible prefix are in positions; spans of visible keys are in indices of keys in the cache.
struct SequenceMask {
  std::int64_t kv_len = 0;     // keys that exist: seq_len, cut at what the block table can name
  std::int32_t kv_offset = 0;  // key j sits at position kv_offset + j * kv_stride
  std::int32_t kv_stride = 1;
  bool causal = true;
  bool clamp_ranges = false;
  WindowKind window = WindowKind::kNone;  // kLeft only with causal: else it is kBoth here
  std::int64_t window_size = 0;
  std::int64_t chunk_lookback = 0;
  std::int32_t visible_prefix = 0;       // keys at positions before it are not windowed; <= 0: none
  const std::int32_t* ranges = nullptr;  // [num_ranges, 2] closed ranges
  std::int32_t num_ranges = 0;

  QUIRE_HOST_DEVICE std::int64_t position(std::int64_t key) const {
    return kv_offset + key * kv_stride;
  }
};

namespace detail {

// Of a position, in 32 bits: a division of 64 bits is a call on a GPU, and kernels set registers
// aside around calls.
QUIRE_HOST_DEVICE std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  if (b > 0x7FFFFFFF) return a >= 0 ? 0 : -1;
  const auto divisor = static_cast<std::uint32_t>(b);
  if (a >= 0) return static_cast<std::uint32_t>(a) / divisor;
  return -1 - std::int64_t{static_cast<std::uint32_t>(-(a + 1)) / divisor};
}

// The window of position p, in positions, without base mask, ranges and prefix. Neither end
// decreases in p.
QUIRE_HOST_DEVICE std::int64_t window_begin(const SequenceMask& mask, std::int64_t p) {
  if (mask.window == WindowKind::kNone) return -kFarPosition;
  if (mask.window != WindowKind::kChunked) return p - mask.window_size + 1;
  return (floor_div(p, mask.window_size) - mask.chunk_lookback) * mask.window_size;
}
QUIRE_HOST_DEVICE std::int64_t window_end(const SequenceMask& mask, std::int64_t p) {
  return mask.window == WindowKind::kBoth ? p + mask.window_size : kFarPosition;
}

// End of the base mask at p. Does not decrease in p.
QUIRE_HOST_DEVICE std::int64_t base_end(const SequenceMask& mask, std::int64_t p) {
  return mask.causal ? p + 1 : kFarPosition;
}

// The hull of those ranges that meet [first_p, last_p], in positions; empty if none does.
QUIRE_HOST_DEVICE Span hull_of_ranges(const SequenceMask& mask, std::int64_t first_p,
                                      std::int64_t last_p) {
  Span hull;
  for (std::int32_t r = 0; r < mask.num_ranges; ++r) {
    const std::int32_t* range_bounds = mask.ranges + std::int64_t{2} * r;
    const std::int64_t start = range_bounds[0];
    const std::int64_t last = range_bounds[1];
    if (start >= last || start > last_p || last < first_p) continue;
    hull = hull.empty() ? Span{start, last + 1}
                        : Span{min_of(hull.begin, start), max_of(hull.end, last + 1)};
  }
  return hull;
}

// How many keys are at positions before `position`; also the index of the first key that is not.
QUIRE_HOST_DEVICE std::int64_t keys_before(const SequenceMask& mask, std::int64_t position) {
  std::int64_t count = position - mask.kv_offset;
  if (mask.kv_stride != 1 && count > 0) {
    // Divided in 32 bits: keys lie within 2^31 positions of each other.
    const auto distance = static_cast<std::uint32_t>(min_of(count - 1, 0xFFFFFFFF));
    count = std::int64_t{distance / static_cast<std::uint32_t>(mask.kv_stride)} + 1;
  }
  return min_of(max_of(count, 0), mask.kv_len);
}

// The keys at the positions of `main` and at those before `prefix_end`: spans inside [0, kv_len].
QUIRE_HOST_DEVICE Spans keys_at(const SequenceMask& mask, std::int64_t prefix_end, Span main) {
  const std::int64_t begin = keys_before(mask, main.begin);
  const std::int64_t end = max_of(keys_before(mask, main.end), begin);
  if (mask.visible_prefix <= 0) return {{0, 0}, {begin, end}};
  const std::int64_t prefix = keys_before(mask, prefix_end);
  if (begin == end) return {{0, prefix}, {prefix, prefix}};
  if (prefix >= begin) return {{0, 0}, {0, max_of(prefix, end)}};
  return {{0, prefix}, {begin, end}};
}

}  // namespace detail

// A superset of what the positions [first_p, last_p] see together: what a tile must load.
//
// Exact for one position p: its window, cut by the base mask, contains p, and so does each of its
// ranges, so their union is an interval of positions. (With clamp_ranges, base mask and ranges end
// together, and window and prefix are cut at that end.) Later keys have larger positions, so an
// interval of positions is an interval of keys. The keys that the visible prefix adds start at key
// 0.
QUIRE_HOST_DEVICE Spans union_spans(const SequenceMask& mask, std::int64_t first_p,
                                    std::int64_t last_p) {
  const Span window{detail::window_begin(mask, first_p), detail::window_end(mask, last_p)};
  std::int64_t base_end = detail::base_end(mask, last_p);
  const Span ranges = detail::hull_of_ranges(mask, first_p, last_p);
  if (mask.clamp_ranges && !ranges.empty()) base_end = max_of(base_end, ranges.end);
  Span main{window.begin, min_of(window.end, base_end)};
  if (!mask.clamp_ranges && !ranges.empty()) {
    main = {min_of(main.begin, ranges.begin), max_of(main.end, ranges.end)};
  }
  return detail::keys_at(mask, min_of(mask.visible_prefix, base_end), main);
}

// What the query at position p sees, exactly.
QUIRE_HOST_DEVICE Spans row_spans(const SequenceMask& mask, std::int64_t p) {
  return union_spans(mask, p, p);
}

// A subset of what every position in [first_p, last_p] sees: keys that need no element mask.
QUIRE_HOST_DEVICE Spans common_spans(const SequenceMask& mask, std::int64_t first_p,
                                     std::int64_t last_p) {
  const std::int64_t base_end = detail::base_end(mask, first_p);
  return detail::keys_at(
      mask, min_of(mask.visible_prefix, base_end),
      {detail::window_begin(mask, last_p), min_of(detail::window_end(mask, first_p), base_end)});
}

QUIRE_HOST_DEVICE Span clip(Span span, std::int64_t begin, std::int64_t end) {
  return {max_of(span.begin, begin), min_of(span.end, end)};
}

// The part of a visible set inside [begin, end).
QUIRE_HOST_DEVICE Spans clip(Spans spans, std::int64_t begin, std::int64_t end) {
  return {clip(spans.prefix, begin, end), clip(spans.main, begin, end)};
}

}  // namespace quire::semantics
