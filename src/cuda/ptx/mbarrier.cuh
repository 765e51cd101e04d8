// Barriers in shared memory that count arrivals of threads and bytes of copies (sm_90). A phase
// ends when all arrivals and all announced bytes are there; waiting is for the end of the phase
// with the given parity, which is 0, 1, 0, ... from the first phase on. A fresh barrier counts as
// just past a phase of parity 1: a producer that waits for "empty" with parity 1 passes at once.
#pragma once

#include <cstdint>

namespace quire::cuda::ptx {

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, before another thread or a copy uses the barriers; a CTA barrier comes next.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives when this thread's copies so far (cp_async.cuh) are there.
__device__ __forceinline__ void mbarrier_arrive_after_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Where a ring of buffers stands: which buffer is next, and the parity of its phase.
struct RingPosition {
  std::uint32_t index = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance(std::uint32_t size) {
    if (++index == size) {
      index = 0;
      parity ^= 1U;
    }
  }
};

// The same in one register, and for several rings that move together: how many buffers have passed.
// Rings of a power of two buffers.
class RingCounter {
 public:
  template <int kSize>
  __device__ __forceinline__ std::uint32_t index() const {
    static_assert((kSize & (kSize - 1)) == 0);
    return count_ % kSize;
  }
  template <int kSize>
  __device__ __forceinline__ std::uint32_t parity() const {
    return count_ / kSize % 2;
  }
  __device__ __forceinline__ void advance() { ++count_; }
  __device__ __forceinline__ std::uint32_t count() const { return count_; }
  __device__ __forceinline__ bool is_first() const { return count_ == 0; }
  __device__ __forceinline__ RingCounter before() const {
    RingCounter at;
    at.count_ = count_ - 1;
    return at;
  }

 private:
  std::uint32_t count_ = 0;
};

}  // namespace quire::cuda::ptx
