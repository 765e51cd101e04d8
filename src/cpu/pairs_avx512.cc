// Compiled for AVX-512's bf16 instructions; as in tiles_avx512.cc nothing may be included that defines
// inline functions others link with.
//
//   scores  for 16 keys at a time: 16 sums whose lanes are rows. 8 vectors of Q in registers; each pair of
//           a key is broadcast from the cache by the product itself. The 16 x 16 sums are transposed.
//           No sum over lanes, which would cost as much as the products.
//   values  8 rows by 32 columns of O in registers; V of two keys is interleaved once for the 8 rows.
//   widen   bytes by tables in registers, 16 instructions for 64 of them
//
// A broadcast load a product is what bounds the scores: two a cycle on a Zen 4, as many as products of
// 8 lanes. Rows in lanes also mean that 4 rows would take as long as 8: those stay with fp32.
#include "cpu/pairs.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VBMI__)

#include <immintrin.h>

namespace quire::cpu {
namespace {

constexpr int kQueries = 8;  // vectors of Q, or pairs of each key, in registers

// sum += q times a pair of a key, in every lane. The intrinsic's broadcast stays an instruction of its
// own in GCC 12: 3 to 8 % slower.
struct Lanes16 {
  using Sums = __m512;
  using Pairs = __m512bh;
  static constexpr int kLanes = 16;
  static Sums zero() { return _mm512_setzero_ps(); }
  static Pairs load(const std::uint32_t* p) {
    return reinterpret_cast<Pairs>(_mm512_loadu_si512(p));
  }
  static Sums add_product(Sums sum, Pairs q, const char* pair) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(q), "m"(*reinterpret_cast<const int*>(pair)));
    return sum;
  }
  static Sums unpack_low(Sums a, Sums b) { return _mm512_unpacklo_ps(a, b); }
  static Sums unpack_high(Sums a, Sums b) { return _mm512_unpackhi_ps(a, b); }
  static Sums low_pairs(Sums a, Sums b) { return _mm512_shuffle_ps(a, b, 0x44); }
  static Sums high_pairs(Sums a, Sums b) { return _mm512_shuffle_ps(a, b, 0xEE); }
};

