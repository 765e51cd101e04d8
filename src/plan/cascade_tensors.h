// The three cascade tensors of AttentionMetadata, for the host and for the device.
#pragma once

#include <cstdint>

#include "params.h"

namespace quire::planning {

// They lie in one array, each 16-byte aligned: cu_prefix_query_lens [2] at its start, and
inline constexpr std::int32_t kPrefixKvLens = 4;  // [1]
inline constexpr std::int32_t kSuffixKvLens = 8;  // [num_seqs]

inline std::int64_t num_cascade_entries(const BatchParams& batch) {
  return std::int64_t{kSuffixKvLens} + batch.num_seqs;
}

// `i` below num_cascade_entries().
QUIRE_HOST_DEVICE std::int32_t cascade_entry(const BatchParams& batch, std::int64_t i) {
  const auto prefix = static_cast<std::int32_t>(batch.common_prefix_len);
  if (i == 1) return static_cast<std::int32_t>(batch.num_tokens);
  if (i == kPrefixKvLens) return prefix;
  if (i < kSuffixKvLens) return 0;
  const std::int32_t seq_len = batch.seq_lens[i - kSuffixKvLens];
  return seq_len > prefix ? seq_len - prefix : 0;
}

}  // namespace quire::planning
