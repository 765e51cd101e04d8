// Decode's two products in bf16, by AVX-512's instructions that multiply pairs of elements, and the same
// in plain code for tests on other machines. K and V in bf16 are read where the cache has them, those of
// 8 bits are widened first, by a table.
#pragma once

#include <cstdint>

namespace quire::cpu {

// Rows of queries lie side by side in the lanes of a vector: 16, or 8 where no more are left.
inline constexpr std::int32_t kPairLanes = 16;
// Keys that are multiplied together: `keys` and `s` have so many at a time, zeros behind the last.
inline constexpr std::int32_t kPairKeys = 16;
// Rows that share an interleaved pair of values; `o`, `alpha` and weights have room for whole blocks.
inline constexpr std::int32_t kPairRows = 8;

// s[r][t] = scale * (q[r] . keys[t])
struct PairScores {
  const void* const* keys = nullptr;      // bf16 rows, up to a multiple of kPairKeys
  const char* const* prefetch = nullptr;  // for each key a row to fetch meanwhile
  std::int32_t count = 0;
  // bf16. For each block of lanes [head_size / 2][lanes] pairs of elements; rows behind the last are
  // zeros.
  const std::uint32_t* q = nullptr;
  std::int32_t head_size = 0;  // a multiple of 32
  std::int32_t rows = 0;
  float scale = 1.0F;
  float* s = nullptr;  // [rows up to whole blocks of lanes, keys up to a multiple of kPairKeys]
  std::int64_t s_stride = 0;
};

// o[r] = alpha[r] * o[r] + sum_t weights[r][t] * values[t]
struct PairValues {
  const void* const* values = nullptr;  // bf16 rows, up to a multiple of 2
  const char* const* prefetch = nullptr;
  std::int32_t count = 0;
  const std::uint16_t* weights = nullptr;  // bf16; 0 from `count` to the next multiple of 2
  std::int64_t weights_stride = 0;
  const float* alpha = nullptr;
  float* o = nullptr;
  std::int64_t o_stride = 0;
  std::int32_t head_size_v = 0;  // a multiple of 32
  std::int32_t rows = 0;
};

// The 256 values of an 8-bit type as bf16, all exact: their low bytes, then their high bytes.
struct ByteTable {
  alignas(64) std::uint8_t low[256];
  std::uint8_t high[256];
};

struct PairKernels {
  void (*scores)(const PairScores& product);
  void (*values)(const PairValues& product);
  // to[0, count) = what the bytes stand for, as bf16; count a multiple of 32.
  void (*widen)(const void* bytes, std::int32_t count, const ByteTable& table, std::uint16_t* to);
};

// The lanes of the block that begins with row r of `rows`. Static: the linker must not take the copy of
// pairs_avx512.cc for one that runs on any CPU.
static constexpr std::int32_t pair_lanes(std::int32_t rows, std::int32_t r) {
  return rows - r > kPairLanes / 2 ? kPairLanes : kPairLanes / 2;
}

// Only where avx512_bf16_is_usable() (tiles.h).
extern const PairKernels kPairKernelsAvx512;
// With their rounding of what is too small to be normal: to 0.
extern const PairKernels kPairKernelsPortable;

}  // namespace quire::cpu
