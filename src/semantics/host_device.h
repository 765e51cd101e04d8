// Functions here are compiled by g++ for the CPU and by nvcc for both sides.
#pragma once

#if defined(__CUDACC__)
#define QUIRE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUIRE_HOST_DEVICE inline
#endif