struct Lanes8 {
  using Sums = __m256;
  using Pairs = __m256bh;
  static constexpr int kLanes = 8;
  static Sums zero() { return _mm256_setzero_ps(); }
  static Pairs load(const std::uint32_t* p) {
    return reinterpret_cast<Pairs>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Sums add_product(Sums sum, Pairs q, const char* pair) {
    asm("vdpbf16ps %2%{1to8%}, %1, %0"
        : "+v"(sum)
        : "v"(q), "m"(*reinterpret_cast<const int*>(pair)));
    return sum;
  }
  static Sums unpack_low(Sums a, Sums b) { return _mm256_unpacklo_ps(a, b); }
  static Sums unpack_high(Sums a, Sums b) { return _mm256_unpackhi_ps(a, b); }
  static Sums low_pairs(Sums a, Sums b) { return _mm256_shuffle_ps(a, b, 0x44); }
  static Sums high_pairs(Sums a, Sums b) { return _mm256_shuffle_ps(a, b, 0xEE); }
};

// Each four of the 16 sums: 4 x 4 elements in each 128 bits, transposed there.
template <class Lanes>
void transpose_fours(typename Lanes::Sums* sums) {
  using V = typename Lanes::Sums;
#pragma GCC unroll 4
  for (V* x = sums; x < sums + kPairKeys; x += 4) {
    const V a = Lanes::unpack_low(x[0], x[1]);
    const V b = Lanes::unpack_low(x[2], x[3]);
    const V c = Lanes::unpack_high(x[0], x[1]);
    const V d = Lanes::unpack_high(x[2], x[3]);
    x[0] = Lanes::low_pairs(a, b);
    x[1] = Lanes::high_pairs(a, b);
    x[2] = Lanes::low_pairs(c, d);
    x[3] = Lanes::high_pairs(c, d);
  }
}

// sums[key] lanes rows -> s[row][key]
void store_transposed(__m512* sums, float scale, float* s, std::int64_t stride) {
  const __m512 factor = _mm512_set1_ps(scale);
  transpose_fours<Lanes16>(sums);
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(sums[i], sums[4 + i], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(sums[8 + i], sums[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(sums[i], sums[4 + i], 0xDD);
    const __m512 d = _mm512_shuffle_f32x4(sums[8 + i], sums[12 + i], 0xDD);
    _mm512_storeu_ps(s + i * stride, _mm512_mul_ps(_mm512_shuffle_f32x4(a, b, 0x88), factor));
    _mm512_storeu_ps(s + (4 + i) * stride, _mm512_mul_ps(_mm512_shuffle_f32x4(c, d, 0x88), factor));
    _mm512_storeu_ps(s + (8 + i) * stride, _mm512_mul_ps(_mm512_shuffle_f32x4(a, b, 0xDD), factor));
    _mm512_storeu_ps(s + (12 + i) * stride,
                     _mm512_mul_ps(_mm512_shuffle_f32x4(c, d, 0xDD), factor));
  }
}

void store_transposed(__m256* sums, float scale, float* s, std::int64_t stride) {
  const __m256 factor = _mm256_set1_ps(scale);
  transpose_fours<Lanes8>(sums);
#pragma GCC unroll 2
  for (std::int64_t half = 0; half < 16; half += 8) {
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < 4; ++i) {
      const __m256 a = sums[half + i];
      const __m256 b = sums[half + 4 + i];
      _mm256_storeu_ps(s + half + i * stride,
                       _mm256_mul_ps(_mm256_permute2f128_ps(a, b, 0x20), factor));
      _mm256_storeu_ps(s + half + (4 + i) * stride,
                       _mm256_mul_ps(_mm256_permute2f128_ps(a, b, 0x31), factor));
    }
  }
}

template <class Lanes>
void scores_of_block(const PairScores& p, const std::uint32_t* q, float* s) {
  for (std::int32_t t = 0; t < p.count; t += kPairKeys) {
    typename Lanes::Sums sums[kPairKeys];
#pragma GCC unroll 16
    for (std::int64_t k = 0; k < kPairKeys; ++k) sums[k] = Lanes::zero();
    for (std::int64_t i = 0; i < p.head_size / 2; i += kQueries) {
      typename Lanes::Pairs x[kQueries];
#pragma GCC unroll 8
      for (std::int64_t j = 0; j < kQueries; ++j) x[j] = Lanes::load(q + (i + j) * Lanes::kLanes);
#pragma GCC unroll 16
      for (std::int64_t k = 0; k < kPairKeys; ++k) {
        const char* const key = static_cast<const char*>(p.keys[t + k]) + i * 4;
        if (i % 16 == 0) __builtin_prefetch(p.prefetch[t + k] + i * 4, 0, 2);
#pragma GCC unroll 8
        for (std::int64_t j = 0; j < kQueries; ++j) {
          sums[k] = Lanes::add_product(sums[k], x[j], key + j * 4);
        }
      }
    }
    store_transposed(sums, p.scale, s + t, p.s_stride);
  }
}

void pair_scores(const PairScores& p) {
  const std::uint32_t* q = p.q;
  for (std::int32_t r = 0; r < p.rows;) {
    const std::int32_t lanes = pair_lanes(p.rows, r);
    float* const s = p.s + r * p.s_stride;
    if (lanes == kPairLanes) {
      scores_of_block<Lanes16>(p, q, s);
    } else {
      scores_of_block<Lanes8>(p, q, s);
    }
    q += std::int64_t{p.head_size} / 2 * lanes;
    r += lanes;
  }
}

// kRows rows by kHalves times 32 columns.
template <int kRows, std::int64_t kHalves>
void values_of_block(const PairValues& p, std::int32_t row, std::int32_t column) {
  // Elements 0 to 15, then 16 to 31, of two vectors, side by side.
  alignas(64) static constexpr std::uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                         37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                         11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  float* const o = p.o + row * p.o_stride + column;
  __m512 sums[kRows][2 * kHalves];
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < 2 * kHalves; ++v) {
      sums[r][v] = _mm512_mul_ps(_mm512_set1_ps(p.alpha[row + r]),
                                 _mm512_loadu_ps(o + r * p.o_stride + v * 16));
    }
  }
  const std::uint16_t* const weights = p.weights + row * p.weights_stride;
  for (std::int32_t t = 0; t < p.count; t += 2) {
    __m512bh x[2 * kHalves];
#pragma GCC unroll 2
    for (std::int64_t h = 0; h < kHalves; ++h) {
      const std::int64_t at = (column + h * 32) * 2;
      const char* const even = static_cast<const char*>(p.values[t]) + at;
      const char* const odd = static_cast<const char*>(p.values[t + 1]) + at;
      __builtin_prefetch(p.prefetch[t] + at, 0, 2);
      __builtin_prefetch(p.prefetch[t + 1] + at, 0, 2);
      const __m512i a = _mm512_loadu_si512(even);
      const __m512i b = _mm512_loadu_si512(odd);
      x[2 * h] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, low, b));
      x[2 * h + 1] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, high, b));
    }
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < kRows; ++r) {
      int bits = 0;
      __builtin_memcpy(&bits, weights + r * p.weights_stride + t, sizeof(bits));
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
#pragma GCC unroll 4
      for (std::int64_t v = 0; v < 2 * kHalves; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x[v], pair);
    }
  }
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < 2 * kHalves; ++v) {
      _mm512_storeu_ps(o + r * p.o_stride + v * 16, sums[r][v]);
    }
  }
}

