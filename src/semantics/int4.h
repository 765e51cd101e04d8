// int4_per_token_head, in vLLM's bytes: how a head vector is rotated, rounded and stored, and read
// back.
//
//   y = H D x                     D: fixed signs; H: a Hadamard matrix (Sylvester's) of 1 and -1
//   y = scale * (code - zero)     codes 0 to 15, two a byte, the even element in the low half;
//                                 zero: the four lowest bits of the vector's float32 scale
//
// x is rounded to bf16 before, and y after: what H D makes of a vector looks like noise, whose
// range 16 steps fill well. H D turns vectors of `block` elements and makes them longer by
// sqrt(block), so dot(q, k) = dot(H D q, H D k) / block: attention takes H D q / block for q, sums
// up rotated V, and takes D H o / block for its output. Vectors of other sizes are several blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "quire/types.h"
#include "semantics/host_device.h"
#include "semantics/quant.h"

namespace quire::semantics {

// What KvParams::dtype says of an int4 cache: bytes of two codes.
inline constexpr DType kInt4 = DType::kUInt8;
inline constexpr int kMostInt4Elements = 576;
inline constexpr float kMinInt4Scale = 1e-6F;

// The largest power of two that divides a vector's size.
QUIRE_HOST_DEVICE int rotation_block(int size) { return size & -size; }

// Whether D turns element i of a block around: vLLM's signs, which are bit 23 of the words of
// std::mt19937(0x9E3779B9), as torch.bernoulli draws them; the same for every block.
QUIRE_HOST_DEVICE bool is_turned(int i) {
  constexpr std::uint32_t kSigns[] = {0x9A8CA6F2U, 0x7F7FCA4EU, 0x59BBC293U, 0x9480ABC7U,
                                      0xB55B747EU, 0x54503BBEU, 0xCDF467B7U, 0x05DFBC5FU,
                                      0xB291E3CCU, 0x57563834U, 0xE46AE225U, 0x67FC4CA6U,
                                      0xCFC78691U, 0x32D9DFF1U, 0x365FDB89U, 0x75625346U};
  return (kSigns[i / 32] >> (i % 32) & 1U) != 0;
}

// The threads that work on a vector together, where it is one: the CPU.
struct OneThread {
  static constexpr int kSize = 1;
  static int thread() { return 0; }
  static void sync() {}
};

// H of each block of x, in place: sums and differences of elements 1, 2, 4, ... apart. All threads
// of a Team call it.
template <class Team, class T>
QUIRE_DEVICE void hadamard(T* x, int size) {
  const int block = rotation_block(size);
  for (int distance = 1; distance < block; distance *= 2) {
    Team::sync();
    for (int i = Team::thread(); i < size / 2; i += Team::kSize) {
      T* a = x + 2 * i - (i & (distance - 1));
      const T difference = a[0] - a[distance];
      a[0] = a[0] + a[distance];
      a[distance] = difference;
    }
  }
  Team::sync();
}

// x = D x / divisor.
template <class Team, class T>
QUIRE_DEVICE void turn(T* x, int size, int divisor) {
  const T factor = T{1} / static_cast<T>(divisor);
  const int block = rotation_block(size);
  for (int i = Team::thread(); i < size; i += Team::kSize) {
    x[i] = is_turned(i & (block - 1)) ? -x[i] * factor : x[i] * factor;
  }
}

// A query, and an output (or any part of it before it is normalised), as above.
template <class Team, class T>
QUIRE_DEVICE void rotate_query(T* x, int size) {
  turn<Team>(x, size, rotation_block(size));
  hadamard<Team>(x, size);
}
template <class Team, class T>
QUIRE_DEVICE void rotate_output(T* x, int size) {
  hadamard<Team>(x, size);
  turn<Team>(x, size, rotation_block(size));
  Team::sync();
}

QUIRE_HOST_DEVICE float rounded_to_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

// y of a row of K or V.
template <class Team>
QUIRE_DEVICE void rotate_row(const void* x, DType from, int size, float* y) {
  for (int i = Team::thread(); i < size; i += Team::kSize) {
    y[i] = rounded_to_bf16(load_element(x, from, i));
  }
  turn<Team>(y, size, 1);
  hadamard<Team>(y, size);
  for (int i = Team::thread(); i < size; i += Team::kSize) y[i] = rounded_to_bf16(y[i]);
}

// The smallest and the largest element of a vector, and 0: so zero points are 0 to 15. NaN counts
// as infinity, which makes the scale infinite and the whole vector NaN.
struct Int4Range {
  float low = 0.0F;
  float high = 0.0F;
  QUIRE_HOST_DEVICE void add(float y) {
    if (!(y <= high)) high = y == y ? y : INFINITY;
    if (y < low) low = y;
  }
};

// Elements to codes. Written as vLLM's kernel computes it (a multiplication with 1 / 15, fused
// multiply-additions): other ways give other bits.
struct Int4Encoder {
  float scale;
  float inverse;
  float zero;

  QUIRE_HOST_DEVICE explicit Int4Encoder(const Int4Range& range) {
    const float step = (range.high - range.low) * (1.0F / 15.0F);
    scale = step > kMinInt4Scale ? step : kMinInt4Scale;
    inverse = 1.0F / scale;
    zero = static_cast<float>(clamped(std::fma(-range.low, inverse, 0.5F)));
  }
  QUIRE_HOST_DEVICE std::uint32_t code(float y) const {
    return clamped(std::fma(y, inverse, zero + 0.5F));
  }
  QUIRE_HOST_DEVICE float stored_scale() const {
    return bits_float((float_bits(scale) & ~15U) | static_cast<std::uint32_t>(zero));
  }

  // Rounded down to 0 ... 15; NaN to 0.
  static QUIRE_HOST_DEVICE std::uint32_t clamped(float x) {
    return x >= 15.0F ? 15U : (x > 0.0F ? static_cast<std::uint32_t>(x) : 0U);
  }
};

// What a stored scale says. One that is not finite makes NaN of the whole vector.
struct Int4Scale {
  float scale;
  float zero;
  explicit QUIRE_HOST_DEVICE Int4Scale(float stored) {
    const std::uint32_t bits = float_bits(stored);
    const bool finite = (bits & 0x7F800000U) != 0x7F800000U;
    scale = bits_float(finite ? bits & ~15U : 0x7FC00000U);
    zero = static_cast<float>(bits & 15U);
  }
};

QUIRE_HOST_DEVICE float int4_code(const void* row, std::int64_t i) {
  const std::uint32_t byte = static_cast<const std::uint8_t*>(row)[i / 2];
  return static_cast<float>(i % 2 == 0 ? byte & 15U : byte >> 4);
}

}  // namespace quire::semantics
