// K and V of 8-bit caches in the decode kernel: from the ring's bytes to A operands in registers,
//
//   16-byte (K) and 4-byte (V) loads -> fp16, exactly -> wgmma, whose B operand is Q or P as ever
//
// so that neither V is transposed nor anything written back, and the ring's tile is given back
// before the product. All is fp16: two of the three types have one instruction to fp16 and none to
// bf16, and a query in bf16 fits too once its row is multiplied by a power of two (load_query), by
// whose inverse its scores are multiplied. Elements below 2^-29 of their row's largest lose bits.
//
// A token's own scales: K's multiplies its scores in fp32. V's multiplies its weight in fp32, and
// weights in fp16 are relative to the largest such product of their row (byte_tile.cuh), so that no
// size of scales costs bits.
#pragma once

#include "cuda/kernel/row_table.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/widen.cuh"
#include "cuda/sm90/decode/config.cuh"

namespace quire::cuda::sm90 {

// Which bytes a lane has. Rows of the products may stand for any of V's columns and steps of the
// products over K for any of its elements, as long as Q and O agree: so lanes take what lies
// together.
template <int kHeadSize>
struct BytePlaces {
  static constexpr int kRowBytes = kHeadSize;
  static constexpr int kGroupBytes = 8 * kRowBytes;
  static constexpr int kLaneBytes = kHeadSize / 4;  // of a row of K
  static constexpr int kColumns = kHeadSize / 64;   // products over V a step of 16 keys

  // Address of 16-byte piece `piece` of key `key` of eight, as the copy engine swizzles it.
  static __device__ __forceinline__ std::uint32_t piece(int key, int piece) {
    const int place = kRowBytes == 128 ? piece ^ key : piece ^ key / 2;
    return static_cast<std::uint32_t>(key * kRowBytes + place * 16);
  }

  // Lane (r, c) has elements [kLaneBytes * c, + kLaneBytes) of its two keys, four for each step:
  // where element `d` (even) and its neighbour are in the order of the products.
  static __device__ __forceinline__ constexpr int step_of(int d) {
    return d % kLaneBytes / 4 * 16 + d % 4 / 2 * 8 + d / kLaneBytes * 2;
  }

  // The column of O that element i (its row: fragment_row() + 8 * high) of product `h` is.
  static __device__ __forceinline__ constexpr int column(int warp, int r, int h, int high) {
    return kColumns * 2 * (warp * 8 + r) + 2 * h + high;
  }
};

__device__ __forceinline__ std::uint32_t load_word(std::uint32_t from) {
  std::uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// fn(E4M3()) or the like: code for the type of the cache.
template <class Fn>
__device__ __forceinline__ void with_stored_type(DType dtype, const Fn& fn) {
  if (dtype == DType::kFloat8E4M3) {
    fn(ptx::E4M3());
  } else if (dtype == DType::kInt8) {
    fn(ptx::Int8());
  } else {
    fn(ptx::E5M2());
  }
}

// The warp's 16 keys of a tile at `tile`.
template <int kHeadSize>
struct ByteKeys {
  using Places = BytePlaces<kHeadSize>;
  static constexpr int kWords = Places::kLaneBytes / 4;  // and products
  std::uint32_t words[2][kWords];                        // keys r and r + 8

  __device__ __forceinline__ void load(std::uint32_t tile, int warp, int lane) {
    const int r = lane / 4;
    const int c = lane % 4;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 piece = ptx::load_piece(tile + (warp * 2 + high) * Places::kGroupBytes +
                                            Places::piece(r, c * (Places::kLaneBytes / 16) + i));
        words[high][4 * i] = piece.x;
        words[high][4 * i + 1] = piece.y;
        words[high][4 * i + 2] = piece.z;
        words[high][4 * i + 3] = piece.w;
      }
    }
  }

  __device__ __forceinline__ void widen(DType dtype, std::uint32_t (&a)[kWords][4]) const {
    with_stored_type(dtype, [&](auto type) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        ptx::widen_four(type, words[0][i], &a[i][0], &a[i][2]);
        ptx::widen_four(type, words[1][i], &a[i][1], &a[i][3]);
      }
    });
  }
};

