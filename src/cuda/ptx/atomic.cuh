// Atomic operations with a memory order.
#pragma once

#include <cstdint>

namespace quire::cuda::ptx {

// Adds 1 and returns what was there before. What this thread and, behind a barrier, others wrote is
// visible to a thread that sees the new value; and the other way round.
__device__ __forceinline__ std::int32_t count_arrival(std::int32_t* counter) {
  std::int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

}  // namespace quire::cuda::ptx
