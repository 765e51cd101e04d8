// How K, V and queries get into shared memory, for the prefill kernel.
//
//   prepare / look_up (one warp: a split, where its keys are) -> start_copy (cp.async, two tiles
//   later; by the tiles' addresses alone) -> wait_oldest -> widen (8-bit caches)
#pragma once

#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/widen.cuh"
#include "cuda/sm80/prefill/tasks.cuh"

namespace quire::cuda::sm80 {

template <class C>
class PrefillLoader {
 protected:
  static constexpr int kElement = C::kKv8 ? 1 : 2;
  static constexpr bool kScaleWeights = std::is_same_v<typename C::Type, ptx::BFloat16>;

  __device__ __forceinline__ PrefillLoader(const KernelParams& p, char* memory)
      : p_(p),
        shared_(*reinterpret_cast<PrefillShared<C>*>(memory)),
        query_(ptx::shared_address(memory) +
               static_cast<std::uint32_t>((sizeof(PrefillShared<C>) + 127) / 128 * 128)) {
    changes_queries_ = query_change(p).any();
    // Columns that no copy writes.
    if (p.layer.head_size < C::kHeadSizeK || p.layer.head_size_v < C::kHeadSizeV) clear_stages();
  }

  // Opaque: what follows from the thread's index would be computed once, ahead of the loop over
  // keys, and then take its registers.
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(ptx::opaque(threadIdx.x));
  }
  static __device__ __forceinline__ int lane() { return thread() % 32; }
  static __device__ __forceinline__ int warp() { return thread() / 32; }

  // Where things lie in shared memory; computed rather than kept in registers.
  __device__ __forceinline__ std::uint32_t stage_k() const { return query_ + C::kQueryBytes; }
  __device__ __forceinline__ std::uint32_t stage_v() const {
    return stage_k() + static_cast<std::uint32_t>(p_.pipeline_stages) * C::kStageK;
  }
  __device__ __forceinline__ std::uint32_t wide_k() const {
    return stage_v() + static_cast<std::uint32_t>(p_.pipeline_stages) * C::kStageV;
  }
  __device__ __forceinline__ std::uint32_t wide_v() const { return wide_k() + C::kTileK; }

  // ---- K and V ------------------------------------------------------------------------------

  template <int kSide>
  using Side = PrefillSide<C, kSide>;

