// Where the rows of a key are in the cache. All offsets are 64-bit: caches pass 2^31 elements.
#pragma once

#include <cstdint>

#include "semantics/host_device.h"

namespace quire::semantics {

// The physical block of a logical one, or -1 if it is unmapped: outside the table's width, or an
// entry outside [0, num_blocks). Unmapped blocks read as zeros and are never dereferenced.
QUIRE_HOST_DEVICE std::int64_t physical_block(const std::int32_t* table_row,
                                              std::int64_t table_width, std::int64_t logical_block,
                                              std::int64_t num_blocks) {
  if (logical_block < 0 || logical_block >= table_width) return -1;
  const std::int64_t block = table_row[logical_block];
  return block >= 0 && block < num_blocks ? block : -1;
}

// Strides in elements of a [num_blocks, block_size, num_kv_heads, head_size] cache.
struct CacheStrides {
  std::int64_t block = 0;
  std::int64_t slot = 0;
  std::int64_t head = 0;
};

QUIRE_HOST_DEVICE std::int64_t cache_offset(const CacheStrides& strides, std::int64_t block,
                                            std::int64_t slot, std::int64_t head) {
  return block * strides.block + slot * strides.slot + head * strides.head;
}

}  // namespace quire::semantics
