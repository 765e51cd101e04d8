// Masks as spans: which key positions a query position sees. Written once; the plan asks what a
// tile must load, the main loops ask which tiles need no element mask, and the element masks ask
// for one row. All three answers come from the same few lines.
#pragma once

#include <cstdint>

#include "quire/mask.h"
#include "semantics/host_device.h"

namespace quire::semantics {

// Half-open [begin, end) of key positions; empty if end <= begin.
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

// The mask of one sequence, everything resolved.
struct SequenceMask {
  std::int64_t kv_len = 0;  // keys that exist: seq_len, cut at what the block table can name
  bool causal = true;
  WindowKind window = WindowKind::kNone;
  std::int64_t window_size = 0;
  std::int64_t chunk_lookback = 0;
  std::int64_t visible_prefix = 0;
  const std::int32_t* ranges = nullptr;  // [num_ranges, 2] closed ranges
  std::int32_t num_ranges = 0;
};

namespace detail {

QUIRE_HOST_DEVICE std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// First visible key of the window at position p, ranges and prefix aside. Non-decreasing in p.
QUIRE_HOST_DEVICE std::int64_t window_begin(const SequenceMask& mask, std::int64_t p) {
  std::int64_t begin = 0;
  if (mask.window == WindowKind::kLeft || mask.window == WindowKind::kBoth) {
    begin = p - mask.window_size + 1;
  } else if (mask.window == WindowKind::kChunked) {
    begin = (floor_div(p, mask.window_size) - mask.chunk_lookback) * mask.window_size;
  }
  return max_of(begin, 0);
}

// End of the base mask at p. Non-decreasing in p.
QUIRE_HOST_DEVICE std::int64_t base_end(const SequenceMask& mask, std::int64_t p) {
  return mask.causal ? min_of(p + 1, mask.kv_len) : mask.kv_len;
}

QUIRE_HOST_DEVICE std::int64_t window_end(const SequenceMask& mask, std::int64_t p) {
  const std::int64_t end = base_end(mask, p);
  return mask.window == WindowKind::kBoth ? min_of(end, p + mask.window_size) : end;
}

QUIRE_HOST_DEVICE std::int64_t prefix_end(const SequenceMask& mask, std::int64_t p) {
  if (mask.visible_prefix <= 0) return 0;
  return max_of(min_of(mask.visible_prefix, base_end(mask, p)), 0);
}

// Widens `span` by every bidirectional range that meets [first_p, last_p]. For one position the
// result is exact: window and range both hold p itself (or both end at kv_len), so their union
// is an interval.
QUIRE_HOST_DEVICE Span widen_by_ranges(const SequenceMask& mask, Span span, std::int64_t first_p,
                                       std::int64_t last_p) {
  for (std::int32_t r = 0; r < mask.num_ranges; ++r) {
    const std::int32_t* range_bounds = mask.ranges + std::int64_t{2} * r;
    const std::int64_t start = range_bounds[0];
    const std::int64_t last = range_bounds[1];
    if (start >= last || start > last_p || last < first_p) continue;
    const Span range{max_of(start, 0), min_of(last + 1, mask.kv_len)};
    if (range.empty()) continue;
    span =
        span.empty() ? range : Span{min_of(span.begin, range.begin), max_of(span.end, range.end)};
  }
  return span;
}

QUIRE_HOST_DEVICE Spans join(std::int64_t prefix_end, Span main) {
  if (main.empty()) return {{0, prefix_end}, {prefix_end, prefix_end}};
  if (prefix_end >= main.begin) return {{0, 0}, {0, max_of(prefix_end, main.end)}};
  return {{0, prefix_end}, main};
}

}  // namespace detail

// What the query at position p sees, exactly.
QUIRE_HOST_DEVICE Spans row_spans(const SequenceMask& mask, std::int64_t p) {
  Span main{detail::window_begin(mask, p), detail::window_end(mask, p)};
  main = detail::widen_by_ranges(mask, main, p, p);
  const std::int64_t prefix = detail::prefix_end(mask, p);
  if (prefix > 0) return detail::join(prefix, main);
  return {{0, 0}, main};
}

// A superset of what the positions [first_p, last_p] see together: what a tile must load.
QUIRE_HOST_DEVICE Spans union_spans(const SequenceMask& mask, std::int64_t first_p,
                                    std::int64_t last_p) {
  Span main{detail::window_begin(mask, first_p), detail::window_end(mask, last_p)};
  main = detail::widen_by_ranges(mask, main, first_p, last_p);
  const std::int64_t prefix = detail::prefix_end(mask, last_p);
  if (prefix > 0) return detail::join(prefix, main);
  return {{0, 0}, main};
}

// A subset of what every position in [first_p, last_p] sees: keys that need no element mask.
QUIRE_HOST_DEVICE Spans common_spans(const SequenceMask& mask, std::int64_t first_p,
                                     std::int64_t last_p) {
  const Span main{detail::window_begin(mask, last_p), detail::window_end(mask, first_p)};
  const std::int64_t prefix = detail::prefix_end(mask, first_p);
  if (prefix > 0) return detail::join(prefix, main);
  return {{0, 0}, main};
}

QUIRE_HOST_DEVICE Span clip(Span span, std::int64_t begin, std::int64_t end) {
  return {max_of(span.begin, begin), min_of(span.end, end)};
}

// The part of a visible set inside [begin, end).
QUIRE_HOST_DEVICE Spans clip(Spans spans, std::int64_t begin, std::int64_t end) {
  return {clip(spans.prefix, begin, end), clip(spans.main, begin, end)};
}

}  // namespace quire::semantics
