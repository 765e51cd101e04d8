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

// Four bytes of a type -> fp16 pairs, exactly, as widen() does of two; E4M3 from sm_89 on.
__device__ __forceinline__ void widen_four(E4M3 /*type*/, std::uint32_t word, std::uint32_t* low,
                                           std::uint32_t* high) {
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(*low), "=r"(*high)
      : "r"(word));
}
__device__ __forceinline__ void widen_four(E5M2 /*type*/, std::uint32_t word, std::uint32_t* low,
                                           std::uint32_t* high) {
  *low = __byte_perm(word, 0, 0x1404);
  *high = __byte_perm(word, 0, 0x3424);
}
__device__ __forceinline__ void widen_four(Int8 /*type*/, std::uint32_t word, std::uint32_t* low,
                                           std::uint32_t* high) {
  const std::uint32_t shifted = word ^ 0x80808080U;
  const __half2 zero = __floats2half2_rn(1152.0F, 1152.0F);
  const auto minus_zero = [&](std::uint32_t bits) {
    const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&bits), zero);
    return *reinterpret_cast<const std::uint32_t*>(&x);
  };
  *low = minus_zero(__byte_perm(shifted, 0x64646464, 0x4140));
  *high = minus_zero(__byte_perm(shifted, 0x64646464, 0x4342));
}

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

// The same unscaled, of the types that widen_four() takes.
template <class Type, class Stored>
__device__ __forceinline__ void widen_sixteen(const uint4& bytes, std::uint32_t (&out)[8]) {
  if constexpr (std::is_same_v<Type, Half>) {
    widen_four(Stored(), bytes.x, &out[0], &out[1]);
    widen_four(Stored(), bytes.y, &out[2], &out[3]);
    widen_four(Stored(), bytes.z, &out[4], &out[5]);
    widen_four(Stored(), bytes.w, &out[6], &out[7]);
  } else {
    widen_piece<Type, Stored>(bytes, false, 1.0F, out);
  }
}

}  // namespace quire::cuda::ptx
