// Threads that work together. Shared device code takes a Team in place of threadIdx, a number of
// threads and __syncthreads(): in a kernel whose warps have different roles, a barrier of the whole
// CTA inside an epilogue that some warps run would never be passed.
#pragma once

namespace quire::cuda {

// All threads of a CTA.
template <int kThreads>
struct CtaTeam {
  static constexpr int kSize = kThreads;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// One warp, of a kernel whose warps go their own ways.
struct WarpTeam {
  static constexpr int kSize = 32;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int warp() { return 0; }
  static __device__ __forceinline__ int lane() { return thread(); }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
};

}  // namespace quire::cuda
