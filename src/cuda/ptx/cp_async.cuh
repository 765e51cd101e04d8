// Asynchronous copies from global to shared memory, 4 to 16 bytes a thread (sm_80).
#pragma once

#include <cstdint>

namespace quire::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `valid` bytes (0 to kKv8) from global to shared memory and fills up with zeros. With 0
// nothing is read.
template <int kKv8>
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, int valid) {
  static_assert(kKv8 == 4 || kKv8 == 8 || kKv8 == 16);
  if constexpr (kKv8 == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kKv8),
                 "r"(valid)
                 : "memory");
  }
}

// Copies all of kKv8: without a size to check it takes a third of the instructions.
template <int kKv8>
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from) {
  static_assert(kKv8 == 16);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace quire::cuda::ptx
