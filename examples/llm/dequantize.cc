#include "dequantize.h"

#include <bit>
#include <cstddef>
#include <cstring>

// One build for each instruction set, picked at run time: every product widens its weights, so that
// this is a third of what generation does.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "examples/llm/dequantize.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace quire::llm::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kBlock = 32;  // elements of a Q4_0, Q4_1 or Q8_0 block

// At most 16 lanes, so that they divide half a block of 4-bit elements.
using Floats = hn::CappedTag<float, 16>;
constexpr Floats kFloats;
constexpr hn::Rebind<std::int32_t, Floats> kInts;
constexpr hn::Rebind<std::int8_t, Floats> kBytes;
constexpr hn::Rebind<std::uint8_t, Floats> kNibbles;
using V = hn::Vec<Floats>;

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// Exact for every half, subnormals, infinities and NaNs included. Normal halves are rebiased by a
// multiplication, which also normalises the subnormal ones.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7FFFU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(scaled);
  if ((half & 0x7C00U) == 0x7C00U) bits = magnitude | 0x7F800000U;
  return std::bit_cast<float>(bits | sign);
}

// A strip of a weight is widened, then multiplied: the hardware's own prefetch starts anew each time.
// Reading ahead into the next strip gives the memory something to do meanwhile. The address may lie
// behind the weight; a prefetch does not fail.
constexpr std::int64_t kAhead = 2048;
void read_ahead(const std::byte* in) { hwy::Prefetch(in + kAhead); }

// A block's first half, its scale, in every lane. The instruction that widens halves is exact, too.
V scale_at(const std::byte* in) {
#if HWY_TARGET <= HWY_AVX2
  return hn::Set(kFloats, _cvtsh_ss(load<std::uint16_t>(in)));
#else
  return hn::Set(kFloats, half_to_float(load<std::uint16_t>(in)));
#endif
}

void dequantize_f16(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = half_to_float(load<std::uint16_t>(in + 2 * i));
}

void dequantize_bf16(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] =
        std::bit_cast<float>(static_cast<std::uint32_t>(load<std::uint16_t>(in + 2 * i)) << 16);
  }
}

void dequantize_q8_0(const std::byte* in, std::int64_t count, float* out) {
  const auto lanes = static_cast<int>(hn::Lanes(kFloats));
  for (std::int64_t i = 0; i < count; i += kBlock, in += 34) {
    read_ahead(in);
    const V scale = scale_at(in);
    const auto* quants = reinterpret_cast<const std::int8_t*>(in + 2);
    for (int j = 0; j < kBlock; j += lanes) {
      const auto wide = hn::PromoteTo(kInts, hn::LoadU(kBytes, quants + j));
      hn::StoreU(hn::Mul(scale, hn::ConvertTo(kFloats, wide)), kFloats, out + i + j);
    }
  }
}

// The low nibbles of a 4-bit block are its first half, the high nibbles its second. make(quant) gives
// the element.
template <class Make>
void dequantize_nibbles(const std::uint8_t* quants, const Make& make, float* out) {
  const auto lanes = static_cast<int>(hn::Lanes(kFloats));
  for (int j = 0; j < kBlock / 2; j += lanes) {
    const auto wide = hn::PromoteTo(kInts, hn::LoadU(kNibbles, quants + j));
    const auto low = hn::And(wide, hn::Set(kInts, 0xF));
    hn::StoreU(make(hn::ConvertTo(kFloats, low)), kFloats, out + j);
    hn::StoreU(make(hn::ConvertTo(kFloats, hn::ShiftRight<4>(wide))), kFloats,
               out + kBlock / 2 + j);
  }
}

void dequantize_q4_0(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kBlock, in += 18) {
    read_ahead(in);
    const V scale = scale_at(in);
    dequantize_nibbles(
        reinterpret_cast<const std::uint8_t*>(in + 2),
        [&](V quant) { return hn::Mul(scale, hn::Sub(quant, hn::Set(kFloats, 8.0F))); }, out + i);
  }
}

void dequantize_q4_1(const std::byte* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kBlock, in += 20) {
    read_ahead(in);
    const V scale = scale_at(in);
    const V minimum = scale_at(in + 2);
    // A half times four bits is exact, so that it does not matter whether this is fused.
    dequantize_nibbles(
        reinterpret_cast<const std::uint8_t*>(in + 4),
        [&](V quant) { return hn::MulAdd(scale, quant, minimum); }, out + i);
  }
}

}  // namespace

void dequantize(GgmlType type, const std::byte* in, std::int64_t count, float* out) {
  switch (type) {
    case GgmlType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case GgmlType::kF16: return dequantize_f16(in, count, out);
    case GgmlType::kBF16: return dequantize_bf16(in, count, out);
    case GgmlType::kQ8_0: return dequantize_q8_0(in, count, out);
    case GgmlType::kQ4_0: return dequantize_q4_0(in, count, out);
    case GgmlType::kQ4_1: return dequantize_q4_1(in, count, out);
  }
}

}  // namespace quire::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace quire::llm {

HWY_EXPORT(dequantize);

void dequantize_rows(const GgufTensor& tensor, std::int64_t begin, std::int64_t end, float* out) {
  const std::int64_t row_bytes = static_cast<std::int64_t>(tensor.data.size()) / tensor.num_rows();
  HWY_DYNAMIC_DISPATCH(dequantize)
  (tensor.type, tensor.data.data() + begin * row_bytes, (end - begin) * tensor.row_size(), out);
}

}  // namespace quire::llm

#endif  // HWY_ONCE
