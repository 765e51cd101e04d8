// Copies of boxes of a tensor by the copy engine (sm_90). What lies outside the tensor reads as
// zeros. Wgmma and the copy engine see shared memory through a proxy of their own: what ordinary
// stores wrote, they see after fence_async_proxy() of the writing thread and a barrier.
#pragma once

#include <cstdint>

#include "cuda/ptx/tensor_map.h"

namespace quire::cuda::ptx {

// L2 policies of loads: for what is read once, and for what other CTAs may read again.
inline constexpr std::uint64_t kEvictFirst = 0x12F0000000000000U;
inline constexpr std::uint64_t kEvictNormal = 0x1000000000000000U;

// One thread: the box at these coordinates (innermost first) to shared memory; its bytes arrive at
// `barrier`.
__device__ __forceinline__ void load_box(std::uint32_t to, const TensorMap* map,
                                         std::uint32_t barrier, int c0, int c1, int c2, int c3,
                                         int c4, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void load_box(std::uint32_t to, const TensorMap* map,
                                         std::uint32_t barrier, int c0, int c1, int c2,
                                         std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

// One thread: a box from shared memory to these coordinates. What lies outside the tensor is not
// written. A thread's stores go in groups.
__device__ __forceinline__ void store_box(const TensorMap* map, int c0, int c1, int c2,
                                          std::uint32_t from, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], "
      "[%1], %5;" ::"l"(map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until shared memory has been read by all but at most `kPending` of this thread's newest groups.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace quire::cuda::ptx
