// Programmatic dependent launch (sm_90 and newer): a launch that allows it begins when all CTAs of
// the one before it in the stream have called start_dependents() or ended, not when that one is
// done.
#pragma once

namespace quire::cuda::ptx {

// Allows the next launch to begin. It sees what this one has written only after await_launch().
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the launch before this one is done and this thread sees all that it has written; at once
// where this launch did not begin before its end.
__device__ __forceinline__ void await_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace quire::cuda::ptx
