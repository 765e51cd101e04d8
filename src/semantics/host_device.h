// Functions here are compiled by g++ for the CPU and by nvcc for both sides.
#pragma once

#if defined(__CUDACC__)
#define QUIRE_HOST_DEVICE __host__ __device__ __forceinline__
// Only kernels run it: so it may call what is on the device only. Tests run it on the host.
#define QUIRE_DEVICE __device__ __forceinline__
#define QUIRE_UNROLL _Pragma("unroll")
#else
#define QUIRE_HOST_DEVICE inline
#define QUIRE_DEVICE inline
#define QUIRE_UNROLL
#endif
