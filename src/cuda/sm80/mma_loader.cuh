// How K, V and queries get into shared memory, for the tensor-core kernel.
//
//   look_up (block table entry asked for) -> remember (row offsets of a tile, when the entry is
//   there) -> start_copy (cp.async, two tiles later) -> wait_oldest -> widen (8-bit caches)
#pragma once

#include "cuda/kv_rows.cuh"
#include "cuda/sm80/mma_config.cuh"
#include "cuda/tile/fragments.cuh"

namespace quire::cuda::sm80 {

template <class C>
class MmaLoader {
 protected:
  static constexpr bool kScaleWeights = std::is_same_v<typename C::Type, tile::BFloat16>;

  __device__ __forceinline__ MmaLoader(const KernelParams& p, char* memory)
      : p_(p),
        shared_(*reinterpret_cast<MmaShared<C>*>(memory)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        tiles_(memory + (sizeof(MmaShared<C>) + 127) / 128 * 128),
        query_(tile::shared_address(tiles_)) {}

  // Where things lie in shared memory; computed rather than kept in registers.
  __device__ __forceinline__ std::uint32_t stage_k() const { return query_ + C::kQueryBytes; }
  __device__ __forceinline__ std::uint32_t stage_v() const {
    return stage_k() + static_cast<std::uint32_t>(p_.stages) * C::kStageK;
  }
  __device__ __forceinline__ std::uint32_t wide_k() const {
    return stage_v() + static_cast<std::uint32_t>(p_.stages) * C::kStageV;
  }
  __device__ __forceinline__ std::uint32_t wide_v() const { return wide_k() + C::kTileK; }

  __device__ __forceinline__ void load_queries(const Segment& segment) {
    constexpr int kPieces = C::kHeadK / 8;
    const int head_size = p_.layer.head_size;
    const DType dtype = p_.layer.dtype;
    const int rows = C::kFew ? m_tiles_ * 16 : C::kRows;
    if (p_.query_aligned && !negate_) {
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kMmaThreads) {
        const int r = i / kPieces;
        const int c = i - r * kPieces;
        const char* row = static_cast<const char*>(p_.call.query) +
                          (shared_.rows.token[r] * p_.call.query_token_stride +
                           shared_.rows.head[r] * p_.call.query_head_stride) *
                              2;
        const int valid = r < segment.tile.rows ? min(max((head_size - c * 8) * 2, 0), 16) : 0;
        tile::copy_async<16>(query_ + tile::piece_offset(r, c, C::kPitchK),
                             valid > 0 ? row + c * 16 : row, valid);
      }
      return;
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kMmaThreads) {
      const int r = i / kPieces;
      const int c = i - r * kPieces;
      std::uint32_t words[4] = {};
      if (r < segment.tile.rows && c * 8 < head_size) {
        const char* row = static_cast<const char*>(p_.call.query) +
                          (shared_.rows.token[r] * p_.call.query_token_stride +
                           shared_.rows.head[r] * p_.call.query_head_stride) *
                              size_of(dtype);
        if (p_.query_aligned && c * 8 + 8 <= head_size) {
          const uint4 whole = *reinterpret_cast<const uint4*>(row + c * 16);
          words[0] = whole.x, words[1] = whole.y, words[2] = whole.z, words[3] = whole.w;
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int d = c * 8 + e;
            if (d >= head_size) continue;
            std::uint32_t bits;
            if (size_of(dtype) == 2) {
              bits = reinterpret_cast<const std::uint16_t*>(row)[d];
            } else {  // an fp8 query is widened to fp16, exactly
              bits = C::Type::pack(semantics::load_element(row, dtype, d), 0.0F);
            }
            words[e / 2] |= bits << (e % 2 * 16);
          }
        }
      }
      const std::uint32_t sign = negate_ ? 0x80008000U : 0U;
      tile::store_piece(query_ + tile::piece_offset(r, c, C::kPitchK), words[0] ^ sign,
                        words[1] ^ sign, words[2] ^ sign, words[3] ^ sign);
    }
  }

  // ---- loading ------------------------------------------------------------------------------

  __device__ __forceinline__ int first_key(const Segment& segment, int unit_begin, int i) const {
    constexpr int kSteps = kUnitKeys / C::kKeys;
    return segment.tile.unit(unit_begin + i / kSteps) * kUnitKeys + i % kSteps * C::kKeys;
  }

  // A key whose block table entry is on its way.
  struct RowPlace {
    std::int32_t entry;  // physical block as the table has it; -1: no such key
    std::int32_t slot;   // within the block; without a cache the row
  };