// The warp's 16 * kColumns columns of all keys of a tile.
template <int kHeadSize>
struct ByteValues {
  using Places = BytePlaces<kHeadSize>;
  static constexpr int kColumns = Places::kColumns;
  static constexpr int kSteps = kKvTile / 16;
  // Of keys 2 c and 2 c + 1 (then 2 c + 8 and 2 c + 9) of a step the bytes of the lane's columns,
  // in turns.
  std::uint32_t words[kSteps][2][kColumns];

  __device__ __forceinline__ void load(std::uint32_t tile, int warp, int lane) {
    const int r = lane / 4;
    const int c = lane % 4;
    // Head size 64: two lanes share a word.
    const int word = (warp * 8 + r) * kColumns / 2;
    const std::uint32_t low = kColumns == 1 && r % 2 == 1 ? 0x7362 : 0x5140;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = load_word(tile + (step * 2 + half) * Places::kGroupBytes +
                           Places::piece(2 * c + e, word / 4) + word % 4 * 4);
        }
        words[step][half][0] = __byte_perm(x[0], x[1], low);
        if (kColumns == 2) words[step][half][kColumns - 1] = __byte_perm(x[0], x[1], 0x7362);
      }
    }
  }

  __device__ __forceinline__ void widen(DType dtype,
                                        std::uint32_t (&a)[kSteps][kColumns][4]) const {
    with_stored_type(dtype, [&](auto type) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int h = 0; h < kColumns; ++h) {
          ptx::widen_four(type, words[step][0][h], &a[step][h][0], &a[step][h][1]);
          ptx::widen_four(type, words[step][1][h], &a[step][h][2], &a[step][h][3]);
        }
      }
    });
  }
};

// The factor, a power of two, that brings the largest finite magnitude of a row of bf16 elements to
// [2^15, 2^16), if it has one, from the bits of that magnitude; and its inverse.
struct RowFactor {
  float factor;
  float inverse;
  __device__ __forceinline__ explicit RowFactor(std::uint32_t magnitude) {
    // Biased by 127; both ends of the range are normal numbers.
    const std::uint32_t up = min(142U + 127U - (magnitude >> 7), 253U);
    factor = __uint_as_float(up << 23);
    inverse = __uint_as_float((254U - up) << 23);
  }
};

// Rows of the query in fp16, in the order of BytePlaces, in columns of 64 elements under the
// 128-byte swizzle; and what their scores are to be multiplied by. By a warp. Rows that the tile
// does not have are 0.
template <class C>
__device__ __forceinline__ void load_query_for_bytes(const KernelParams& p, const Split& split,
                                                     const QueryChange& change, std::uint32_t to,
                                                     float (&score_factors)[C::kRows]) {
  using Places = BytePlaces<C::kHeadSize>;
  constexpr int kPieces = C::kHeadSize / 8;
  const bool bf16 = p.layer.dtype == DType::kBFloat16;
  const auto lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 4
  for (int i = lane; i < C::kRows * kPieces; i += 32) {
    const int r = i / kPieces;
    const int c = i % kPieces;
    uint4 x{};
    if (r < split.tile.rows) {
      const RowPlace place = row_place(p, split.tile, split.head, r);
      const auto* row = static_cast<const std::uint16_t*>(p.query) +
                        place.token * p.query_token_stride + place.head * p.query_head_stride;
      x = *reinterpret_cast<const uint4*>(row + c * 8);
    }
    std::uint32_t words[4] = {change(x.x), change(x.y), change(x.z), change(x.w)};
    float score_factor = 1.0F;
    if (bf16) {
      std::uint32_t most = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const std::uint32_t magnitude = (words[e / 2] >> (e % 2 * 16)) & 0x7FFFU;
        if (magnitude < 0x7F80U) most = max(most, magnitude);
      }
      for (int d = 1; d < kPieces; d *= 2) most = max(most, __shfl_xor_sync(~0U, most, d));
      const RowFactor factor(most);
      score_factor = factor.inverse;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[k] = ptx::Half::pack(__uint_as_float(words[k] << 16) * factor.factor,
                                   __uint_as_float(words[k] & 0xFFFF0000U) * factor.factor);
      }
    }
    if (c == 0) score_factors[r] = score_factor;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int step = Places::step_of(c * 8 + k * 2);
      ptx::store_word(
          to + static_cast<std::uint32_t>(step / 64 * C::kRows * 128 + r * 128 +
                                          ((step % 64 / 8 ^ r % 8) << 4) + step % 8 * 2),
          words[k]);
    }
  }
}

}  // namespace quire::cuda::sm90
