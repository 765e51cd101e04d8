// 16-bit tiles in shared memory: rows of 16-byte pieces, piece c of row r at place c ^ (r % 8), so
// that eight rows' pieces of one column lie in different banks; and the ways in and out of them.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"

namespace quire::cuda::ptx {

// Byte offset of piece `c` of row `r` in a tile with rows of `pitch` bytes (a multiple of 128).
__device__ __forceinline__ std::uint32_t piece_offset(int r, int c, int pitch) {
  return static_cast<std::uint32_t>(r * pitch + ((c ^ (r & 7)) << 4));
}

// Matrix operands are addressed from one base a tile: base ^ column bits, so that the loops hold
// one register instead of a hoisted address for each column. `column` counts pieces and is even.
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

// and, for load_matrices_transposed, 16 keys x 16 columns of V as two B operands (columns 0-7:
// b[0], b[1]; 8-15: b[2], b[3]): the same base as A's.

// Where the elements of a 16 x 8 tile of sums are (C and D of mma.m16n8k16): a lane has two
// neighbours of row fragment_row() and, as elements 2 and 3, two of the row 8 below. Lanes 4 i to 4
// i + 3 share a row.
__device__ __forceinline__ int fragment_row(int lane) { return lane / 4; }
__device__ __forceinline__ int fragment_column(int lane) { return lane % 4 * 2; }
__device__ __forceinline__ int fragment_row(int lane, int element) {
  return lane / 4 + element / 2 * 8;
}
__device__ __forceinline__ int fragment_column(int lane, int element) {
  return lane % 4 * 2 + element % 2;
}
__device__ __forceinline__ bool is_first_of_row(int lane) { return lane % 4 == 0; }

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
    // Rare, so written for few registers rather than for speed.
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

__device__ __forceinline__ void store_word(std::uint32_t to, std::uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ uint4 load_piece(std::uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// Four 8 x 8 tiles of 16-bit pairs to shared memory, as load_matrices reads them: lane i names the
// row i % 8 of tile i / 8 (sm_90).
__device__ __forceinline__ void store_matrices(std::uint32_t address,
                                               const std::uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace quire::cuda::ptx
