// Number formats: float <-> fp16, bf16, fp8 (e4m3fn, e5m2), int8, in integer arithmetic, so that
// every compiler and device rounds alike: to nearest even; fp8 saturates to the largest finite
// value; NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "quire/kv_cache.h"
#include "quire/types.h"
#include "semantics/host_device.h"

namespace quire::semantics {

inline constexpr float kE4M3Max = 448.0F;
inline constexpr float kE5M2Max = 57344.0F;
inline constexpr float kInt8Max = 127.0F;
inline constexpr float kMinTokenHeadScale = 1e-6F;
// Block-scale output: keeps x / s finite where a whole group is 0.
inline constexpr float kMinBlockScale = 1.17549435e-38F;  // the smallest normal float
inline constexpr std::int64_t kOutputGroup = 128;

QUIRE_HOST_DEVICE std::uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return std::bit_cast<std::uint32_t>(x);
#endif
}

QUIRE_HOST_DEVICE float bits_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

QUIRE_HOST_DEVICE float value_of(const Scale& scale) {
  return scale.data != nullptr ? *scale.data : scale.value;
}

namespace detail {

// |x| -> the code of the nearest value of a format with `kMantissa` bits and exponent bias `kBias`,
// ignoring overflow. Below the smallest normal the sum with 2^k makes the FPU round at the
// subnormal's last place.
template <int kMantissa, int kBias>
QUIRE_HOST_DEVICE std::uint32_t round_magnitude(float magnitude) {
  constexpr std::uint32_t kShift = 23 - kMantissa;
  constexpr std::uint32_t kMinNormal = static_cast<std::uint32_t>(127 + 1 - kBias) << 23;
  const std::uint32_t bits = float_bits(magnitude);
  if (bits < kMinNormal) {
    constexpr std::uint32_t kMagic = static_cast<std::uint32_t>(127 + 1 - kBias + kShift) << 23;
    return float_bits(magnitude + bits_float(kMagic)) - kMagic;
  }
  const std::uint32_t rounded = bits + ((bits >> kShift) & 1U) + ((1U << (kShift - 1)) - 1U);
  return (rounded >> kShift) - (static_cast<std::uint32_t>(127 - kBias) << kMantissa);
}

// A code without its sign back to float. Not for the codes of infinity and NaN.
template <int kMantissa, int kBias>
QUIRE_HOST_DEVICE float expand_magnitude(std::uint32_t code) {
  constexpr std::uint32_t kShift = 23 - kMantissa;
  if ((code >> kMantissa) == 0) {
    constexpr std::uint32_t kUlp = static_cast<std::uint32_t>(127 + 1 - kBias - kMantissa) << 23;
    return static_cast<float>(code) * bits_float(kUlp);
  }
  return bits_float((code << kShift) + (static_cast<std::uint32_t>(127 - kBias) << 23));
}

}  // namespace detail

QUIRE_HOST_DEVICE std::uint16_t float_to_bf16(float x) {
  const std::uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

QUIRE_HOST_DEVICE float bf16_to_float(std::uint16_t code) {
  return bits_float(static_cast<std::uint32_t>(code) << 16);
}

QUIRE_HOST_DEVICE std::uint16_t float_to_fp16(float x) {
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t code;
  if (magnitude > 0x7F800000U) {
    code = 0x7E00U;
  } else if (magnitude >= 0x477FF000U) {  // 65520 and up rounds to infinity
    code = 0x7C00U;
  } else {
    code = detail::round_magnitude<10, 15>(bits_float(magnitude));
  }
  return static_cast<std::uint16_t>(sign | code);
}

QUIRE_HOST_DEVICE float fp16_to_float(std::uint16_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x8000U) << 16;
  const std::uint32_t magnitude = code & 0x7FFFU;
  const float value = magnitude >= 0x7C00U ? bits_float(0x7F800000U | ((magnitude & 0x3FFU) << 13))
                                           : detail::expand_magnitude<10, 15>(magnitude);
  return bits_float(sign | float_bits(value));
}

