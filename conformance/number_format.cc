#include "conformance/number_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "conformance/int4.h"

namespace quire::conformance {
namespace {

// A binary float of at most 16 bits.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  double max_finite;
  bool has_infinity;  // else overflow saturates
  std::uint32_t nan;

  int min_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
  std::uint32_t sign_bit() const { return 1U << (exponent_bits + mantissa_bits); }
};

constexpr Format kHalf{5, 10, 65504.0, true, 0x7E00};
constexpr Format kBrain{8, 7, 0x1.FEp127, true, 0x7FC0};
constexpr Format kE4m3{4, 3, 448.0, false, 0x7F};
constexpr Format kE5m2{5, 2, 57344.0, false, 0x7E};

// Of a normal number; below all exponents of Format for zero and subnormals.
int exponent_of(double magnitude) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &magnitude, sizeof bits);
  return static_cast<int>(bits >> 52U & 0x7FFU) - 1023;
}

double power_of_two(int exponent) {
  const std::uint64_t bits = static_cast<std::uint64_t>(std::clamp(exponent, -1022, 1023) + 1023)
                             << 52U;
  double value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t encode_bits(const Format& format, double value) {
  const std::uint32_t sign = std::signbit(value) ? format.sign_bit() : 0;
  if (std::isnan(value)) return sign | format.nan;
  const double magnitude = std::fabs(value);
  const int exponent = std::max(format.min_exponent(), exponent_of(magnitude));
  // Steps of the binade; a product with a power of two is exact. The sum with 2^52 leaves no bits
  // for a fraction: rounds to nearest, ties to even. (nearbyint() is a call without SSE4.1.)
  const double quantum = power_of_two(exponent - format.mantissa_bits);
  double steps = magnitude * power_of_two(format.mantissa_bits - exponent);
  if (steps < 0x1p51) steps = (steps + 0x1p52) - 0x1p52;
  if (!std::isfinite(magnitude) || steps * quantum > format.max_finite) {
    if (format.has_infinity) {
      return sign | (((1U << format.exponent_bits) - 1) << format.mantissa_bits);
    }
    return sign | encode_bits(format, format.max_finite);
  }
  // Counting steps from the start of the binade also carries into the next one, and a subnormal's
  // (implicit bit absent) lands in exponent field 0 by itself.
  const auto field = static_cast<std::uint32_t>(exponent - format.min_exponent());
  return sign | ((field << format.mantissa_bits) + static_cast<std::uint32_t>(steps));
}

double decode_bits(const Format& format, std::uint32_t bits) {
  const double sign = (bits & format.sign_bit()) != 0 ? -1.0 : 1.0;
  const std::uint32_t magnitude = bits & (format.sign_bit() - 1);
  const auto field = static_cast<int>(magnitude >> format.mantissa_bits);
  const std::uint32_t fraction = magnitude & ((1U << format.mantissa_bits) - 1);
  const std::uint32_t one = 1U << format.mantissa_bits;
  // Only e4m3 uses its highest exponent for numbers; its one NaN is all ones.
  const bool is_e4m3 = format.exponent_bits == 4;
  if (is_e4m3 && magnitude == format.nan) return std::numeric_limits<double>::quiet_NaN();
  if (!is_e4m3 && field == (1 << format.exponent_bits) - 1) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const std::uint32_t steps = field == 0 ? fraction : one + fraction;
  const int exponent = format.min_exponent() + std::max(field - 1, 0);
  return sign * std::ldexp(static_cast<double>(steps), exponent - format.mantissa_bits);
}

std::vector<float> decode_table(const Format& format) {
  std::vector<float> table(std::size_t{2} * format.sign_bit());
  for (std::uint32_t bits = 0; bits < table.size(); ++bits) {
    table[bits] = static_cast<float>(decode_bits(format, bits));
  }
  return table;
}

// Values of all codes of a binary float of at most 16 bits; null for other types.
const float* table_of(DType dtype) {
  static const std::vector<float> half = decode_table(kHalf);
  static const std::vector<float> brain = decode_table(kBrain);
  static const std::vector<float> e4m3 = decode_table(kE4m3);
  static const std::vector<float> e5m2 = decode_table(kE5m2);
  switch (dtype) {
    case DType::kFloat16: return half.data();
    case DType::kBFloat16: return brain.data();
    case DType::kFloat8E4M3: return e4m3.data();
    case DType::kFloat8E5M2: return e5m2.data();
    default: return nullptr;
  }
}

template <class T>
void table_row(const float* table, const char* codes, std::int64_t count, double* values) {
  for (std::int64_t i = 0; i < count; ++i) {
    T code;
    std::memcpy(&code, codes + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    values[i] = table[code];
  }
}

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void store(double value, void* to) {
  const auto stored = static_cast<T>(value);
  std::memcpy(to, &stored, sizeof(T));
}

template <class T>
void store_integer(double value, void* to) {
  constexpr auto kLow = static_cast<double>(std::numeric_limits<T>::min());
  constexpr auto kHigh = static_cast<double>(std::numeric_limits<T>::max());
  if (value >= kHigh) {
    const T highest = std::numeric_limits<T>::max();  // int64's maximum is no double
    std::memcpy(to, &highest, sizeof(T));
    return;
  }
  store<T>(std::max(std::nearbyint(value), kLow), to);
}

}  // namespace

double decode(DType dtype, const void* element) {
  const float* table = table_of(dtype);
  switch (dtype) {
    case DType::kFloat32: return load<float>(element);
    case DType::kFloat16:
    case DType::kBFloat16: return table[load<std::uint16_t>(element)];
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2: return table[load<std::uint8_t>(element)];
    case DType::kInt8: return load<std::int8_t>(element);
    case DType::kUInt8:
    case DType::kBool: return load<std::uint8_t>(element);
    case DType::kInt32: return load<std::int32_t>(element);
    case DType::kInt64: return static_cast<double>(load<std::int64_t>(element));
    case DType::kNone: break;
  }
  return 0;
}

void encode(DType dtype, double value, void* element) {
  switch (dtype) {
    case DType::kFloat32: return store<float>(value, element);
    case DType::kFloat16: return store<std::uint16_t>(encode_bits(kHalf, value), element);
    case DType::kBFloat16: return store<std::uint16_t>(encode_bits(kBrain, value), element);
    case DType::kFloat8E4M3: return store<std::uint8_t>(encode_bits(kE4m3, value), element);
    case DType::kFloat8E5M2: return store<std::uint8_t>(encode_bits(kE5m2, value), element);
    case DType::kInt8: return store_integer<std::int8_t>(value, element);
    case DType::kUInt8:
    case DType::kBool: return store_integer<std::uint8_t>(value, element);
    case DType::kInt32: return store_integer<std::int32_t>(value, element);
    case DType::kInt64: return store_integer<std::int64_t>(value, element);
    case DType::kNone: break;
  }
}

void decode_row(DType dtype, const void* elements, std::int64_t count, double* values) {
  const auto* bytes = static_cast<const char*>(elements);
  const std::int64_t size = size_of(dtype);
  const float* table = table_of(dtype);
  if (table != nullptr && size == 2) return table_row<std::uint16_t>(table, bytes, count, values);
  if (table != nullptr) return table_row<std::uint8_t>(table, bytes, count, values);
  for (std::int64_t i = 0; i < count; ++i) values[i] = decode(dtype, bytes + i * size);
}

bool is_float8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 ||
         is_float8(dtype);
}

