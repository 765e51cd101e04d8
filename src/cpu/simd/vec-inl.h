// The vector operations of the CPU kernels, on Highway. Included once per target.
#if defined(QUIRE_CPU_SIMD_VEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_SIMD_VEC_INL_H_
#undef QUIRE_CPU_SIMD_VEC_INL_H_
#else
#define QUIRE_CPU_SIMD_VEC_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "quire/types.h"
#include "semantics/int4.h"
#include "semantics/quant.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Fixed-size vectors only: kernels keep them in arrays.
using Df = hn::ScalableTag<float>;
using Vf = hn::Vec<Df>;
constexpr std::size_t kLanes = hn::MaxLanes(Df());
constexpr auto kVec = static_cast<std::int64_t>(kLanes);

// ---- widening: one row of any stored type to float ----------------------------------------

template <DType kDType>
HWY_INLINE Vf load_widened(const void* row, std::size_t i) {
  const Df d;
  const hn::RebindToSigned<Df> di;
  if constexpr (kDType == DType::kFloat32) {
    return hn::LoadU(d, static_cast<const float*>(row) + i);
  } else if constexpr (kDType == DType::kBFloat16) {
    const hn::Rebind<std::uint16_t, Df> d16;
    const hn::RebindToUnsigned<Df> du;
    const auto bits = hn::PromoteTo(du, hn::LoadU(d16, static_cast<const std::uint16_t*>(row) + i));
    return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  } else if constexpr (kDType == DType::kFloat16 && HWY_TARGET == HWY_SCALAR) {
    // Highway's own code for machines without the instruction takes Inf and NaN for numbers.
    return hn::Set(d, semantics::fp16_to_float(static_cast<const std::uint16_t*>(row)[i]));
  } else if constexpr (kDType == DType::kFloat16) {
    const hn::Rebind<hwy::float16_t, Df> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, static_cast<const hwy::float16_t*>(row) + i));
  } else if constexpr (kDType == DType::kInt8) {
    const hn::Rebind<std::int8_t, Df> d8;
    return hn::ConvertTo(
        d, hn::PromoteTo(di, hn::LoadU(d8, static_cast<const std::int8_t*>(row) + i)));
  } else {
    // fp8: shift the magnitude into place and re-bias; small codes are integers times an ulp.
    constexpr bool kE4M3 = kDType == DType::kFloat8E4M3;
    constexpr int kMantissa = kE4M3 ? 3 : 2;
    constexpr int kBias = kE4M3 ? 7 : 15;
    const hn::Rebind<std::uint8_t, Df> d8;
    const auto code = hn::PromoteTo(di, hn::LoadU(d8, static_cast<const std::uint8_t*>(row) + i));
    const auto magnitude = hn::And(code, hn::Set(di, 0x7F));
    const auto sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(di, 0x80)));
    const auto normal =
        hn::Add(hn::ShiftLeft<23 - kMantissa>(magnitude), hn::Set(di, (127 - kBias) << 23));
    const Vf ulp = hn::BitCast(d, hn::Set(di, (127 + 1 - kBias - kMantissa) << 23));
    const auto subnormal = hn::BitCast(di, hn::Mul(hn::ConvertTo(d, magnitude), ulp));
    auto bits = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 1 << kMantissa)), subnormal, normal);
    if constexpr (kE4M3) {
      bits = hn::IfThenElse(hn::Eq(magnitude, hn::Set(di, 0x7F)), hn::Set(di, 0x7FC00000), bits);
    } else {
      const auto special =
          hn::Or(hn::Set(di, 0x7F800000), hn::ShiftLeft<21>(hn::And(magnitude, hn::Set(di, 3))));
      bits = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7B)), special, bits);
    }
    return hn::BitCast(d, hn::Or(bits, sign));
  }
}

// to[0, padded) = row[0, size) * scale, then zeros. Never reads past the row's `size` elements.
template <DType kDType>
void widen_row(const void* row, std::int32_t size, float scale, float* HWY_RESTRICT to,
               std::int32_t padded) {
  const Df d;
  const Vf factor = hn::Set(d, scale);
  const auto lanes = static_cast<std::int32_t>(kLanes);
  std::int32_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    hn::StoreU(hn::Mul(load_widened<kDType>(row, static_cast<std::size_t>(i)), factor), d, to + i);
  }
  if (i < size) {
    constexpr std::size_t kBytes = static_cast<std::size_t>(size_of(kDType));
    HWY_ALIGN unsigned char tail[kLanes * kBytes] = {};
    std::memcpy(tail, static_cast<const unsigned char*>(row) + static_cast<std::size_t>(i) * kBytes,
                static_cast<std::size_t>(size - i) * kBytes);
    HWY_ALIGN float wide[kLanes];
    hn::Store(hn::Mul(load_widened<kDType>(tail, 0), factor), d, wide);
    for (std::int32_t rest = 0; i < size; ++i, ++rest) to[i] = wide[rest];
  }
  for (; i < padded; ++i) to[i] = 0.0F;
}