  __device__ __noinline__ static void clear(std::uint32_t from, int bytes) {
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += C::kThreads * 16) {
      ptx::store_piece(from + static_cast<std::uint32_t>(i), 0, 0, 0, 0);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void clear_stages() const {
    clear(stage_k(), p_.pipeline_stages * (C::kStageK + C::kStageV));
  }

  template <int kSide>
  __device__ __forceinline__ std::uint32_t stage_at(int stage) const {
    return (kSide == 0 ? stage_k() : stage_v()) +
           static_cast<std::uint32_t>(stage) * Side<kSide>::kStage;
  }

  // Starts copying K and V of tile i of a task to place `stage`.
  __device__ __forceinline__ void start_copy(int turn, int i, int stage) {
    const KvTile<C>& keys = shared_.ring[turn][i % C::kRing];
    const int t = thread();
    if (keys.whole) {
      copy_regular<0, true>(t, keys, stage);
      copy_regular<1, true>(t, keys, stage);
    } else {
      copy_side<0>(t, turn, keys, stage);
      copy_side<1>(t, turn, keys, stage);
    }
    if (C::kKv8 && (p_.k.token_scales != nullptr || p_.v.token_scales != nullptr)) {
      copy_scales(turn, keys, stage);
    }
  }

  template <int kSide>
  __device__ __forceinline__ void copy_side(int t, int turn, const KvTile<C>& keys, int stage) {
    if (keys.how[kSide] == Copy::kRows) {
      copy_rows<kSide>(turn, keys, stage);
    } else {
      copy_regular<kSide, false>(t, keys, stage);
    }
  }

  // Thread t's pieces. `kWhole`: no row is unmapped.
  template <int kSide, bool kWhole>
  __device__ __forceinline__ void copy_regular(int t, const KvTile<C>& keys, int stage) {
    using S = Side<kSide>;
    if constexpr (!S::kRegular) return;
    const int c = t % S::kPieces;
    const int row = t / S::kPieces;
    const int columns = kSide == 0 ? p_.layer.head_size : p_.layer.head_size_v;
    if (c * 16 >= columns * kElement) return;
    const auto slot_bytes =
        static_cast<std::uint32_t>((kSide == 0 ? p_.k : p_.v).strides.slot) * kElement;
    const std::uint32_t offset =
        static_cast<std::uint32_t>(row % 16) * slot_bytes + static_cast<std::uint32_t>(c * 16);
    const std::uint32_t to =
        stage_at<kSide>(stage) +
        (C::kKv8 ? static_cast<std::uint32_t>(t) * 16 : ptx::piece_offset(row, c, S::kPitch));
    constexpr int kToStep = C::kKv8 ? C::kThreads * 16 : S::kRowStep * S::kPitch;
    // Loaded ahead of the copies, which count as writes to any memory.
    const char* strip[C::kStrips];
#pragma unroll
    for (int g = 0; g < C::kStrips; ++g) {
      strip[g] = keys.strip[kSide][S::kRowStep > 16 ? (g + row / 16) % C::kStrips : g] + offset;
    }
    if constexpr (kWhole) {
#pragma unroll
      for (int n = 0; n < S::kSteps; ++n) {
        ptx::copy_async<16>(to + n * kToStep,
                            strip[n * S::kRowStep / 16] + n * S::kRowStep % 16 * slot_bytes);
      }
    } else {
      const std::uint64_t present = keys.present >> row;
#pragma unroll
      for (int n = 0; n < S::kSteps; ++n) {
        ptx::copy_async<16>(to + n * kToStep,
                            strip[n * S::kRowStep / 16] + n * S::kRowStep % 16 * slot_bytes,
                            (present >> (n * S::kRowStep) & 1) != 0 ? 16 : 0);
      }
    }
  }

  // Rows that are not aligned to 16 bytes, blocks that 16 rows do not fit in evenly. Compact, and
  // not called: a call would make the loop over keys shuffle its registers.
  template <int kSide>
  __device__ __forceinline__ void copy_rows(int turn, const KvTile<C>& keys, int stage) {
    using S = Side<kSide>;
    const PrefillTask& task = shared_.task[turn];
    const KvParams& kv = kSide == 0 ? p_.k : p_.v;
    const int alignment = kSide == 0 ? p_.k_copy_bytes : p_.v_copy_bytes;
    const int row_bytes = (kSide == 0 ? p_.layer.head_size : task.columns) * kElement;
#pragma unroll 1
    for (int id = thread(); id < S::kCount; id += C::kThreads) {
      const int r = id / S::kPieces;
      const int c = id - r * S::kPieces;
      int valid = (keys.present >> r & 1) != 0 ? min(max(row_bytes - c * 16, 0), 16) : 0;
      const char* from = task.base[kSide];
      if (valid > 0 && has_strips(p_)) {
        from = keys.strip[kSide][r / 16] + r % 16 * kv.strides.slot * kElement + c * 16;
      } else if (valid > 0) {
        const KvRow row = kv_row(p_, task.split.tile, keys.first + r);
        if (row.block < 0) {
          valid = 0;
        } else {
          from += (row.block * kv.strides.block + row.slot * kv.strides.slot) * kElement + c * 16;
        }
      }
      ptx::copy_piece(stage_at<kSide>(stage) + (C::kKv8 ? static_cast<std::uint32_t>(id) * 16
                                                        : ptx::piece_offset(r, c, S::kPitch)),
                      from, valid, alignment);
    }
  }

  // The tokens' own scales of K and V.
  __device__ __forceinline__ void copy_scales(int turn, const KvTile<C>& keys, int stage) {
    const int t = thread();
    const int side = t / C::kKeys;
    const int r = t % C::kKeys;
    const KvParams& kv = side == 0 ? p_.k : p_.v;
    if (side > 1 || kv.token_scales == nullptr) return;
    const PrefillTask& task = shared_.task[turn];
    KvRow row;
    if ((keys.present >> r & 1) != 0) {
      row = has_strips(p_)
                ? KvRow{keys.block[C::kKv8 ? r / 16 : 0], keys.slot[C::kKv8 ? r / 16 : 0] + r % 16}
                : kv_row(p_, task.split.tile, keys.first + r);
    }
    const float* from = kv.token_scales;
    if (row.block >= 0) {
      from += semantics::cache_offset(kv.token_scale_strides, row.block, row.slot, task.kv_head);
    }
    ptx::copy_async<4>(ptx::shared_address(&shared_.scale[C::kKv8 ? stage : 0][side][r]), from,
                       row.block < 0 ? 0 : 4);
  }

  // Widens this thread's own bytes of the tile at `stage`.
  template <int kSide>
  __device__ __forceinline__ void widen(int stage) {
    const DType dtype = kSide == 0 ? p_.k.dtype : p_.v.dtype;
    if (dtype == DType::kFloat8E4M3) {
      widen_from<kSide, ptx::E4M3>(stage);
    } else if (dtype == DType::kInt8) {
      widen_from<kSide, ptx::Int8>(stage);
    } else {
      widen_from<kSide, ptx::E5M2>(stage);
    }
  }

  template <int kSide, class Stored>
  __device__ __forceinline__ void widen_from(int stage) {
    using S = Side<kSide>;
    const bool scaled = kSide == 1 && !kScaleWeights && p_.v.token_scales != nullptr;
    const std::uint32_t from = stage_at<kSide>(stage);
    const std::uint32_t to = kSide == 0 ? wide_k() : wide_v();
#pragma unroll 2
    for (int n = 0; n < S::kSteps; ++n) {
      const int id = static_cast<int>(threadIdx.x) + n * C::kThreads;
      if (S::kCount % C::kThreads != 0 && id >= S::kCount) break;
      const int r = id / S::kPieces;
      const int c = id - r * S::kPieces;
      const float scale = scaled ? shared_.scale[C::kKv8 ? stage : 0][kSide][r] : 1.0F;
      std::uint32_t wide[8];
      ptx::widen_piece<typename C::Type, Stored>(
          ptx::load_piece(from + static_cast<std::uint32_t>(id) * 16), scaled, scale, wide);
      ptx::store_piece(to + ptx::piece_offset(r, 2 * c, S::kPitch), wide[0], wide[1], wide[2],
                       wide[3]);
      ptx::store_piece(to + ptx::piece_offset(r, 2 * c + 1, S::kPitch), wide[4], wide[5], wide[6],
                       wide[7]);
    }
  }

  // ---- queries ------------------------------------------------------------------------------

  // Address of a row's query; rows past the tile's give that of its last. Not from the row table,
  // which is the split's before when this is called.
  static __device__ __forceinline__ const char* query_row(const KernelParams& p,
                                                          const PrefillTask& task, int r) {
    const WorkTile& tile = task.split.tile;
    RowPlace place = row_place(p, tile, task.kv_head, r);
    if (p.schedule.shared_rows != nullptr) {
      place.token = p.schedule.shared_rows[tile.prefix_row + place.index].token;
    }
    return static_cast<const char*>(p.query) +
           (place.token * p.query_token_stride + place.head * p.query_head_stride) *
               size_of(p.layer.dtype);
  }

  // Whether copy_queries() does, which does not wait.
  __device__ __forceinline__ bool copies_queries() const {
    return p_.query_aligned && !changes_queries_;
  }

  // Each warp those of its own rows. A lane finds one row's address: a division, too many for every
  // piece.
  __device__ __forceinline__ void copy_queries(const PrefillTask& task) const {
    constexpr int kPieces = C::kHeadSizeK / 8;
    constexpr int kWarpRows = 16 * C::kMTiles;
    const int first = warp() * kWarpRows;
    const auto mine =
        reinterpret_cast<std::uintptr_t>(query_row(p_, task, first + lane() % kWarpRows));
    const int rows = task.split.tile.rows - first;
#pragma unroll 2
    for (int i = lane(); i < kWarpRows * kPieces; i += 32) {
      const int r = i / kPieces;
      const int c = i - r * kPieces;
      const auto* row = reinterpret_cast<const char*>(__shfl_sync(~0U, mine, r));
      const int valid = r < rows ? min(max((p_.layer.head_size - c * 8) * 2, 0), 16) : 0;
      ptx::copy_async<16>(query_ + ptx::piece_offset(first + r, c, C::kPitchK),
                          row + (valid > 0 ? c * 16 : 0), valid);
    }
  }

  // Any dtype and alignment, either sign.
  static __device__ __noinline__ void load_queries(const KernelParams& p, const PrefillTask& task,
                                                   std::uint32_t to) {
    constexpr int kPieces = C::kHeadSizeK / 8;
    for (int i = static_cast<int>(threadIdx.x); i < C::kRows * kPieces; i += C::kThreads) {
      const int r = i / kPieces;
      const int c = i - r * kPieces;
      const int count = r < task.split.tile.rows ? min(max(p.layer.head_size - c * 8, 0), 8) : 0;
      store_query_piece(query_row(p, task, r), c, count, p.layer.dtype, query_change(p),
                        to + ptx::piece_offset(r, c, C::kPitchK));
    }
  }

  // Eight elements at any alignment, perhaps with their signs changed.
  static __device__ __forceinline__ void store_query_piece(const char* row, int c, int count,
                                                           DType dtype, const QueryChange& change,
                                                           std::uint32_t to) {
    std::uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= count) break;
      const int d = c * 8 + e;
      // An fp8 query is widened to fp16, exactly.
      const std::uint32_t bits = size_of(dtype) == 2
                                     ? reinterpret_cast<const std::uint16_t*>(row)[d]
                                     : C::Type::pack(semantics::load_element(row, dtype, d), 0.0F);
      words[e / 2] |= bits << (e % 2 * 16);
    }
    ptx::store_piece(to, change(words[0]), change(words[1]), change(words[2]), change(words[3]));
  }

  const KernelParams& p_;
  PrefillShared<C>& shared_;
  const std::uint32_t query_;  // shared address of Q, stages of K, stages of V, widened K and V
  bool changes_queries_;       // see QueryChange
};

}  // namespace quire::cuda::sm80