double smallest_step(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return 0x1p-24;
    case DType::kFloat8E4M3: return 0x1p-9;
    case DType::kFloat8E5M2: return 0x1p-16;
    default: return 0x1p-126;  // float32 and bf16 kernels may flush subnormals
  }
}

int ordinal_of_float8(std::uint8_t code) {
  const int magnitude = code & 0x7F;
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

void fill_poison(DType dtype, void* elements, std::int64_t count) {
  const double value = is_float(dtype) ? std::numeric_limits<double>::quiet_NaN()
                                       : -std::numeric_limits<double>::infinity();
  auto* bytes = static_cast<char*>(elements);
  const std::int64_t size = size_of(dtype);
  if (count <= 0) return;
  encode(dtype, value, bytes);
  for (std::int64_t done = 1; done < count; done *= 2) {
    std::memcpy(bytes + done * size, bytes, std::min(done, count - done) * size);
  }
}

double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 1e-5;
    case DType::kFloat16: return 2e-3;
    case DType::kBFloat16: return 1e-2;
    default: return 5e-2;
  }
}

void quantise_row(KvCacheDType kind, DType from, const void* values, std::int64_t count,
                  float tensor_scale, DType storage, void* stored, float* own_scale) {
  std::vector<double> row(count);
  decode_row(from, values, count, row.data());
  if (kind == KvCacheDType::kInt4PerTokenHead) {
    return store_int4_row(row.data(), count, static_cast<std::uint8_t*>(stored), own_scale);
  }
  float scale = is_per_tensor_fp8(kind) ? tensor_scale : 1.0F;
  if (is_per_token_head(kind)) {
    float absmax = 0;
    for (const double x : row) absmax = std::max(absmax, std::fabs(static_cast<float>(x)));
    const float qmax = kind == KvCacheDType::kInt8PerTokenHead ? 127.0F : 448.0F;
    scale = std::max(absmax * (1.0F / qmax), 1e-6F);
    *own_scale = scale;
  }
  auto* bytes = static_cast<char*>(stored);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto x = static_cast<float>(row[i]);
    double bounded = is_per_token_head(kind) ? x * (1.0F / scale) : x / scale;
    if (storage == DType::kInt8) bounded = std::clamp(bounded, -127.0, 127.0);
    encode(storage, bounded, bytes + i * size_of(storage));
  }
}

}  // namespace quire::conformance
