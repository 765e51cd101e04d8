// 8-bit elements of caches to 16-bit operands, exactly.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/mma.cuh"

namespace quire::cuda::ptx {

// Two bytes of an 8-bit type -> fp16 pair, exact.
struct E4M3 {
  static __device__ __forceinline__ __half2 widen(std::uint32_t two) {
#if __CUDA_ARCH__ >= 890
    std::uint32_t bits;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(bits) : "h"(static_cast<std::uint16_t>(two)));
    return *reinterpret_cast<const __half2*>(&bits);
#else
    // The exponent's bias moves from 7 to 15 by a multiplication, which also normalises subnormals.
    const std::uint32_t pair = (two & 0xFFU) | ((two & 0xFF00U) << 8);
    const std::uint32_t bits = ((pair & 0x00800080U) << 8) | ((pair & 0x007F007FU) << 7);
    __half2 value =
        __hmul2(*reinterpret_cast<const __half2*>(&bits), __floats2half2_rn(256.0F, 256.0F));
    // 0x7F is NaN, which 480 would stand for.
    if ((two & 0x7FU) == 0x7FU) value.x = __ushort_as_half(0x7FFF);
    if ((two & 0x7F00U) == 0x7F00U) value.y = __ushort_as_half(0x7FFF);
    return value;
#endif
  }
};

struct E5M2 {
  static __device__ __forceinline__ __half2 widen(std::uint32_t two) {
    const std::uint32_t bits = ((two & 0xFFU) << 8) | ((two & 0xFF00U) << 16);
    return *reinterpret_cast<const __half2*>(&bits);
  }
};

struct Int8 {
  static __device__ __forceinline__ __half2 widen(std::uint32_t two) {
    // 1024 + 128 + x is an fp16 number whose last ten bits are x + 128.
    const std::uint32_t pair = ((two & 0xFFU) | ((two & 0xFF00U) << 8)) ^ 0x00800080U;
    const std::uint32_t bits = pair | 0x64006400U;
    return __hsub2(*reinterpret_cast<const __half2*>(&bits), __floats2half2_rn(1152.0F, 1152.0F));
  }
};

// Sixteen stored bytes -> two 16-byte pieces of `Type`, multiplied by `scale` if `scaled`.
template <class Type, class Stored>
__device__ __forceinline__ void widen_piece(const uint4& bytes, bool scaled, float scale,
                                            std::uint32_t (&out)[8]) {
  const std::uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const __half2 halves = Stored::widen((words[i / 2] >> (i % 2 * 16)) & 0xFFFFU);
    if constexpr (std::is_same_v<Type, Half>) {
      if (!scaled) {
        out[i] = *reinterpret_cast<const std::uint32_t*>(&halves);
        continue;
      }
    }
    float2 x = __half22float2(halves);
    if constexpr (std::is_same_v<Type, Half>) {
      x.x *= scale;
      x.y *= scale;
    }
    out[i] = Type::pack(x.x, x.y);
  }
}

}  // namespace quire::cuda::ptx
