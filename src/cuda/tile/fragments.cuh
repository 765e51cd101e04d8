// 16-bit tiles in shared memory: rows of 16-byte pieces, piece c of row r at place c ^ (r % 8), so
// that eight rows' pieces of one column lie in different banks; and the ways in and out of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/tile/ptx.cuh"
#include "quire/types.h"
#include "semantics/quant.h"

namespace quire::cuda::tile {

// Byte offset of piece `c` of row `r` in a tile with rows of `pitch` bytes (a multiple of 128).
__device__ __forceinline__ std::uint32_t piece_offset(int r, int c, int pitch) {
  return static_cast<std::uint32_t>(r * pitch + ((c ^ (r & 7)) << 4));
}

// Matrix operands are addressed from one base a tile: base ^ column bits, so that the loops hold one
// register instead of a hoisted address for each column. `column` counts pieces and is even.
__device__ __forceinline__ std::uint32_t at_column(std::uint32_t base, int column) {
  return (base ^ static_cast<std::uint32_t>((column & 7) << 4)) +
         static_cast<std::uint32_t>(column / 8 * 128);
}

// Keeps the compiler from computing everything that follows from x ahead of a loop.
__device__ __forceinline__ std::uint32_t opaque(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Bases for load_matrices, at row `row` (a multiple of 8) of a tile:
// 16 rows x 16 columns as the A operand;
__device__ __forceinline__ std::uint32_t a_base(std::uint32_t tile, int row, int pitch) {
  const auto lane = static_cast<int>(opaque(threadIdx.x) % 32);
  return tile + piece_offset(row + lane % 16, lane / 16, pitch);
}

// 16 keys x 16 columns of K as two B operands (keys 0-7: b[0], b[1]; keys 8-15: b[2], b[3]);
__device__ __forceinline__ std::uint32_t b_base(std::uint32_t tile, int row, int pitch) {
  const auto lane = static_cast<int>(opaque(threadIdx.x) % 32);
  return tile + piece_offset(row + lane % 8 + lane / 16 * 8, lane / 8 % 2, pitch);
}

// and, for load_matrices_transposed, 16 keys x 16 columns of V as two B operands (columns 0-7: b[0],
// b[1]; 8-15: b[2], b[3]): the same base as A's.

// Copies up to 16 bytes of a row whose start is aligned to `alignment` bytes. From 4 bytes on the
// copy is asynchronous.
__device__ __forceinline__ void copy_piece(std::uint32_t to, const char* from, int valid,
                                           int alignment) {
  if (alignment >= 16) {
    copy_async<16>(to, from, valid);
  } else if (alignment == 8) {
#pragma unroll
    for (int i = 0; i < 16; i += 8) {
      const int part = min(max(valid - i, 0), 8);
      copy_async<8>(to + i, part > 0 ? from + i : from, part);
    }
  } else if (alignment == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const int part = min(max(valid - i, 0), 4);
      copy_async<4>(to + i, part > 0 ? from + i : from, part);
    }
  } else {
    // Rare, so in few registers rather than fast.
#pragma unroll 1
    for (int i = 0; i < 16; i += 4) {
      std::uint32_t word = 0;
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const std::uint32_t byte = i + j < valid ? static_cast<std::uint8_t>(from[i + j]) : 0U;
        word |= byte << (j * 8);
      }
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + static_cast<std::uint32_t>(i)), "r"(word)
                   : "memory");
    }
  }
}

__device__ __forceinline__ void store_piece(std::uint32_t to, std::uint32_t a, std::uint32_t b,
                                            std::uint32_t c, std::uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ uint4 load_piece(std::uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

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

}  // namespace quire::cuda::tile
