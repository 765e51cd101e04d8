// Decode: few query rows of several kv heads, memory-bound. K and V straight from the cache,
// without fp32 copies in memory.
//
//   S:    kRows x kKeys dot products at a time; each K vector is loaded and widened once and
//         multiplied with every row; the lanes of all sums are added up at the end
//   P V:  kRows x kVectors accumulators; each V vector is loaded and widened once for all rows
//
// Two things decide the speed: instructions per byte of K and V, and whether the next kv tile is
// being fetched meanwhile. For each cache line that is used, one line of the next kv tile is
// prefetched, in memory order. Prefetching the whole kv tile at once fills the miss buffers, and
// then each further prefetch stalls like a load. Head sizes must be whole numbers of vectors;
// decode_widened-inl.h takes the others.
#if defined(QUIRE_CPU_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_DECODE_INL_H_
#undef QUIRE_CPU_DECODE_INL_H_
#else
#define QUIRE_CPU_DECODE_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/kv_tile-inl.h"
#include "cpu/simd/vec-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// Prefetches the line of `row` that begins in the vector at element i, if one does. Into L2 only
// (locality 2): prefetched into L1, lines take its few miss buffers from the loads of this kv tile,
// and decode was 1.3 times slower (docs/experiments.md).
template <DType kDType>
HWY_INLINE void prefetch_vector(const char* row, std::int32_t i) {
  constexpr std::int64_t kBytes = size_of(kDType);
  constexpr std::int64_t kVectorBytes = static_cast<std::int64_t>(kLanes) * kBytes;
  if (kVectorBytes >= 64 || i * kBytes % 64 == 0) __builtin_prefetch(row + i * kBytes, 0, 2);
}

// s[r][t] for kRows rows from `q` on and all keys, up to a multiple of kKeys.
template <DType kDType, int kRows>
HWY_INLINE void decode_scores(const StoredRows& keys, std::int32_t count, const float* q,
                              std::int64_t padded_k, std::int32_t head_size, float* s) {
  const Df d;
  constexpr auto kKeys = static_cast<std::int32_t>(kLanes < kRows ? 1 : kLanes / kRows);
  constexpr std::int32_t kSums = kKeys * kRows;
  for (std::int32_t t = 0; t < count; t += kKeys) {
    Vf acc[kSums];
    HWY_UNROLL(16)
    for (std::int32_t n = 0; n < kSums; ++n) acc[n] = hn::Zero(d);
    for (std::int32_t i = 0; i < head_size; i += static_cast<std::int32_t>(kLanes)) {
      Vf x[kRows];
      HWY_UNROLL(4)
      for (std::int32_t r = 0; r < kRows; ++r) x[r] = hn::Load(d, q + r * padded_k + i);
      HWY_UNROLL(16)
      for (std::int32_t k = 0; k < kKeys; ++k) {
        prefetch_vector<kDType>(keys.prefetch[t + k], i);
        const Vf key = load_widened<kDType>(keys.row[t + k], static_cast<std::size_t>(i));
        HWY_UNROLL(4)
        for (std::int32_t r = 0; r < kRows; ++r) {
          acc[r * kKeys + k] = hn::MulAdd(x[r], key, acc[r * kKeys + k]);
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
      std::memcpy(s + r * kMaxKvTile + t, sums + r * kKeys, kKeys * sizeof(float));
    }
  }
}

// o[r][0, kVectors vectors) = alpha[r] * o[r] + sum_t s[r][t] * v[t], t in [begin, end)
template <DType kDType, int kRows, int kVectors>
HWY_INLINE void decode_values(const StoredRows& values, std::int32_t begin, std::int32_t end,
                              std::int32_t column, const float* s, const float* alpha, float* o,
                              std::int64_t padded_v) {
  const Df d;
  Vf acc[kRows][kVectors];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = hn::Mul(hn::Set(d, alpha[r]), hn::Load(d, o + r * padded_v + v * kVec));
    }
  }
  for (std::int32_t t = begin; t < end; ++t) {
    Vf x[kVectors];
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      prefetch_vector<kDType>(values.prefetch[t], column + v * kVec);
      x[v] = load_widened<kDType>(values.row[t], static_cast<std::size_t>(column + v * kVec));
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      const Vf weight = hn::Set(d, s[r * kMaxKvTile + t]);
      HWY_UNROLL(8)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(weight, x[v], acc[r][v]);
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], d, o + r * padded_v + v * kVec);
  }
}

// Calls run(r, number) for blocks of 4, 2 or 1 rows until all are covered; `number` is a
// compile-time constant. `q`, `s`, `alpha` and `o` have room for whole blocks; the rows beyond the
// last are not used. (Blocks of 8, with AVX-512's 32 registers, were slower.)
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
void head_scores(const StoredRows& keys, std::int32_t count, const float* q, std::int64_t padded_k,
                 std::int32_t head_size, std::int32_t rows, float* s) {
  for_row_blocks(rows, [&](std::int32_t r, auto number) {
    decode_scores<kDType, number()>(keys, count, q + r * padded_k, padded_k, head_size,
                                    s + r * kMaxKvTile);
  });
}

// Keys whose V rows are multiplied before the next columns. In an NHD cache the rows of a head lie
// 2 KiB and more apart, in few sets of L1: with 8 ways, 32 rows pushed each other out before their
// second half line was used.
constexpr std::int32_t kKeysOfValues = HWY_TARGET == HWY_AVX2 ? 8 : kMaxKvTile;
inline constexpr float kOnes[4] = {1.0F, 1.0F, 1.0F, 1.0F};

