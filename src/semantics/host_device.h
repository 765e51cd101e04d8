// How functions are marked that g++ compiles for the CPU and nvcc for both CPU and GPU.
#pragma once

#if defined(__CUDACC__)
#define QUIRE_HOST_DEVICE __host__ __device__ __forceinline__
// For functions that only kernels call: nvcc compiles them for the device only, so they may call
// device functions. g++ compiles them for the tests.
#define QUIRE_DEVICE __device__ __forceinline__
#define QUIRE_UNROLL _Pragma("unroll")
#else
#define QUIRE_HOST_DEVICE inline
#define QUIRE_DEVICE inline
#define QUIRE_UNROLL
#endif
