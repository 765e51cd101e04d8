// Scores and weighted values of few query rows straight from the cache, without widened copies.
//
//   scores:  kRows x kTokens dot products at a time; each K vector is loaded and widened once and
//            multiplied with every row; the lanes of all sums are added together at the end
//   values:  kRows x kVectors accumulators; each V vector is loaded and widened once for all rows
//
// Memory-bound work: what counts is instructions per byte of K and V, and that the next unit's lines
// are on their way meanwhile. For each line used here one line of the next unit is asked for, in
// memory order; asking for all of them at once fills the miss buffers and stalls like a load.
// Head sizes that are not a whole number of vectors take the widening path of attention-inl.h.
#if defined(QUIRE_CPU_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_FEW_ROWS_INL_H_
#undef QUIRE_CPU_FEW_ROWS_INL_H_
#else
#define QUIRE_CPU_FEW_ROWS_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd/vec-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// What rows that do not exist are read as: as long as the longest row.
inline constexpr char kZeroRow[576 * sizeof(float)] = {};

// One head's stored rows of a unit and their scales.
struct DirectRows {
  const void* row[kMaxKvTile];  // never null: zeros stand for what does not exist
  alignas(64) float scale[kMaxKvTile];
  const char* ahead[kMaxKvTile];  // the row to ask for while using row t
};

// Asks for the lines of `ahead` that begin in the vector at element i. Into L2 only (locality 2):
// asked into L1 they occupy its few miss buffers and hold up the loads of the current unit, which
// made decode 1.3 times slower (docs/experiments.md).
template <DType kDType>
HWY_INLINE void prefetch_ahead(const char* ahead, std::int32_t i) {
  constexpr std::int64_t kBytes = size_of(kDType);
  constexpr std::int64_t kVectorBytes = static_cast<std::int64_t>(kLanes) * kBytes;
  if (kVectorBytes >= 64 || i * kBytes % 64 == 0) __builtin_prefetch(ahead + i * kBytes, 0, 2);
}

// s[r][t] for kRows rows from `q` on and all tokens up to a multiple of kTokens.
template <DType kDType, int kRows>
HWY_INLINE void direct_scores(const DirectRows& keys, std::int32_t count, const float* q,
                              std::int64_t padded_k, std::int32_t head_size, float* s) {
  const Df d;
  constexpr auto kTokens = static_cast<std::int32_t>(kLanes < kRows ? 1 : kLanes / kRows);
  constexpr std::int32_t kSums = kTokens * kRows;
  for (std::int32_t t = 0; t < count; t += kTokens) {
    Vf acc[kSums];
    HWY_UNROLL(16)
    for (std::int32_t n = 0; n < kSums; ++n) acc[n] = hn::Zero(d);
    for (std::int32_t i = 0; i < head_size; i += static_cast<std::int32_t>(kLanes)) {
      Vf x[kRows];
      HWY_UNROLL(4)
      for (std::int32_t r = 0; r < kRows; ++r) x[r] = hn::Load(d, q + r * padded_k + i);
      HWY_UNROLL(16)
      for (std::int32_t k = 0; k < kTokens; ++k) {
        prefetch_ahead<kDType>(keys.ahead[t + k], i);
        const Vf key = load_widened<kDType>(keys.row[t + k], static_cast<std::size_t>(i));
        HWY_UNROLL(4)
        for (std::int32_t r = 0; r < kRows; ++r) {
          acc[r * kTokens + k] = hn::MulAdd(x[r], key, acc[r * kTokens + k]);
        }
      }
    }
    HWY_ALIGN float sums[kSums < static_cast<std::int32_t>(kLanes) ? kLanes : kSums];
    if constexpr (kSums == static_cast<std::int32_t>(kLanes)) {
      hn::Store(sums_of(acc), d, sums);
    } else {
      for (std::int32_t n = 0; n < kSums; ++n) sums[n] = hn::GetLane(hn::SumOfLanes(d, acc[n]));
    }
    for (std::int32_t r = 0; r < kRows; ++r) {
      std::memcpy(s + r * kMaxKvTile + t, sums + r * kTokens, kTokens * sizeof(float));
    }
  }
}

// o[r][0, kVectors vectors) = alpha[r] * o[r] + sum_t s[r][t] * v[t]
template <DType kDType, int kRows, int kVectors>
HWY_INLINE void direct_values(const DirectRows& values, std::int32_t count, std::int32_t column,
                              const float* s, const float* alpha, float* o, std::int64_t padded_v) {
  const Df d;
  constexpr auto kVec = static_cast<std::int64_t>(kLanes);
  Vf acc[kRows][kVectors];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = hn::Mul(hn::Set(d, alpha[r]), hn::Load(d, o + r * padded_v + v * kVec));
    }
  }
  for (std::int32_t t = 0; t < count; ++t) {
    Vf x[kVectors];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      prefetch_ahead<kDType>(values.ahead[t], column + v * kVec);
      x[v] = load_widened<kDType>(values.row[t], static_cast<std::size_t>(column + v * kVec));
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      const Vf weight = hn::Set(d, s[r * kMaxKvTile + t]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(weight, x[v], acc[r][v]);
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], d, o + r * padded_v + v * kVec);
  }
}

