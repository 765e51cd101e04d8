#include "cuda/kernel_params.h"

#include <bit>

namespace quire::cuda {
namespace {

// The largest power of two up to 16 that divides every address of a row.
std::int32_t row_alignment(const KvParams& kv) {
  const auto element = static_cast<std::uint64_t>(size_of(kv.dtype));
  const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(kv.data) |
                             static_cast<std::uint64_t>(kv.strides.block) * element |
                             static_cast<std::uint64_t>(kv.strides.slot) * element |
                             static_cast<std::uint64_t>(kv.strides.head) * element | 16U;
  return 1 << std::countr_zero(bits);
}

bool is_aligned(const void* data, std::int64_t stride_a, std::int64_t stride_b, DType dtype,
                std::int64_t bytes) {
  return reinterpret_cast<std::intptr_t>(data) % bytes == 0 &&
         stride_a * size_of(dtype) % bytes == 0 && stride_b * size_of(dtype) % bytes == 0;
}

}  // namespace

KernelParams lower(const AttentionParams& params) {
  KernelParams p{params};
  const auto block_size = static_cast<std::uint32_t>(p.layer.block_size);
  p.block_shift = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1;
  p.k_block_bytes = p.k.strides.block * size_of(p.k.dtype);
  p.k_slot_bytes = p.k.strides.slot * size_of(p.k.dtype);
  p.v_block_bytes = p.v.strides.block * size_of(p.v.dtype);
  p.v_slot_bytes = p.v.strides.slot * size_of(p.v.dtype);
  p.k_head_bytes = p.k.strides.head * size_of(p.k.dtype);
  p.v_head_bytes = p.v.strides.head * size_of(p.v.dtype);
  p.k_copy_bytes = row_alignment(p.k);
  p.v_copy_bytes = row_alignment(p.v);
  const bool regular = !p.layer.paged || p.layer.block_size % 16 == 0;
  p.k_simple = regular && p.k_copy_bytes >= 16 && p.layer.head_size * size_of(p.k.dtype) % 16 == 0;
  p.v_simple =
      regular && p.v_copy_bytes >= 16 && p.layer.head_size_v * size_of(p.v.dtype) % 16 == 0;
  p.block_limit = static_cast<std::uint32_t>(p.num_blocks);
  p.query_aligned =
      size_of(p.layer.dtype) == 2 &&
      is_aligned(p.query, p.query_token_stride, p.query_head_stride, p.layer.dtype, 16);
  p.output_aligned = is_aligned(p.output, p.output_token_stride, p.output_head_stride,
                                p.output_dtype, size_of(p.output_dtype) == 1 ? 8 : 16);
  return p;
}

}  // namespace quire::cuda