  // Thread t looks up key t % kKeys of a tile, for K (t < kKeys) or V.
  __device__ __forceinline__ RowPlace look_up(const Segment& segment, int first) const {
    const std::int32_t key = first + static_cast<int>(threadIdx.x) % C::kKeys;
    RowPlace place{-1, 0};
    if (!shared_.rows.may_read(key)) return place;
    if (!p_.layer.paged) return {0, static_cast<std::int32_t>(segment.tile.first_kv_row) + key};
    const auto block_size = static_cast<std::uint32_t>(p_.layer.block_size);
    const std::uint32_t logical = static_cast<std::uint32_t>(key) / block_size;
    place.slot = static_cast<std::int32_t>(static_cast<std::uint32_t>(key) - logical * block_size);
    if (logical < p_.batch.table_width) {
      place.entry = p_.batch.block_table[segment.tile.seq * p_.batch.table_stride + logical];
    }
    return place;
  }

  // Writes down where the row is. Only here the table's entry is waited for.
  __device__ __forceinline__ void remember(int i, const RowPlace& place) {
    const int t = static_cast<int>(threadIdx.x) % C::kKeys;
    const int side = static_cast<int>(threadIdx.x) / C::kKeys;
    const bool exists = place.entry >= 0 && (!p_.layer.paged || place.entry < p_.call.num_blocks);
    const bool all = __all_sync(~0U, exists);
    if (lane_ == 0) reinterpret_cast<int*>(&shared_.complete[i % C::kRing])[warp_] = all ? 1 : 0;
    if (side > 1) return;
    const KvParams& kv = side == 1 ? p_.call.v : p_.call.k;
    shared_.offset[i % C::kRing][side][t] =
        exists ? (place.entry * kv.strides.block + place.slot * kv.strides.slot) *
                     static_cast<std::int64_t>(C::kBytes ? 1 : 2)
               : -1;
    if constexpr (C::kBytes) {
      const KvRow row{exists ? place.entry : -1, place.slot};
      shared_.scale[i % C::kRing][side][t] = row_scale(kv, row, shared_.kv_head);
    }
  }

  template <int kSide>
  struct Side {
    static constexpr int kPieces = kSide == 0 ? C::kPiecesK : C::kPiecesV;
    static constexpr int kPitch = kSide == 0 ? C::kPitchK : C::kPitchV;
    static constexpr int kStage = kSide == 0 ? C::kStageK : C::kStageV;
    static constexpr int kCount = C::kKeys * kPieces;
    // Rows between two pieces of a thread, if they all have the same column.
    static constexpr bool kSameColumn = kMmaThreads % kPieces == 0;
    static constexpr int kRowStep = kSameColumn ? kMmaThreads / kPieces : 0;
    // Pieces in a row of 8 and more rows keep their place within a row from step to step.
    static constexpr bool kRegular =
        kSameColumn && kCount % kMmaThreads == 0 && (C::kBytes || kRowStep % 8 == 0);
  };

  template <int kSide>
  __device__ __forceinline__ std::uint32_t stage_at(int stage) const {
    return (kSide == 0 ? stage_k() : stage_v()) +
           static_cast<std::uint32_t>(stage) * Side<kSide>::kStage;
  }
  template <int kSide>
  __device__ __forceinline__ int row_bytes() const {
    return (kSide == 0 ? p_.layer.head_size : shared_.columns) * (C::kBytes ? 1 : 2);
  }