// The same of an int4 row, whose scale holds its zero point too. Compilers make vectors of it.
inline void widen_int4_row(const void* row, std::int32_t size, float scale, float* HWY_RESTRICT to,
                           std::int32_t padded) {
  const auto* bytes = static_cast<const std::uint8_t*>(row);
  const semantics::Int4Scale stored(scale);
  const auto zero = static_cast<std::int32_t>(stored.zero);
  for (std::ptrdiff_t i = 0; i < size / 2; ++i) {
    const std::int32_t byte = bytes[i];
    to[2 * i] = static_cast<float>((byte & 15) - zero) * stored.scale;
    to[2 * i + 1] = static_cast<float>((byte >> 4) - zero) * stored.scale;
  }
  for (std::int32_t i = size; i < padded; ++i) to[i] = 0.0F;
}

using WidenRow = void (*)(const void*, std::int32_t, float, float*, std::int32_t);

HWY_INLINE WidenRow widener(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return widen_row<DType::kFloat32>;
    case DType::kFloat16: return widen_row<DType::kFloat16>;
    case DType::kBFloat16: return widen_row<DType::kBFloat16>;
    case DType::kFloat8E4M3: return widen_row<DType::kFloat8E4M3>;
    case DType::kFloat8E5M2: return widen_row<DType::kFloat8E5M2>;
    case semantics::kInt4: return widen_int4_row;
    default: return widen_row<DType::kInt8>;
  }
}

// ---- narrowing: floats to one row of an output ---------------------------------------------

// to[0, size) = from[0, size) * scale / divisor in `dtype`. Only 8-bit dtypes divide; for the
// others the divisor must be 1.
inline void store_row(const float* from, std::int64_t size, float scale, float divisor, void* to,
                      DType dtype) {
  const Df d;
  const hn::RebindToUnsigned<Df> du;
  const hn::Rebind<std::uint16_t, Df> d16;
  const hn::Rebind<hwy::float16_t, Df> df16;
  const Vf factor = hn::Set(d, scale);
  std::int64_t i = 0;
  const std::int64_t whole = size - size % kVec;
  if (dtype == DType::kFloat32) {
    for (; i < whole; i += kVec) {
      hn::StoreU(hn::Mul(hn::LoadU(d, from + i), factor), d, static_cast<float*>(to) + i);
    }
  } else if (dtype == DType::kFloat16 &&
             HWY_TARGET != HWY_SCALAR) {  // HWY_SCALAR: as in load_widened
    for (; i < whole; i += kVec) {
      hn::StoreU(hn::DemoteTo(df16, hn::Mul(hn::LoadU(d, from + i), factor)), df16,
                 static_cast<hwy::float16_t*>(to) + i);
    }
  } else if (dtype == DType::kBFloat16) {
    for (; i < whole; i += kVec) {
      const Vf x = hn::Mul(hn::LoadU(d, from + i), factor);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
      const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF)));
      const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
      const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
      const auto code = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<Df>(), code)), d16,
                 static_cast<std::uint16_t*>(to) + i);
    }
  }
  for (; i < size; ++i) semantics::store_element(to, dtype, i, from[i] * scale / divisor);
}

// ---- across lanes -------------------------------------------------------------------------

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE Vf even_lanes(Vf, Vf low) { return low; }
HWY_INLINE Vf odd_lanes(Vf, Vf low) { return low; }
#else
HWY_INLINE Vf even_lanes(Vf high, Vf low) { return hn::ConcatEven(Df(), high, low); }
HWY_INLINE Vf odd_lanes(Vf high, Vf low) { return hn::ConcatOdd(Df(), high, low); }
#endif

// Loops over arrays of vectors are unrolled by recursion and pragmas: left to the compiler, the
// arrays went to memory instead of registers.

// The sums of kLanes vectors, in order, as one vector. Each step adds neighbours and halves the
// number of vectors: kLanes - 1 steps of two shuffles and an addition.
template <std::size_t kCount = kLanes>
HWY_INLINE Vf sums_of(Vf (&v)[kLanes]) {
  if constexpr (kCount > 1) {
    HWY_UNROLL(16)
    for (std::size_t i = 0; i < kCount / 2; ++i) {
      v[i] = hn::Add(even_lanes(v[2 * i + 1], v[2 * i]), odd_lanes(v[2 * i + 1], v[2 * i]));
    }
    return sums_of<kCount / 2>(v);
  } else {
    return v[0];
  }
}

