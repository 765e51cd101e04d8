// The cache write of rows that are whole aligned pieces (cache_write_pieces.cuh).
//
//   slot_mapping, pieces of key | value -> registers -> pieces of the cache
//
// Each (token, head) row of K and of V has 4, 8, ... lanes with up to 4 pieces of 16 bytes each, 2
// at head size 128 in 16 bits. The loads do not wait for the slot, since only where a row goes
// depends on it. A row with a scale of its own stays in registers from its largest magnitude to its
// codes, so everything is read once: 4 bytes of traffic an element for 16-bit caches, 3 for 8-bit
// ones.
#pragma once

#include <cstdint>

#include "cuda/cache_write_pieces.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "params.h"

namespace quire::cuda {

// n / d for a d known at launch, by a product and a shift; a 64-bit division would take longer than
// all else a thread does. Rounded up (Granlund and Montgomery, 1994): with l = ceil(log2 d) and
// m = floor(2^(N + l) / d) + 1, n m / 2^(N + l) is right for n < 2^N.
struct RowDivider {  // N = 31
  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 0;
  std::uint32_t shift = 0;

  RowDivider() = default;
  explicit RowDivider(std::uint32_t d) : divisor(d) {  // 1 to 2^31
    while ((std::uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<std::uint32_t>((std::uint64_t{1} << (31 + shift)) / d + 1);
  }
  __device__ __forceinline__ std::uint32_t divide(std::uint32_t n) const {
    return __umulhi(n << 1, multiplier) >> shift;
  }
};

struct SlotDivider {  // N = 51: slots of 2^31 blocks of 2^20
  std::int64_t divisor = 1;
  std::uint64_t multiplier = 0;
  std::uint32_t shift = 0;

  SlotDivider() = default;
  explicit SlotDivider(std::int64_t block_size) : divisor(block_size) {  // 1 to 2^20
    const auto d = static_cast<std::uint64_t>(block_size);
    while ((std::uint64_t{1} << shift) < d) ++shift;
    // 2^(51 + shift) / d in two steps, since it may not fit into 64 bits.
    const std::uint64_t whole = (std::uint64_t{1} << 51) / d;
    const std::uint64_t rest = (std::uint64_t{1} << 51) % d;
    multiplier = ((whole << shift) + (rest << shift) / d + 1) << 12;
  }
  __device__ __forceinline__ std::uint64_t divide(std::uint64_t n) const {
    return __umul64hi(n << 1, multiplier) >> shift;
  }
};

// K or V. Strides in bytes.
struct RowSide {
  const char* from = nullptr;
  char* to = nullptr;
  std::int64_t from_token_stride = 0;
  std::int64_t from_head_stride = 0;
  semantics::CacheStrides to_strides;
  Scale scale;
  char* token_scales = nullptr;
  semantics::CacheStrides token_scale_strides;
  std::uint32_t pieces = 0;      // of a row
  std::uint32_t lanes_log2 = 0;  // threads of a row, as a power of two
  bool to_is_aligned = true;  // to whole pieces; else to 4 bytes, as rows with a scale behind are
};

struct RowParams {
  RowSide sides[2];  // of blockIdx.y
  const std::int64_t* slot_mapping = nullptr;
  std::uint32_t num_rows = 0;   // tokens * heads
  std::uint64_t num_slots = 0;  // of the cache
  RowDivider heads;
  SlotDivider block_size;
};

// Of 64 and 256 threads, 64 was as fast and 256 up to 5 % slower: more CTAs fit whose loads are all
// under way at once.
inline constexpr int kRowThreads = 128;

// Pieces that a thread holds at most: four copied ones, or 32 elements. So 32 lanes hold a row of
// 1,024 elements; longer ones with a scale of their own are not for this kernel.
template <DType kFrom, DType kTo>
inline constexpr int kHeld = kFrom == kTo ? 4 : 32 / Piece<kFrom, kTo>::kElements;

// A thread's pieces once more, as quant.h defines them: for NaN, infinities and extreme scales.
// Nothing comes after it, so that calling it costs the common case no registers.
template <DType kFrom, DType kTo, bool kScaled>
__device__ __noinline__ void write_any_pieces(const char* from, char* to, std::uint32_t first,
                                              std::uint32_t end, std::uint32_t step, float scale) {
  using P = Piece<kFrom, kTo>;
  const float inverse = 1.0F / scale;
#pragma unroll 1
  for (std::uint32_t piece = first; piece < end; piece += step) {
#pragma unroll 1
    for (int i = 0; i < P::kElements; ++i) {
      const float x = semantics::load_element(from + piece * P::kFromBytes, kFrom, i);
      semantics::store_element(to + piece * P::kToBytes, kTo, i, kScaled ? x * inverse : x / scale);
    }
  }
}

// The scale of a row whose pieces are held by 2^n lanes side by side, from its largest magnitude.
template <DType kFrom, DType kTo, int kPieces, class From>
__device__ __forceinline__ float scale_of_row(const From (&held)[kPieces], std::uint32_t lanes) {
  LargestMagnitude<kFrom> largest;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) largest.add(held[k]);
  float absmax = largest.value();
  for (std::uint32_t d = lanes / 2; d > 0; d /= 2) {
    absmax = fmaxf(absmax, __shfl_xor_sync(~0U, absmax, d));
  }
  return semantics::token_head_scale(
      absmax, kTo == DType::kInt8 ? semantics::kInt8Max : semantics::kE4M3Max);
}

// kScaled: per token and head. kFrom == kTo copies bits, whatever they mean.
template <DType kFrom, DType kTo, bool kScaled>
__global__ void __launch_bounds__(kRowThreads)
    cache_write_rows(const __grid_constant__ RowParams p) {
  ptx::start_dependents();
  using P = Piece<kFrom, kTo>;
  constexpr int kPieces = kHeld<kFrom, kTo>;
  const RowSide& side = p.sides[blockIdx.y];
  const std::uint32_t lanes = 1U << side.lanes_log2;
  const std::uint32_t thread = blockIdx.x * kRowThreads + threadIdx.x;
  const std::uint32_t lane = thread & (lanes - 1);
  const std::uint32_t row = thread >> side.lanes_log2;
  const bool present = row < p.num_rows;
  if (!kScaled && !present) return;  // with scales, all lanes take part in the maximum

  const std::uint32_t token = p.heads.divide(row);
  const std::uint32_t head = row - token * p.heads.divisor;
  const char* from = side.from + token * side.from_token_stride + head * side.from_head_stride;
  std::int64_t flat = -1;
  if (present) flat = __ldg(reinterpret_cast<const long long*>(p.slot_mapping) + token);
  typename P::From held[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const std::uint32_t piece = lane + k * lanes;
    if (kScaled) held[k] = {};
    if (present && piece < side.pieces) held[k].load(from + piece * P::kFromBytes);
  }
  float scale = side.scale.value;
  if constexpr (kScaled) {
    scale = scale_of_row<kFrom, kTo>(held, lanes);
  } else if (size_of(kTo) == 1 && side.scale.data != nullptr) {
    // Volatile: the compiler would move it behind the wait for the slot.
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale) : "l"(side.scale.data));
  }