// As many columns at a time as 16 sums allow.
template <int kRows>
void values_of_rows(const PairValues& p, std::int32_t row) {
  constexpr std::int64_t kHalves = kRows > 4 ? 1 : 2;
  std::int32_t column = 0;
  for (; column + kHalves * 32 <= p.head_size_v; column += kHalves * 32) {
    values_of_block<kRows, kHalves>(p, row, column);
  }
  if (column < p.head_size_v) values_of_block<kRows, 1>(p, row, column);
}

void pair_values(const PairValues& p) {
  for (std::int32_t r = 0; r < p.rows;) {
    const std::int32_t left = p.rows - r;
    if (left > 4) {
      values_of_rows<kPairRows>(p, r);
      r += kPairRows;
    } else if (left > 1) {
      values_of_rows<4>(p, r);
      r += 4;
    } else {
      values_of_rows<1>(p, r);
      r += 1;
    }
  }
}

// 64 bytes at a time: a table of 128 bytes is two registers to look up in, so four registers for the low
// bytes of all 256 values and four for the high ones.
void widen(const void* bytes, std::int32_t count, const ByteTable& table, std::uint16_t* to) {
  __m512i tables[8];
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < 8; ++i) tables[i] = _mm512_loadu_si512(table.low + i * 64);
  // Interleaving works within 16 bytes: eights of bytes that become neighbours are put there first.
  const __m512i eights = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (std::int64_t i = 0; i < count; i += 64) {
    const bool half = count - i < 64;
    const auto* from = static_cast<const std::uint8_t*>(bytes) + i;
    const __m512i x = _mm512_permutexvar_epi64(
        eights, _mm512_maskz_loadu_epi8(half ? 0xFFFFFFFFULL : ~0ULL, from));
    const __mmask64 upper = _mm512_movepi8_mask(x);
    const __m512i low =
        _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(tables[0], x, tables[1]),
                               _mm512_permutex2var_epi8(tables[2], x, tables[3]));
    const __m512i high =
        _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(tables[4], x, tables[5]),
                               _mm512_permutex2var_epi8(tables[6], x, tables[7]));
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
    if (!half) _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
  }
}

}  // namespace

const PairKernels kPairKernelsAvx512 = {pair_scores, pair_values, widen};

}  // namespace quire::cpu

#else

namespace quire::cpu {

const PairKernels kPairKernelsAvx512 = {nullptr, nullptr, nullptr};

}  // namespace quire::cpu

#endif
