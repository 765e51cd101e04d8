// Warps with roles of their own (sm_90): registers that move between warpgroups, barriers among
// some of a CTA's threads.
#pragma once

#include <cstdint>

namespace quire::cuda::ptx {

// `x`, which all threads of the warp have alike, as something that the compiler knows to be alike:
// what follows from it goes to uniform registers, and branches on it split no warp. Descriptors of
// wgmma must come from there: from others each costs moves that the products wait for.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0U, x, 0); }

// Which warpgroup this is, the same in all its threads also for the compiler: branches on it are
// uniform, as wgmma needs.
__device__ __forceinline__ int warpgroup_index() {
  return uniform(static_cast<int>(threadIdx.x / 128));
}

// All threads of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barriers, 1 to 15 (0 is __syncthreads), among `threads` threads of the CTA, a multiple
// of 32.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts as arrived without waiting for the others.
__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Waits like sync_threads(); whether any of the threads came with `value`.
__device__ __forceinline__ bool any_of_threads(int barrier, int threads, bool value) {
  std::uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.s32 p, %1, 0;\n"
      "barrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<int>(value)), "r"(barrier), "r"(threads)
      : "memory");
  return any != 0;
}

}  // namespace quire::cuda::ptx