// Transposes kLanes x kLanes in place. Splitting neighbours into evens and odds rotates the bits of
// (row, column) by one; log2(kLanes) rotations exchange row and column.
template <std::size_t kSteps = kLanes>
HWY_INLINE void transpose(Vf (&v)[kLanes]) {
  if constexpr (kSteps > 1) {
    Vf next[kLanes];
    HWY_UNROLL(16)
    for (std::size_t i = 0; i < kLanes / 2; ++i) {
      next[i] = even_lanes(v[2 * i + 1], v[2 * i]);
      next[i + kLanes / 2] = odd_lanes(v[2 * i + 1], v[2 * i]);
    }
    HWY_UNROLL(16)
    for (std::size_t i = 0; i < kLanes; ++i) v[i] = next[i];
    transpose<kSteps / 2>(v);
  }
}

// ---- finite or not ---------------------------------------------------------------------------

// The greatest of the bits of |x|, sign shifted out: infinity and NaN are above all finite numbers.
using MagnitudeBits = hn::Vec<hn::RebindToUnsigned<Df>>;
HWY_INLINE MagnitudeBits greater_magnitude(MagnitudeBits greatest, Vf x) {
  return hn::Max(greatest, hn::ShiftLeft<1>(hn::BitCast(hn::RebindToUnsigned<Df>(), x)));
}
HWY_INLINE bool is_finite(MagnitudeBits greatest) {
  const hn::RebindToUnsigned<Df> du;
  return hn::AllTrue(du, hn::Lt(greatest, hn::Set(du, 0xFF000000U)));
}

// ---- exponential ---------------------------------------------------------------------------

// exp(x) * 2^-kDownLog2 for x <= 0, to 2 ulp; 0 where that is below the normal numbers. NaN stays
// NaN, which hn::Exp turns into 0. Not for x above 0.
template <int kDownLog2 = 0>
HWY_INLINE Vf exp_below_0(Vf x) {
  const Df d;
  const hn::RebindToSigned<Df> di;
  constexpr float kLn2 = 0.693147180559945F;
  // 2^n * (1 + p(r)) with n the nearest integer to x / ln 2 and r what is left, |r| <= ln 2 / 2;
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const auto n = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504088896F)));
  const Vf nf = hn::ConvertTo(d, n);
  Vf r = hn::MulAdd(nf, hn::Set(d, -0.693145751953125F), x);
  r = hn::MulAdd(nf, hn::Set(d, -1.428606765330187e-6F), r);
  // (exp(r) - 1 - r) / r^2, minimax: Highway's coefficients.
  const Vf r2 = hn::Mul(r, r);
  const Vf a = hn::MulAdd(hn::Set(d, 0.166666671633720F), r, hn::Set(d, 0.5F));
  const Vf b = hn::MulAdd(hn::Set(d, 0.00833336077630520F), r, hn::Set(d, 0.0416664853692055F));
  const Vf c = hn::MulAdd(hn::Set(d, 0.000198527617612854F), r, hn::Set(d, 0.00139304355252535F));
  const Vf p = hn::MulAdd(hn::Mul(r2, r2), c, hn::MulAdd(r2, b, a));
  const Vf mantissa = hn::Add(hn::MulAdd(p, r2, r), hn::Set(d, 1.0F));
  const auto power = hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127 - kDownLog2)));
  const Vf lowest = hn::Set(d, static_cast<float>(kDownLog2 - 126) * kLn2);
  return hn::IfThenZeroElse(hn::Lt(x, lowest), hn::Mul(mantissa, hn::BitCast(d, power)));
}

// ---- the number type of score.inc ------------------------------------------------------------

struct VecOps {
  HWY_INLINE Vf mul(Vf a, Vf b) const { return hn::Mul(a, b); }
  HWY_INLINE Vf add(Vf a, Vf b) const { return hn::Add(a, b); }
  HWY_INLINE Vf neg(Vf a) const { return hn::Neg(a); }
  HWY_INLINE Vf max(Vf a, Vf b) const { return hn::Max(a, b); }
  HWY_INLINE Vf sqrt(Vf a) const { return hn::Sqrt(a); }
  HWY_INLINE Vf tanh(Vf a) const { return hn::Tanh(Df(), a); }
  HWY_INLINE Vf zero() const { return hn::Zero(Df()); }
};

#include "semantics/score.inc"

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
