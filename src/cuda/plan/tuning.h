// Numbers of the plan that belong to no kernel. What belongs to one is in its TilePolicy.
#pragma once

#include <cstdint>

namespace quire::cuda {

// CTAs of an attention kernel; sizes the lists of work ranges and of arrivals.
inline constexpr int kMaxGrid = 1024;

// Finding prefixes by itself must save the reading of this many keys, or the launch that reads them
// for all costs more: at 4 KiB a key (8 kv heads of 128) they take 10 us.
inline constexpr std::int64_t kMinSavedKeys = 8192;

// Query tokens of a batch that may share a prefix; more stay plain. Two thousand decode: beyond
// them what they keep of a prefix would take much memory (34 MB here for 32 heads of 128) to little
// avail.
inline constexpr std::int64_t kMaxSharedTokens = 2048;

inline constexpr std::int32_t kMaxSharedPrefixes = 16;  // of a batch; what is more stays plain

// Work tiles are sorted by cost into this many classes where whole items are handed out.
inline constexpr std::int32_t kCostBuckets = 256;

}  // namespace quire::cuda