// From `column` on: as wide as fits, then the rest by halves.
template <DType kDType, int kRows, int kVectors>
HWY_INLINE void columns_of_values(const StoredRows& values, std::int32_t begin, std::int32_t end,
                                  std::int32_t column, std::int32_t head_size_v, const float* s,
                                  const float* alpha, float* o, std::int64_t padded_v) {
  for (; column + kVectors * kVec <= head_size_v; column += kVectors * kVec) {
    decode_values<kDType, kRows, kVectors>(values, begin, end, column, s, alpha, o + column,
                                           padded_v);
  }
  if constexpr (kVectors > 1) {
    columns_of_values<kDType, kRows, kVectors / 2>(values, begin, end, column, head_size_v, s,
                                                   alpha, o, padded_v);
  }
}

template <DType kDType, int kRows>
HWY_INLINE void block_values(const StoredRows& values, std::int32_t count, std::int32_t head_size_v,
                             const float* s, const float* alpha, float* o, std::int64_t padded_v) {
  // 16 accumulators of 32 registers, or 8 of 16.
  constexpr int kVectors = HWY_TARGET == HWY_AVX2 ? 8 / kRows : 4;
  for (std::int32_t begin = 0; begin < count; begin += kKeysOfValues) {
    const std::int32_t end = std::min(begin + kKeysOfValues, count);
    const float* kept = begin == 0 ? alpha : kOnes;
    columns_of_values<kDType, kRows, kVectors>(values, begin, end, 0, head_size_v, s, kept, o,
                                               padded_v);
  }
}

template <DType kDType>
void head_values(const StoredRows& values, std::int32_t count, std::int32_t head_size_v,
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

template <DType kDType>
bool rows_are_finite(const StoredRows& rows, std::int32_t count, std::int32_t size) {
  const Df d;
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

struct DecodeKernels {
  HeadScores scores;
  HeadValues values;
  RowsAreFinite is_finite;  // rows and scales
};

template <DType kDType>
constexpr DecodeKernels decode_kernels_of() {
  return {head_scores<kDType>, head_values<kDType>, rows_are_finite<kDType>};
}

HWY_INLINE DecodeKernels decode_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return decode_kernels_of<DType::kFloat32>();
    case DType::kFloat16: return decode_kernels_of<DType::kFloat16>();
    case DType::kBFloat16: return decode_kernels_of<DType::kBFloat16>();
    case DType::kFloat8E4M3: return decode_kernels_of<DType::kFloat8E4M3>();
    case DType::kFloat8E5M2: return decode_kernels_of<DType::kFloat8E5M2>();
    default: return decode_kernels_of<DType::kInt8>();
  }
}

// P V row by row, with zeros in place of V for the keys that the row does not see.
HWY_NOINLINE inline void masked_values(const WorkItem& item, const KvTile& kv_tile,
                                       const StoredRows& values, const Partial& state) {
  const AttentionParams& p = *item.params;
  const Scratch& scratch = *item.scratch;
  const DecodeKernels kernels = decode_kernels(p.v.dtype);
  for (std::int32_t r = 0; r < item.rows; ++r) {
    const TileToken& token = scratch.tokens[r / p.layer.group];
    StoredRows seen = values;
    for (std::int32_t t = 0; t < kv_tile.count; ++t) {
      if (sees(p.batch, token, kv_tile.first + t)) continue;
      seen.row[t] = kZeroRow;
      seen.scale[t] = 1.0F;
    }
    float* s = scratch.s + r * kMaxKvTile;
    if (p.v.token_scales != nullptr) scale_columns(seen.scale, kv_tile.count, 1, s);
    kernels.values(seen, kv_tile.count, p.layer.head_size_v, 1, s, scratch.alpha + r,
                   state.o + r * item.padded_v, item.padded_v);
  }
}

// One step of an item: all its kv heads over one kv tile.
inline void attend_decode(const WorkItem& item, const KvTile& kv_tile, const KvTile& next,
                          const Partial& out) {
  const AttentionParams& p = *item.params;
  const Scratch& scratch = *item.scratch;
  const DecodeKernels k_kernels = decode_kernels(p.k.dtype);
  const DecodeKernels v_kernels = decode_kernels(p.v.dtype);
  StoredRows rows;
  for (std::int32_t h = 0; h < item.kv_heads; ++h) {
    const Partial state = head_of(item, out, h);
    stored_rows(item, p.k, kv_tile.k, kv_tile.count, next.k, next.count, h, &rows);
    k_kernels.scores(rows, kv_tile.count,
                     scratch.q + std::int64_t{h} * item.head_rows * item.padded_k, item.padded_k,
                     p.layer.head_size, item.rows, scratch.s);
    if (p.k.token_scales != nullptr) {
      scale_columns(rows.scale, kv_tile.count, item.rows, scratch.s);
    }
    softmax(item, kv_tile, h, state);
    stored_rows(item, p.v, kv_tile.v, kv_tile.count, next.v, next.count, h, &rows);
    if (!seen_by_all(item, kv_tile) &&
        !v_kernels.is_finite(rows, kv_tile.count, p.layer.head_size_v)) {
      masked_values(item, kv_tile, rows, state);
      continue;
    }
    if (p.v.token_scales != nullptr) {
      scale_columns(rows.scale, kv_tile.count, item.rows, scratch.s);
    }
    v_kernels.values(rows, kv_tile.count, p.layer.head_size_v, item.rows, scratch.s, scratch.alpha,
                     state.o, item.padded_v);
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