  const auto unsigned_flat = static_cast<std::uint64_t>(flat);
  if (unsigned_flat >= p.num_slots) return;  // negative ones too
  const auto block = static_cast<std::int64_t>(p.block_size.divide(unsigned_flat));
  const std::int64_t slot = flat - block * p.block_size.divisor;
  char* to = side.to + semantics::cache_offset(side.to_strides, block, slot, head);
  if (kScaled && lane == 0) {
    *reinterpret_cast<float*>(
        side.token_scales + semantics::cache_offset(side.token_scale_strides, block, slot, head)) =
        scale;
  }
  const float inverse = 1.0F / scale;
  const TensorScaleDivider divider(scale);
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const std::uint32_t piece = lane + k * lanes;
    if (piece >= side.pieces) break;
    typename P::To stored;
    if constexpr (kFrom == kTo) {
      stored = held[k];
    } else {
      float x[P::kElements];
      unpack<kFrom>(held[k], x);
      bool good = true;
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < P::kElements; ++i) x[i] *= inverse;
        // No more than QMAX and its rounding, so int8 needs no bounds.
        if (kTo == DType::kInt8) good = all_finite(x);
      } else if constexpr (size_of(kTo) == 1) {
        good = divider.divide(x);
      }
      if (!good) {
        write_any_pieces<kFrom, kTo, kScaled>(from, to, lane, side.pieces, lanes, scale);
        return;
      }
      pack<kTo>(x, &stored);
    }
    stored.store(to + piece * P::kToBytes, !kScaled || side.to_is_aligned);
  }
}

}  // namespace quire::cuda