// Calls run(r, number) for blocks of 4, 2 or 1 rows until all are covered; `number` is a
// compile-time constant. Rows are padded to the block: `q`, `s`, `alpha` and `o` have room for it,
// and the surplus is never looked at. (Blocks of 8, with AVX-512's 32 registers, were slower.)
template <class Run>
HWY_INLINE void for_row_blocks(std::int32_t rows, const Run& run) {
  for (std::int32_t r = 0; r < rows;) {
    const std::int32_t left = rows - r;
    if (left > 2) {
      run(r, std::integral_constant<int, 4>());
      r += 4;
    } else if (left == 2) {
      run(r, std::integral_constant<int, 2>());
      r += 2;
    } else {
      run(r, std::integral_constant<int, 1>());
      r += 1;
    }
  }
}

template <DType kDType>
void head_scores(const DirectRows& keys, std::int32_t count, const float* q, std::int64_t padded_k,
                 std::int32_t head_size, std::int32_t rows, float* s) {
  for_row_blocks(rows, [&](std::int32_t r, auto number) {
    direct_scores<kDType, number()>(keys, count, q + r * padded_k, padded_k, head_size,
                                    s + r * kMaxKvTile);
  });
}

template <DType kDType, int kRows>
HWY_INLINE void block_values(const DirectRows& values, std::int32_t count, std::int32_t head_size_v,
                             const float* s, const float* alpha, float* o, std::int64_t padded_v) {
  constexpr auto kVec = static_cast<std::int64_t>(kLanes);
  // 16 accumulators of 32 registers, or 8 of 16.
  constexpr int kVectors = HWY_TARGET == HWY_AVX2 ? 2 : 4;
  std::int32_t column = 0;
  for (; column + kVectors * kVec <= head_size_v; column += kVectors * kVec) {
    direct_values<kDType, kRows, kVectors>(values, count, column, s, alpha, o + column, padded_v);
  }
  for (; column < head_size_v; column += kVec) {
    direct_values<kDType, kRows, 1>(values, count, column, s, alpha, o + column, padded_v);
  }
}

template <DType kDType>
void head_values(const DirectRows& values, std::int32_t count, std::int32_t head_size_v,
                 std::int32_t rows, const float* s, const float* alpha, float* o,
                 std::int64_t padded_v) {
  for_row_blocks(rows, [&](std::int32_t r, auto number) {
    block_values<kDType, number()>(values, count, head_size_v, s + r * kMaxKvTile, alpha + r,
                                   o + std::int64_t{r} * padded_v, padded_v);
  });
}

// s[r][t] *= scale[t]: the scales of per-token-head caches.
HWY_INLINE void scale_columns(const float* scale, std::int32_t count, std::int32_t rows, float* s) {
  const Df d;
  for (std::int32_t r = 0; r < rows; ++r, s += kMaxKvTile) {
    for (std::int32_t t = 0; t < count; t += static_cast<std::int32_t>(kLanes)) {
      hn::Store(hn::Mul(hn::Load(d, s + t), hn::Load(d, scale + t)), d, s + t);
    }
  }
}

// The greatest of the bits of |x|, sign shifted out: infinity and NaN are above all finite numbers.
using MagnitudeBits = hn::Vec<hn::RebindToUnsigned<Df>>;
HWY_INLINE MagnitudeBits greater_magnitude(MagnitudeBits greatest, Vf x) {
  return hn::Max(greatest, hn::ShiftLeft<1>(hn::BitCast(hn::RebindToUnsigned<Df>(), x)));
}
HWY_INLINE bool is_finite(MagnitudeBits greatest) {
  const hn::RebindToUnsigned<Df> du;
  return hn::AllTrue(du, hn::Lt(greatest, hn::Set(du, 0xFF000000U)));
}

template <DType kDType>
bool rows_are_finite(const DirectRows& rows, std::int32_t count, std::int32_t size) {
  const Df d;
  constexpr auto kVec = static_cast<std::int32_t>(kLanes);
  MagnitudeBits greatest = hn::Zero(hn::RebindToUnsigned<Df>());
  for (std::int32_t t = 0; t < count; t += kVec) {
    greatest = greater_magnitude(greatest, hn::Load(d, rows.scale + t));
  }
  for (std::int32_t t = 0; t < count; ++t) {
    for (std::int32_t i = 0; i < size; i += kVec) {
      greatest = greater_magnitude(greatest,
                                   load_widened<kDType>(rows.row[t], static_cast<std::size_t>(i)));
    }
  }
  return is_finite(greatest);
}

using HeadScores = decltype(&head_scores<DType::kFloat32>);
using HeadValues = decltype(&head_values<DType::kFloat32>);
using RowsAreFinite = decltype(&rows_are_finite<DType::kFloat32>);

struct DirectKernels {
  HeadScores scores;
  HeadValues values;
  RowsAreFinite is_finite;  // rows and scales
};

template <DType kDType>
constexpr DirectKernels direct_kernels_of() {
  return {head_scores<kDType>, head_values<kDType>, rows_are_finite<kDType>};
}

HWY_INLINE DirectKernels direct_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return direct_kernels_of<DType::kFloat32>();
    case DType::kFloat16: return direct_kernels_of<DType::kFloat16>();
    case DType::kBFloat16: return direct_kernels_of<DType::kBFloat16>();
    case DType::kFloat8E4M3: return direct_kernels_of<DType::kFloat8E4M3>();
    case DType::kFloat8E5M2: return direct_kernels_of<DType::kFloat8E5M2>();
    default: return direct_kernels_of<DType::kInt8>();
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
