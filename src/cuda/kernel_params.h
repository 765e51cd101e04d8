// What an attention kernel gets, and how it is made of a call.
#pragma once

#include <cstdint>

#include "cuda/plan/schedule.h"
#include "params.h"

namespace quire::cuda {

// What an attention kernel gets: the call, and what the host derives from it.
struct KernelParams : AttentionParams {
  ScheduleView schedule;
  float* block_output = nullptr;  // [num_tokens, num_heads, head_size_v] if block scales are wanted
  std::int32_t k_copy_bytes = 16;  // alignment of every row: 16, 8, 4, or less
  std::int32_t v_copy_bytes = 16;
  std::int64_t k_block_bytes = 0;  // strides in bytes
  std::int64_t k_slot_bytes = 0;
  std::int64_t v_block_bytes = 0;
  std::int64_t v_slot_bytes = 0;
  std::int64_t k_head_bytes = 0;
  std::int64_t v_head_bytes = 0;
  // Rows of whole 16-byte pieces, of any 16 aligned keys in one block.
  bool k_simple = false;
  bool v_simple = false;
  std::uint32_t block_limit = 0;     // num_blocks, in the 32 bits that block table entries have
  bool query_aligned = false;        // 16-byte aligned rows
  bool output_aligned = false;       // rows of 8 elements can be stored whole
  std::int32_t pipeline_stages = 0;  // Launch::pipeline_stages
  std::int32_t block_shift = -1;     // log2 of the block size, -1: not a power of two
  std::int32_t columns = 0;          // output columns of a pass; passes = heads / num_kv_heads
  std::int32_t passes = 1;
};

// All but the schedule, the output of block scales, and what belongs to one kernel.
KernelParams lower(const AttentionParams& params);

}  // namespace quire::cuda
