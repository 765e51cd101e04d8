// Compiled for AVX-512's bf16 instructions, as pairs_avx512.cc is. Everything in it but
// avx512_bf16_is_usable() may run only where that is true, so nothing may be included that defines
// inline functions others link with.
#include "cpu/tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VBMI__)

#include <immintrin.h>

namespace quire::cpu {
namespace {

// Sums of 8 rows by 3 times 16 columns are 24 of 32 registers. For each pair of the depth a broadcast
// of a feeds three products, a load of b eight: 11 loads to 24 products.
constexpr std::int32_t kRows = 8;
constexpr std::int32_t kColumnGroups = 3;

__m512bh pair_of(const std::uint16_t* a) {
  int pair = 0;
  __builtin_memcpy(&pair, a, sizeof(pair));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

template <int kGroups>
void multiply_block(const TileProduct& p, std::int64_t row, std::int64_t group) {
  const std::uint16_t* const a = p.a + row * p.a_stride;
  const std::uint16_t* const b = p.b + group * p.b_stride;
  float* const c = p.c + row * p.c_stride + group * kTileColumns;
  __m512 sums[kRows][kGroups];
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (std::int64_t g = 0; g < kGroups; ++g) {
      sums[r][g] =
          p.add ? _mm512_loadu_ps(c + r * p.c_stride + g * kTileColumns) : _mm512_setzero_ps();
    }
  }
  // A tile's 16 pairs of rows follow each other, and so do the tiles of a column.
  for (std::int64_t i = 0; i < p.depth; i += 2) {
    __m512bh columns[kGroups];
#pragma GCC unroll 3
    for (std::int64_t g = 0; g < kGroups; ++g) {
      columns[g] =
          reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + g * p.b_stride + i * kTileColumns));
    }
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < kRows; ++r) {
      const __m512bh pair = pair_of(a + r * p.a_stride + i);
#pragma GCC unroll 3
      for (std::int64_t g = 0; g < kGroups; ++g) {
        sums[r][g] = _mm512_dpbf16_ps(sums[r][g], pair, columns[g]);
      }
    }
  }
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (std::int64_t g = 0; g < kGroups; ++g) {
      _mm512_storeu_ps(c + r * p.c_stride + g * kTileColumns, sums[r][g]);
    }
  }
}

// All rows by some columns of b, which stay in the first-level cache meanwhile.
template <int kGroups>
void multiply_columns(const TileProduct& p, std::int64_t group) {
  for (std::int64_t row = 0; row < p.rows; row += kRows) multiply_block<kGroups>(p, row, group);
}

}  // namespace

bool avx512_bf16_is_usable() {
  static const bool usable =
      __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
      __builtin_cpu_supports("avx512vbmi") != 0 && __builtin_cpu_supports("avx512bf16") != 0;
  return usable;
}

void multiply_tiles_avx512(const TileProduct& product) {
  const std::int64_t groups = product.columns / kTileColumns;
  std::int64_t group = 0;
  // Of four groups two and two: three and one would load more.
  for (; groups - group >= kColumnGroups && groups - group != 4; group += kColumnGroups) {
    multiply_columns<kColumnGroups>(product, group);
  }
  for (; groups - group >= 2; group += 2) multiply_columns<2>(product, group);
  if (group < groups) multiply_columns<1>(product, group);
}

}  // namespace quire::cpu

#else

namespace quire::cpu {

bool avx512_bf16_is_usable() { return false; }
void multiply_tiles_avx512(const TileProduct& product) { multiply_tiles_portable(product); }

}  // namespace quire::cpu

#endif