QUIRE_HOST_DEVICE std::uint8_t float_to_e4m3(float x) {
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t sign = (bits >> 24) & 0x80U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<std::uint8_t>(sign | 0x7FU);
  std::uint32_t code = 0x7EU;
  if (bits_float(magnitude) < kE4M3Max) {
    code = detail::round_magnitude<3, 7>(bits_float(magnitude));
  }
  return static_cast<std::uint8_t>(sign | code);
}

QUIRE_HOST_DEVICE float e4m3_to_float(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80U) << 24;
  const std::uint32_t magnitude = code & 0x7FU;
  const float value =
      magnitude == 0x7FU ? bits_float(0x7FC00000U) : detail::expand_magnitude<3, 7>(magnitude);
  return bits_float(sign | float_bits(value));
}

QUIRE_HOST_DEVICE std::uint8_t float_to_e5m2(float x) {
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t sign = (bits >> 24) & 0x80U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<std::uint8_t>(sign | 0x7FU);
  std::uint32_t code = 0x7BU;
  if (bits_float(magnitude) < kE5M2Max) {
    code = detail::round_magnitude<2, 15>(bits_float(magnitude));
  }
  return static_cast<std::uint8_t>(sign | code);
}

QUIRE_HOST_DEVICE float e5m2_to_float(std::uint8_t code) {
  return fp16_to_float(static_cast<std::uint16_t>(code << 8));
}

// Nearest even, saturated to [-127, 127]; NaN becomes 0 (int8 has none).
QUIRE_HOST_DEVICE std::int8_t float_to_int8(float x) {
  if (!(x == x)) return 0;
  const float clamped = x < -kInt8Max ? -kInt8Max : (x > kInt8Max ? kInt8Max : x);
#if defined(__CUDA_ARCH__)
  return static_cast<std::int8_t>(__float2int_rn(clamped));
#else
  return static_cast<std::int8_t>(std::lrintf(clamped));
#endif
}

// The scale of one token's head vector, from its largest magnitude. Multiplied by 1 / qmax, and
// elements by 1 / scale, as vLLM's kernel does: divided, one scale in four has another last bit.
QUIRE_HOST_DEVICE float token_head_scale(float absmax, float qmax) {
  const float scale = absmax * (1.0F / qmax);
  return scale > kMinTokenHeadScale ? scale : kMinTokenHeadScale;
}

QUIRE_HOST_DEVICE float block_output_scale(float absmax) {
  const float scale = absmax / kE4M3Max;
  return scale > kMinBlockScale ? scale : kMinBlockScale;
}

// Element `i` of a row of `dtype`, unscaled.
QUIRE_HOST_DEVICE float load_element(const void* row, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(row)[i];
    case DType::kFloat16: return fp16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::kBFloat16: return bf16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::kFloat8E4M3: return e4m3_to_float(static_cast<const std::uint8_t*>(row)[i]);
    case DType::kFloat8E5M2: return e5m2_to_float(static_cast<const std::uint8_t*>(row)[i]);
    case DType::kInt8: return static_cast<float>(static_cast<const std::int8_t*>(row)[i]);
    default: return 0.0F;
  }
}

QUIRE_HOST_DEVICE void store_element(void* row, DType dtype, std::int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(row)[i] = x; break;
    case DType::kFloat16: static_cast<std::uint16_t*>(row)[i] = float_to_fp16(x); break;
    case DType::kBFloat16: static_cast<std::uint16_t*>(row)[i] = float_to_bf16(x); break;
    case DType::kFloat8E4M3: static_cast<std::uint8_t*>(row)[i] = float_to_e4m3(x); break;
    case DType::kFloat8E5M2: static_cast<std::uint8_t*>(row)[i] = float_to_e5m2(x); break;
    case DType::kInt8: static_cast<std::int8_t*>(row)[i] = float_to_int8(x); break;
    default: break;
  }
}

}  // namespace quire::semantics
