// Pieces of rows of K and V in registers: loaded, converted, stored.
//
// A piece is as many elements as fill 16 bytes in the wider of the two types, so that lanes side by
// side read and write memory side by side. Converted elements are those of semantics/quant.h, but
// for the sign and payload of NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "semantics/quant.h"

namespace quire::cuda {

// 4, 8 or 16 bytes.
template <int kCount>
struct Words {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  std::uint32_t word[kCount];

  // Past the L1: a cache write reads everything once.
  __device__ __forceinline__ void load(const char* from) {
    if constexpr (kCount == 4) {
      asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
          : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
          : "l"(from));
    } else if constexpr (kCount == 2) {
      asm("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
          : "=r"(word[0]), "=r"(word[1])
          : "l"(from));
    } else {
      asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(word[0]) : "l"(from));
    }
  }

  // `aligned`: to all of its bytes, else to 4.
  __device__ __forceinline__ void store(char* to, bool aligned) const {
    if (!aligned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) reinterpret_cast<std::uint32_t*>(to)[i] = word[i];
    } else if constexpr (kCount == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    } else if constexpr (kCount == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
      *reinterpret_cast<std::uint32_t*>(to) = word[0];
    }
  }
};

template <DType kFrom, DType kTo>
struct Piece {
  static constexpr int kElements =
      16 / static_cast<int>(size_of(kFrom) > size_of(kTo) ? size_of(kFrom) : size_of(kTo));
  static constexpr int kFromBytes = kElements * static_cast<int>(size_of(kFrom));
  static constexpr int kToBytes = kElements * static_cast<int>(size_of(kTo));
  using From = Words<kFromBytes / 4>;
  using To = Words<kToBytes / 4>;
};

template <DType kFrom, int kWords, int kElements>
__device__ __forceinline__ void unpack(const Words<kWords>& piece, float (&x)[kElements]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const std::uint32_t word = piece.word[i];
    if constexpr (kFrom == DType::kFloat32) {
      x[i] = __uint_as_float(word);
    } else if constexpr (kFrom == DType::kBFloat16) {
      x[2 * i] = __uint_as_float(word << 16);
      x[2 * i + 1] = __uint_as_float(word & 0xFFFF0000U);
    } else {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&word));
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

// Two codes; compute capability 8.9 and up has an instruction for it.
template <DType kTo>
__device__ __forceinline__ std::uint32_t two_fp8(float low, float high) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t codes;
  if constexpr (kTo == DType::kFloat8E4M3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  }
  return codes;
#else
  if constexpr (kTo == DType::kFloat8E4M3) {
    return semantics::float_to_e4m3(low) | std::uint32_t{semantics::float_to_e4m3(high)} << 8;
  } else {
    return semantics::float_to_e5m2(low) | std::uint32_t{semantics::float_to_e5m2(high)} << 8;
  }
#endif
}

// Of finite numbers that round to -127 ... 127: the last byte of x + 1.5 2^23 is x rounded. A
// conversion to int takes four times as long as an addition, and NaN and the ends of the range have
// to be looked for.
__device__ __forceinline__ std::uint32_t four_int8(float a, float b, float c, float d) {
  constexpr float kShift = 12582912.0F;
  const auto two = [](float low, float high) {
    return __byte_perm(__float_as_uint(__fadd_rn(low, kShift)),
                       __float_as_uint(__fadd_rn(high, kShift)), 0x0040);
  };
  return __byte_perm(two(a, b), two(c, d), 0x5410);
}

template <DType kTo, int kElements, int kWords>
__device__ __forceinline__ void pack(const float (&x)[kElements], Words<kWords>* piece) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    std::uint32_t& word = piece->word[i];
    if constexpr (kTo == DType::kFloat32) {
      word = __float_as_uint(x[i]);
    } else if constexpr (kTo == DType::kBFloat16) {
      word = semantics::float_to_bf16(x[2 * i]) |
             std::uint32_t{semantics::float_to_bf16(x[2 * i + 1])} << 16;
    } else if constexpr (kTo == DType::kFloat16) {
      word = semantics::float_to_fp16(x[2 * i]) |
             std::uint32_t{semantics::float_to_fp16(x[2 * i + 1])} << 16;
    } else if constexpr (kTo == DType::kInt8) {
      word = four_int8(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    } else {
      word = two_fp8<kTo>(x[4 * i], x[4 * i + 1]) | two_fp8<kTo>(x[4 * i + 2], x[4 * i + 3]) << 16;
    }
  }
}

// The largest magnitude of a row, NaN left out. 16-bit types take it of both halves of a word at
// once and need not be unpacked for it.
template <DType kFrom>
class LargestMagnitude {
 public:
  template <int kWords>
  __device__ __forceinline__ void add(const Words<kWords>& piece) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kFrom == DType::kFloat32) {
        word_ =
            __float_as_uint(fmaxf(__uint_as_float(word_), fabsf(__uint_as_float(piece.word[i]))));
      } else if constexpr (kFrom == DType::kBFloat16) {
        take<__nv_bfloat162>(piece.word[i]);
      } else {
        take<__half2>(piece.word[i]);
      }
    }
  }
  __device__ __forceinline__ float value() const {
    float x[4 / size_of(kFrom)];
    unpack<kFrom>(Words<1>{{word_}}, x);
    if constexpr (kFrom == DType::kFloat32) {
      return x[0];
    } else {
      return fmaxf(x[0], x[1]);
    }
  }

 private:
  template <class Two>
  __device__ __forceinline__ void take(std::uint32_t word) {
    const Two largest = __hmax2(*reinterpret_cast<const Two*>(&word_),
                                __habs2(*reinterpret_cast<const Two*>(&word)));
    word_ = *reinterpret_cast<const std::uint32_t*>(&largest);
  }

  std::uint32_t word_ = 0;
};

// False for some finite numbers too, if their sum is not.
template <int kElements>
__device__ __forceinline__ bool all_finite(const float (&x)[kElements]) {
  float sums[kElements / 2];
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) sums[i] = x[2 * i] + x[2 * i + 1];
#pragma unroll
  for (int i = 1; i < kElements / 2; ++i) sums[0] += sums[i];
  return fabsf(sums[0]) < INFINITY;
}

// x / scale for many x and one scale. IEEE division takes a reciprocal and a branch for each x,
// which cost as much as the copy; here the reciprocal is taken once.
class TensorScaleDivider {
 public:
  __device__ __forceinline__ explicit TensorScaleDivider(float scale)
      : scale_(scale), inverse_(1.0F / scale), usable_(scale >= 0x1p-60F && scale <= 0x1p60F) {}

  // Replaces x by quotients that have the fp8 codes of x / scale. False if nothing is promised of
  // them.
  template <int kElements>
  __device__ __forceinline__ bool divide(float (&x)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = quotient(x[i]);
    return usable_ && all_finite(x);
  }

 private:
  // q1 is within one unit in the last place and e2 exact, so q2 is x / scale rounded (Markstein,
  // 1990), with two exceptions: q0 overflows, and q2 is not finite; or it is below 2^-40, where x
  // or q may be subnormal and all fp8 codes are zero. The signs of e and inverse_ keep that of a
  // zero.
  __device__ __forceinline__ float quotient(float x) const {
    const float q0 = __fmul_rn(x, inverse_);
    const float e1 = __fmaf_rn(q0, scale_, -x);
    const float q1 = __fmaf_rn(e1, -inverse_, q0);
    const float e2 = __fmaf_rn(q1, scale_, -x);
    return __fmaf_rn(e2, -inverse_, q1);
  }

  float scale_;
  float inverse_;
  bool usable_;
};

}  // namespace quire::cuda