  // Starts copying tile i of K (side 0) or V (side 1) to place `stage`, which is i % stages.
  template <int kSide>
  __device__ __forceinline__ void start_copy(int i, int stage) {
    using S = Side<kSide>;
    const int alignment = kSide == 0 ? p_.k_copy_bytes : p_.v_copy_bytes;
    const std::int64_t* offsets = shared_.offset[i % C::kRing][kSide];
    if constexpr (S::kRegular) {
      const int4 complete = shared_.complete[i % C::kRing];
      if (alignment >= 16 && (complete.x & complete.y & complete.z & complete.w) != 0) {
        const int c = static_cast<int>(threadIdx.x) % S::kPieces;
        const int first_row = static_cast<int>(threadIdx.x) / S::kPieces;
        const int valid = min(max(row_bytes<kSide>() - c * 16, 0), 16);
        const char* from = shared_.side_base[kSide] + (valid > 0 ? c * 16 : 0);
        const std::uint32_t to =
            stage_at<kSide>(stage) +
            (C::kBytes ? threadIdx.x * 16 : tile::piece_offset(first_row, c, S::kPitch));
        constexpr int kToStep = C::kBytes ? kMmaThreads * 16 : S::kRowStep * S::kPitch;
#pragma unroll
        for (int n = 0; n < S::kCount / kMmaThreads; ++n) {
          tile::copy_async<16>(to + n * kToStep, from + offsets[first_row + n * S::kRowStep],
                               valid);
        }
        return;
      }
    }
    // Rows that are not aligned to 16 bytes, tiles with absent rows.
    const char* base = shared_.side_base[kSide];
    const auto* nowhere = static_cast<const char*>(kSide == 0 ? p_.call.k.data : p_.call.v.data);
#pragma unroll 1
    for (int id = static_cast<int>(threadIdx.x); id < S::kCount; id += kMmaThreads) {
      const int r = id / S::kPieces;
      const int c = id - r * S::kPieces;
      const std::int64_t offset = offsets[r];
      const int valid = offset < 0 ? 0 : min(max(row_bytes<kSide>() - c * 16, 0), 16);
      const std::uint32_t to =
          stage_at<kSide>(stage) +
          (C::kBytes ? static_cast<std::uint32_t>(id) * 16 : tile::piece_offset(r, c, S::kPitch));
      const char* from = valid > 0 ? base + offset + c * 16 : nowhere;
      if (alignment >= 16) {
        tile::copy_async<16>(to, from, valid);
      } else {
        tile::copy_piece(to, from, valid, alignment);
      }
    }
  }

  // Widens this thread's own bytes of tile i.
  template <int kSide>
  __device__ __forceinline__ void widen(int i, int stage) {
    const DType dtype = kSide == 0 ? p_.call.k.dtype : p_.call.v.dtype;
    if (dtype == DType::kFloat8E4M3) {
      widen_from<kSide, tile::E4M3>(i, stage);
    } else if (dtype == DType::kInt8) {
      widen_from<kSide, tile::Int8>(i, stage);
    } else {
      widen_from<kSide, tile::E5M2>(i, stage);
    }
  }

  template <int kSide, class Stored>
  __device__ __forceinline__ void widen_from(int i, int stage) {
    constexpr int kPieces = kSide == 0 ? C::kPiecesK : C::kPiecesV;
    constexpr int kPitch = kSide == 0 ? C::kPitchK : C::kPitchV;
    constexpr int kCount = C::kKeys * kPieces;
    const KvParams& kv = kSide == 0 ? p_.call.k : p_.call.v;
    const bool scaled = kSide == 1 && !kScaleWeights && kv.token_scales != nullptr;
    const std::uint32_t from = stage_at<kSide>(stage);
    const std::uint32_t to = kSide == 0 ? wide_k() : wide_v();
#pragma unroll 2
    for (int n = 0; n < (kCount + kMmaThreads - 1) / kMmaThreads; ++n) {
      const int id = static_cast<int>(threadIdx.x) + n * kMmaThreads;
      if (kCount % kMmaThreads != 0 && id >= kCount) break;
      const int r = id / kPieces;
      const int c = id - r * kPieces;
      const float scale = scaled ? shared_.scale[i % C::kRing][kSide][r] : 1.0F;
      std::uint32_t wide[8];
      tile::widen_piece<typename C::Type, Stored>(
          tile::load_piece(from + static_cast<std::uint32_t>(id) * 16), scaled, scale, wide);
      tile::store_piece(to + tile::piece_offset(r, 2 * c, kPitch), wide[0], wide[1], wide[2],
                        wide[3]);
      tile::store_piece(to + tile::piece_offset(r, 2 * c + 1, kPitch), wide[4], wide[5], wide[6],
                        wide[7]);
    }
  }

  // Until the oldest tile under way is there: of 2 * stages - 1 groups all but the first may be
  // still coming.
  __device__ __forceinline__ void wait_oldest() const {
    if (p_.stages == 1) {
      tile::wait_copies<0>();
    } else if (p_.stages == 2) {
      tile::wait_copies<2>();
    } else {
      tile::wait_copies<4>();
    }
  }

  const KernelParams& p_;
  MmaShared<C>& shared_;
  const int lane_;
  const int warp_;
  char* const tiles_;          // Q, stages of K, stages of V, widened K and V
  const std::uint32_t query_;  // the same as a shared address
  bool negate_ = false;        // the softmax scale is negative: queries change their sign
  int m_tiles_ = 0;            // of 16 rows that are in use
};

}  // namespace quire::cuda::sm80
