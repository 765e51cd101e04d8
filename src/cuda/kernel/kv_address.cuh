// Where the rows of K and V are: through the block table, or straight in the key tensor.
#pragma once

#include <cstdint>

#include "cuda/kernel_params.h"
#include "semantics/kv_address.h"

namespace quire::cuda {

struct KvRow {
  std::int64_t block = -1;  // -1: not there, reads as zeros
  std::int64_t slot = 0;
};

// `key` is one that may be read.
__device__ __forceinline__ KvRow kv_row(const KernelParams& p, const WorkTile& tile,
                                        std::int32_t key) {
  if (!p.layer.paged) return {0, tile.first_kv_row + key};
  const auto block_size = static_cast<std::uint32_t>(p.layer.block_size);
  const std::uint32_t logical = static_cast<std::uint32_t>(key) / block_size;
  const std::int32_t* table = p.batch.block_table + tile.seq * p.batch.table_stride;
  return {semantics::physical_block(table, p.batch.table_width, logical, p.num_blocks),
          static_cast<std::uint32_t>(key) - logical * block_size};
}

__device__ __forceinline__ std::int64_t row_offset(const KvParams& kv, const KvRow& row,
                                                   std::int32_t head) {
  return semantics::cache_offset(kv.strides, row.block, row.slot, head);
}

__device__ __forceinline__ float row_scale(const KvParams& kv, const KvRow& row,
                                           std::int32_t head) {
  if (kv.token_scales == nullptr || row.block < 0) return 1.0F;
  return kv
      .token_scales[semantics::cache_offset(kv.token_scale_strides, row.block, row.slot, head)];
}

}  // namespace quire::cuda
