// Attention on mma.sync tensor cores, FlashAttention-2's loop over a paged cache.
//
//   block table -> row offsets (a ring, a tile ahead) -> cp.async K and V tiles (`stages` deep)
//   -> S = Q K^T -> mask, softmax in registers -> O += P V
//
// Four warps. kMany: each warp has its own 16 or 32 query rows and all keys of a tile. kFew: all
// warps have the same 16 or 32 rows and 16 keys each, with their own (m, l, O), merged at the end:
// a decode tile's K and V are read from shared memory once.
// Each iteration has two barriers: A (K tile i is there; nobody uses V tile i-1 any more, its place
// takes V tile i-1+stages) and B (V tile i is there; K tile i's place takes K tile i+stages).
// 8-bit caches: a thread widens the very bytes it copied, so the barriers stay the same. A token's
// own K scale multiplies its column of S in fp32 (rounded into K it would cost a bit of every
// logit). Its V scale multiplies P in bf16, which holds every product; in fp16 tiny ones would be
// lost, so there it goes into the widened V.
// Bytes per tile of 64 keys at d128: 32 KiB in; flops 4 * 64 * 128 * rows.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/finish.cuh"
#include "cuda/kv_rows.cuh"
#include "cuda/tile/fragments.cuh"

namespace quire::cuda::sm80 {

inline constexpr int kMmaThreads = 128;
inline constexpr int kWide = 576;  // head sizes above 256: V in passes of 256 columns
inline constexpr float kLog2E = 1.4426950408889634F;

template <class Type_, bool kBytes_, int kHead_, bool kFew_>
struct MmaConfig {
  using Type = Type_;
  static constexpr bool kBytes = kBytes_;  // K and V are stored in 8 bits
  static constexpr bool kFew = kFew_;
  static constexpr int kHeadK = kHead_;
  static constexpr int kHeadV = kHead_ > 256 ? 256 : kHead_;
  static constexpr int kMTiles = kHead_ <= 128 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kWarpRows = kFew ? 1 : 4;
  static constexpr int kWarpKeys = kFew ? 4 : 1;
  static constexpr int kRows = 16 * kMTiles * kWarpRows;
  static constexpr int kKeys = kHead_ > 256 ? 32 : 64;
  static constexpr int kKeysPerWarp = kKeys / kWarpKeys;
  static constexpr int kPitchK = kHeadK * 2;  // bytes of a row in shared memory
  static constexpr int kPitchV = kHeadV * 2;
  static constexpr int kResultPitch = kHeadV + 4;  // floats
  static constexpr int kRing = 4;                  // tiles whose row offsets are known
  static constexpr int kMaxStages = kRing - 1;
  static constexpr int kQueryBytes = kRows * kPitchK;
  static constexpr int kTileK = kKeys * kPitchK;
  static constexpr int kTileV = kKeys * kPitchV;
  static constexpr int kStageK = kBytes ? kTileK / 2 : kTileK;
  static constexpr int kStageV = kBytes ? kTileV / 2 : kTileV;
  static constexpr int kPiecesK = kStageK / kKeys / 16;  // 16-byte pieces of a stored row
  static constexpr int kPiecesV = kStageV / kKeys / 16;
};

template <class C>
struct MmaShared {
  RowTable<C::kRows> rows;
  typename Finisher<C::kRows, kMmaThreads>::Shared finish;
  std::int64_t offset[C::kRing][2][C::kKeys];          // bytes from the start of K or V; -1: absent
  float scale[C::kBytes ? C::kRing : 1][2][C::kKeys];  // of tokens
  float warp_max[C::kWarpKeys][16];
  float warp_sum[C::kWarpKeys][16];
  float max[C::kRows];
  float sum[C::kRows];
  // One for all threads, here rather than in everybody's registers. Thread 0 walks.
  Walker walker;
  Segment segment;
  bool has_work;
};

template <class C>
constexpr int mma_shared_bytes(int stages) {
  const int fixed = (static_cast<int>(sizeof(MmaShared<C>)) + 127) / 128 * 128;
  const int loop =
      C::kQueryBytes + stages * (C::kStageK + C::kStageV) + (C::kBytes ? C::kTileK + C::kTileV : 0);
  const int merged_rows = C::kRows + (C::kFew ? 16 * C::kWarpKeys : 0);
  const int end = merged_rows * C::kResultPitch * static_cast<int>(sizeof(float));
  return fixed + (loop > end ? loop : end);
}

// Out of line, four scores at a time: inlined, 64 copies of it would take registers from the loop
// of the layers that have no such scores.
template <int kRows>
__device__ __noinline__ float4 modify_scores(const KernelParams& p, const RowTable<kRows>& rows,
                                             std::int32_t seq, int row, int key, float4 s) {
  return make_float4(modify_score<FloatOps>(p, rows, seq, row, key, s.x),
                     modify_score<FloatOps>(p, rows, seq, row, key + 1, s.y),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key, s.z),
                     modify_score<FloatOps>(p, rows, seq, row + 8, key + 1, s.w));
}

template <class C>
class MmaAttention {
 public:
  __device__ __forceinline__ MmaAttention(const KernelParams& p, char* memory)
      : p_(p),
        shared_(*reinterpret_cast<MmaShared<C>*>(memory)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        tiles_(memory + (sizeof(MmaShared<C>) + 127) / 128 * 128),
        query_(tile::shared_address(tiles_)),
        stage_k_(query_ + C::kQueryBytes),
        stage_v_(stage_k_ + p.stages * C::kStageK),
        wide_k_(stage_v_ + p.stages * C::kStageV),
        wide_v_(wide_k_ + C::kTileK) {
    const float scale = p.layer.softmax_scale * value_of(p.call.q_scale) * value_of(p.call.k.scale);
    negate_ = scale < 0;
    // At 0 a masked -inf would turn into NaN.
    score_scale_ = fmaxf(fabsf(scale), 1e-37F);
    general_ =
        p.layer.soft_cap > 0 || p.layer.alibi_slopes != nullptr || p.batch.qq_bias != nullptr;
  }

  __device__ __forceinline__ void run() {
    Finisher<C::kRows, kMmaThreads> finisher(p_, shared_.rows, shared_.finish);
    const Segment& segment = shared_.segment;
    const auto cta = static_cast<std::int32_t>(blockIdx.x);
    if (threadIdx.x == 0) shared_.walker = Walker(p_.schedule);
    while (advance()) {
      begin(segment);
      finisher.set_pass(first_column_, columns_);
      // One run in the free mode; one for each chunk where chunks must not depend on who does them.
      const int chunk = p_.layer.batch_invariant ? segment.tile.chunk_units
                                                 : segment.unit_end - segment.unit_begin;
      const bool one_run = segment.unit_end - segment.unit_begin <= chunk;
      int part = 0;
      int unit = segment.unit_begin;
      do {
        const int end = min(unit + chunk, segment.unit_end);
        attend(segment, unit, end);
        const Result result = settle(segment);
        if (one_run && segment.whole()) {
          finisher.write(segment, result);
        } else if (segment.unit_begin > 0) {
          finisher.keep(segment, result, finisher.slot(cta, ++part));
        } else if (unit == 0) {
          finisher.keep(segment, result, finisher.slot(cta, 0));
        } else {
          finisher.fold_into(segment, result, finisher.slot(cta, 0));
        }
        __syncthreads();
        unit = end;
      } while (unit < segment.unit_end);
      if (!segment.whole()) {
        finisher.arrive(shared_.walker, segment);
      } else if (!one_run) {
        finisher.write(segment, finisher.slot(cta, 0));
      }
    }
  }

 private:
  static constexpr int kNTiles = C::kKeysPerWarp / 8;
  static constexpr int kColumnTiles = C::kHeadV / 8;
  static constexpr bool kScaleWeights = std::is_same_v<typename C::Type, tile::BFloat16>;

  // ---- a segment's beginning ----------------------------------------------------------------

  __device__ __forceinline__ bool advance() {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.has_work = shared_.walker.next(p_.schedule, &shared_.segment);
    }
    __syncthreads();
    return shared_.has_work;
  }

  __device__ __forceinline__ void begin(const Segment& segment) {
    kv_head_ = segment.head / p_.passes;
    first_column_ = (segment.head - kv_head_ * p_.passes) * p_.columns;
    columns_ = min(p_.columns, p_.layer.head_size_v - first_column_);
    fill_rows<C::kRows, kMmaThreads>(p_, segment, kv_head_, shared_.rows);
    __syncthreads();
    kv_len_ = shared_.rows.kv_len;
    m_tiles_ = C::kFew ? (segment.tile.rows + 15) / 16 : C::kMTiles;
  }

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
    std::int32_t key;
    std::int32_t entry;  // physical block as the table has it; -1: no such key
  };

  // Thread t looks up key t % kKeys of a tile, for K (t < kKeys) or V.
  __device__ __forceinline__ RowPlace look_up(const Segment& segment, int first) const {
    RowPlace place{first + static_cast<int>(threadIdx.x) % C::kKeys, -1};
    if (place.key >= kv_len_) return place;
    if (!p_.layer.paged) {
      place.entry = 0;
      return place;
    }
    const std::uint32_t logical =
        static_cast<std::uint32_t>(place.key) / static_cast<std::uint32_t>(p_.layer.block_size);
    if (logical < p_.batch.table_width) {
      place.entry = p_.batch.block_table[segment.tile.seq * p_.batch.table_stride + logical];
    }
    return place;
  }

  // Writes down where the row is. Only here the table's entry is waited for.
  __device__ __forceinline__ void remember(const Segment& segment, int i, const RowPlace& place) {
    const int t = static_cast<int>(threadIdx.x) % C::kKeys;
    const int side = static_cast<int>(threadIdx.x) / C::kKeys;
    if (side > 1) return;
    const KvParams& kv = side == 1 ? p_.call.v : p_.call.k;
    std::int64_t offset = -1;
    float scale = 1.0F;
    if (place.entry >= 0 && (!p_.layer.paged || place.entry < p_.call.num_blocks)) {
      const KvRow row{place.entry, p_.layer.paged ? place.key % p_.layer.block_size
                                                  : segment.tile.first_kv_row + place.key};
      offset =
          (row_offset(kv, row, kv_head_) + (side == 1 ? first_column_ : 0)) * size_of(kv.dtype);
      if constexpr (C::kBytes) scale = row_scale(kv, row, kv_head_);
    }
    shared_.offset[i % C::kRing][side][t] = offset;
    if constexpr (C::kBytes) shared_.scale[i % C::kRing][side][t] = scale;
  }

  // Starts copying tile i of K (side 0) or V (side 1).
  template <int kSide>
  __device__ __forceinline__ void start_copy(int i) {
    constexpr int kPieces = kSide == 0 ? C::kPiecesK : C::kPiecesV;
    constexpr int kPitch = kSide == 0 ? C::kPitchK : C::kPitchV;
    constexpr int kStage = kSide == 0 ? C::kStageK : C::kStageV;
    constexpr int kCount = C::kKeys * kPieces;
    const KvParams& kv = kSide == 0 ? p_.call.k : p_.call.v;
    const auto* base = static_cast<const char*>(kv.data);
    const int alignment = kSide == 0 ? p_.k_copy_bytes : p_.v_copy_bytes;
    const int row_bytes = (kSide == 0 ? p_.layer.head_size : columns_) * (C::kBytes ? 1 : 2);
    const std::uint32_t stage =
        (kSide == 0 ? stage_k_ : stage_v_) + static_cast<std::uint32_t>(i % p_.stages) * kStage;
    const std::int64_t* offsets = shared_.offset[i % C::kRing][kSide];
    if (alignment >= 16 && kMmaThreads % kPieces == 0) {
      // Every piece of a thread has the same column.
      constexpr int kRowStep = kMmaThreads / kPieces > 0 ? kMmaThreads / kPieces : 1;
      const int c = static_cast<int>(threadIdx.x) % kPieces;
      const int first_row = static_cast<int>(threadIdx.x) / kPieces;
      const int valid = min(max(row_bytes - c * 16, 0), 16);
      const char* from = base + c * 16;
      if constexpr (kRowStep % 8 == 0 || C::kBytes) {
        std::uint32_t to =
            stage + (C::kBytes ? threadIdx.x * 16 : tile::piece_offset(first_row, c, kPitch));
#pragma unroll 4
        for (int r = first_row; r < C::kKeys; r += kRowStep) {
          const std::int64_t offset = offsets[r];
          tile::copy_async<16>(to, offset < 0 || valid == 0 ? base : from + offset,
                               offset < 0 ? 0 : valid);
          to += C::kBytes ? kMmaThreads * 16 : kRowStep * kPitch;
        }
      } else {
#pragma unroll 4
        for (int r = first_row; r < C::kKeys; r += kRowStep) {
          const std::int64_t offset = offsets[r];
          tile::copy_async<16>(stage + tile::piece_offset(r, c, kPitch),
                               offset < 0 || valid == 0 ? base : from + offset,
                               offset < 0 ? 0 : valid);
        }
      }
      return;
    }
#pragma unroll 1
    for (int id = static_cast<int>(threadIdx.x); id < kCount; id += kMmaThreads) {
      const int r = id / kPieces;
      const int c = id - r * kPieces;
      const std::int64_t offset = offsets[r];
      const int valid = offset < 0 ? 0 : min(max(row_bytes - c * 16, 0), 16);
      const std::uint32_t to = stage + (C::kBytes ? static_cast<std::uint32_t>(id) * 16
                                                  : tile::piece_offset(r, c, kPitch));
      tile::copy_piece(to, valid > 0 ? base + offset + c * 16 : base, valid, alignment);
    }
  }

  // Widens this thread's own bytes of tile i.
  template <int kSide>
  __device__ __forceinline__ void widen(int i) {
    constexpr int kPieces = kSide == 0 ? C::kPiecesK : C::kPiecesV;
    constexpr int kPitch = kSide == 0 ? C::kPitchK : C::kPitchV;
    constexpr int kStage = kSide == 0 ? C::kStageK : C::kStageV;
    constexpr int kCount = C::kKeys * kPieces;
    const KvParams& kv = kSide == 0 ? p_.call.k : p_.call.v;
    const bool scaled = kSide == 1 && !kScaleWeights && kv.token_scales != nullptr;
    const std::uint32_t stage =
        (kSide == 0 ? stage_k_ : stage_v_) + static_cast<std::uint32_t>(i % p_.stages) * kStage;
    const std::uint32_t to = kSide == 0 ? wide_k_ : wide_v_;
#pragma unroll 2
    for (int n = 0; n < (kCount + kMmaThreads - 1) / kMmaThreads; ++n) {
      const int id = static_cast<int>(threadIdx.x) + n * kMmaThreads;
      if (kCount % kMmaThreads != 0 && id >= kCount) break;
      const int r = id / kPieces;
      const int c = id - r * kPieces;
      const float scale = scaled ? shared_.scale[i % C::kRing][kSide][r] : 1.0F;
      std::uint32_t wide[8];
      tile::widen_piece<typename C::Type>(
          tile::load_piece(stage + static_cast<std::uint32_t>(id) * 16), kv.dtype, scaled, scale,
          wide);
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

  // ---- the loop -----------------------------------------------------------------------------

  // Units [unit_begin, unit_end) into (o_, max_, sum_).
  __device__ __forceinline__ void attend(const Segment& segment, int unit_begin, int unit_end) {
    const int count = (unit_end - unit_begin) * (kUnitKeys / C::kKeys);
    const int stages = p_.stages;
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[mt][n][e] = 0.0F;
      }
      max_[mt][0] = max_[mt][1] = -INFINITY;
      sum_[mt][0] = sum_[mt][1] = 0.0F;
    }
    if (count == 0) return;
#pragma unroll 1
    for (int i = 0; i <= stages && i < count; ++i) {
      remember(segment, i, look_up(segment, first_key(segment, unit_begin, i)));
    }
    load_queries(segment);  // arrives with the first tile
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      if (i < count) start_copy<0>(i);
      tile::commit_copies();
      if (i == stages - 1) break;
      if (i < count) start_copy<1>(i);
      tile::commit_copies();
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int ahead = i + stages + 1;
      RowPlace place{0, -1};
      if (ahead < count) place = look_up(segment, first_key(segment, unit_begin, ahead));
      wait_oldest();
      if constexpr (C::kBytes) widen<0>(i);
      __syncthreads();  // A
      if (i + stages - 1 < count) start_copy<1>(i + stages - 1);
      tile::commit_copies();

      float s[C::kMTiles][kNTiles][4];
      multiply_keys(i, s);
      const float* scales = C::kBytes ? shared_.scale[C::kBytes ? i % C::kRing : 0][0] : nullptr;
      if (C::kBytes && p_.call.k.token_scales != nullptr) scale_columns(scales, s);
      softmax(segment, first_key(segment, unit_begin, i), s);
      if (C::kBytes && kScaleWeights && p_.call.v.token_scales != nullptr) {
        scale_columns(scales + C::kKeys, s);
      }

      wait_oldest();
      if constexpr (C::kBytes) widen<1>(i);
      __syncthreads();  // B
      if (i + stages < count) start_copy<0>(i + stages);
      tile::commit_copies();
      multiply_values(i, s);
      if (ahead < count) remember(segment, ahead, place);
    }
    tile::wait_copies<0>();
  }

  __device__ __forceinline__ int warp_row() const { return C::kFew ? 0 : warp_ * 16 * C::kMTiles; }
  __device__ __forceinline__ int warp_key() const { return C::kFew ? warp_ * C::kKeysPerWarp : 0; }
  // kFew: decode tiles often fill only the first 16 rows.
  __device__ __forceinline__ bool used(int mt) const { return !C::kFew || mt < m_tiles_; }

  __device__ __forceinline__ void multiply_keys(int i, float (&s)[C::kMTiles][kNTiles][4]) {
    const std::uint32_t keys =
        C::kBytes ? wide_k_ : stage_k_ + static_cast<std::uint32_t>(i % p_.stages) * C::kStageK;
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0F;
      }
    }
    const std::uint32_t query = tile::opaque(tile::a_base(query_, warp_row(), C::kPitchK));
    const std::uint32_t key = tile::b_base(keys, warp_key(), C::kPitchK);
    constexpr int kUnroll = C::kHeadK <= 128 ? C::kHeadK / 16 : 4;
    const int steps = C::kHeadK <= 128 ? C::kHeadK / 16 : (p_.layer.head_size + 15) / 16;
#pragma unroll kUnroll
    for (int k = 0; k < steps; ++k) {
      std::uint32_t a[C::kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        if (!used(mt)) continue;
        tile::load_matrices(a[mt], tile::at_column(query, 2 * k) + mt * 16 * C::kPitchK);
      }
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        std::uint32_t b[4];
        tile::load_matrices(b, tile::at_column(key, 2 * k) + n * 8 * C::kPitchK);
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          if (!used(mt)) continue;
          C::Type::multiply(s[mt][n], a[mt], b[0], b[1]);
          C::Type::multiply(s[mt][n + 1], a[mt], b[2], b[3]);
        }
      }
    }
  }

  // Multiplies each key's column of S or P.
  __device__ __forceinline__ void scale_columns(const float* scales,
                                                float (&s)[C::kMTiles][kNTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 scale =
          *reinterpret_cast<const float2*>(scales + warp_key() + lane_ % 4 * 2 + n * 8);
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] *= e % 2 == 0 ? scale.x : scale.y;
      }
    }
  }

  // S -> P in place; updates (max_, sum_) and rescales o_. Maxima are in units of S: raw dot
  // products, or natural logits where scores are modified.
  __device__ __forceinline__ void softmax(const Segment& segment, int first,
                                          float (&s)[C::kMTiles][kNTiles][4]) {
    const std::int32_t* common = shared_.rows.common;
    const bool all_visible = (first >= common[2] && first + C::kKeys <= common[3]) ||
                             (first >= common[0] && first + C::kKeys <= common[1]);
    const float to_log2 = general_ ? kLog2E : score_scale_ * kLog2E;
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      if (!used(mt)) continue;
      const int row = warp_row() + mt * 16 + lane_ / 4;
      const int key = first + warp_key() + lane_ % 4 * 2;
      if (general_) modify(segment, row, key, s[mt]);
      if (!all_visible) mask(row, key, s[mt]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float max = max_[mt][h];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          max = fmaxf(max, fmaxf(s[mt][n][2 * h], s[mt][n][2 * h + 1]));
        }
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
        const float shift = semantics::softmax_shift(max);
        const float alpha = tile::exp2_approx((max_[mt][h] - shift) * to_log2);
        max_[mt][h] = max;
        const float scaled_shift = shift * to_log2;
        float sum = 0.0F;
        if (fabsf(scaled_shift) < 1e30F) {
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) {
              s[mt][n][e] = tile::exp2_approx(fmaf(s[mt][n][e], to_log2, -scaled_shift));
              sum += s[mt][n][e];
            }
          }
        } else {  // logits near the end of fp32's range: subtract before anything can overflow
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) {
              s[mt][n][e] = tile::exp2_approx((s[mt][n][e] - shift) * to_log2);
              sum += s[mt][n][e];
            }
          }
        }
        sum_[mt][h] = fmaf(sum_[mt][h], alpha, sum);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          o_[mt][n][2 * h] *= alpha;
          o_[mt][n][2 * h + 1] *= alpha;
        }
      }
    }
  }

  __device__ __forceinline__ void modify(const Segment& segment, int row, int key,
                                         float (&s)[kNTiles][4]) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float4 x = modify_scores(p_, shared_.rows, segment.tile.seq, row, key + n * 8,
                                     make_float4(s[n][0] * score_scale_, s[n][1] * score_scale_,
                                                 s[n][2] * score_scale_, s[n][3] * score_scale_));
      s[n][0] = x.x;
      s[n][1] = x.y;
      s[n][2] = x.z;
      s[n][3] = x.w;
    }
  }

  __device__ __forceinline__ void mask(int row, int key, float (&s)[kNTiles][4]) {
    const int4 low = shared_.rows.visible[row];
    const int4 high = shared_.rows.visible[row + 8];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!sees(e < 2 ? low : high, key + n * 8 + e % 2)) s[n][e] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int i, const float (&s)[C::kMTiles][kNTiles][4]) {
    const std::uint32_t values =
        C::kBytes ? wide_v_ : stage_v_ + static_cast<std::uint32_t>(i % p_.stages) * C::kStageV;
    const std::uint32_t value = tile::a_base(values, warp_key(), C::kPitchV);
#pragma unroll
    for (int k = 0; k < C::kKeysPerWarp / 16; ++k) {
      std::uint32_t a[C::kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < C::kMTiles; ++mt) {
        a[mt][0] = C::Type::pack(s[mt][2 * k][0], s[mt][2 * k][1]);
        a[mt][1] = C::Type::pack(s[mt][2 * k][2], s[mt][2 * k][3]);
        a[mt][2] = C::Type::pack(s[mt][2 * k + 1][0], s[mt][2 * k + 1][1]);
        a[mt][3] = C::Type::pack(s[mt][2 * k + 1][2], s[mt][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        std::uint32_t b[4];
        tile::load_matrices_transposed(b, tile::at_column(value, n) + k * 16 * C::kPitchV);
#pragma unroll
        for (int mt = 0; mt < C::kMTiles; ++mt) {
          if (!used(mt)) continue;
          C::Type::multiply(o_[mt][n], a[mt], b[0], b[1]);
          C::Type::multiply(o_[mt][n + 1], a[mt], b[2], b[3]);
        }
      }
    }
  }

  // ---- the end ------------------------------------------------------------------------------

  // Registers -> rows in shared memory, over Q, K and V. Ends with a barrier.
  __device__ __forceinline__ Result settle(const Segment& segment) {
    auto* area = reinterpret_cast<float*>(tiles_);
    Result result{area + (C::kFew ? 16 * C::kWarpKeys * C::kResultPitch : 0), shared_.max,
                  shared_.sum, C::kResultPitch};
    const float to_natural = general_ ? 1.0F : score_scale_;
    __syncthreads();
#pragma unroll
    for (int mt = 0; mt < C::kMTiles; ++mt) {
      if (!used(mt)) continue;
      float* rows = C::kFew ? area + warp_ * 16 * C::kResultPitch
                            : result.o + (warp_row() + mt * 16) * C::kResultPitch;
      float* max = C::kFew ? shared_.warp_max[warp_] : shared_.max + warp_row() + mt * 16;
      float* sum = C::kFew ? shared_.warp_sum[warp_] : shared_.sum + warp_row() + mt * 16;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane_ / 4 + h * 8;
        float total = sum_[mt][h];
        total += __shfl_xor_sync(~0U, total, 1);
        total += __shfl_xor_sync(~0U, total, 2);
        if (lane_ % 4 == 0) {
          max[r] = max_[mt][h] * to_natural;
          sum[r] = total;
        }
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          *reinterpret_cast<float2*>(rows + r * C::kResultPitch + n * 8 + lane_ % 4 * 2) =
              make_float2(o_[mt][n][2 * h], o_[mt][n][2 * h + 1]);
        }
      }
      if constexpr (C::kFew) {
        __syncthreads();
        merge_warps(area, mt, result);
      }
    }
    __syncthreads();
    return result;
  }

  // kFew: the warps' states of 16 rows into one, in warp order. Barriers around the loop over m
  // tiles: callers have one before, and this ends with one.
  __device__ __forceinline__ void merge_warps(const float* area, int mt, const Result& result) {
    for (int i = static_cast<int>(threadIdx.x); i < 16 * C::kHeadV / 4; i += kMmaThreads) {
      const int r = i / (C::kHeadV / 4);
      const int c = i % (C::kHeadV / 4) * 4;
      float max = -INFINITY;
#pragma unroll
      for (int w = 0; w < C::kWarpKeys; ++w) max = fmaxf(max, shared_.warp_max[w][r]);
      const float shift = semantics::softmax_shift(max);
      float4 o = make_float4(0, 0, 0, 0);
      float sum = 0.0F;
#pragma unroll
      for (int w = 0; w < C::kWarpKeys; ++w) {
        const float weight = tile::exp2_approx((shared_.warp_max[w][r] - shift) * kLog2E);
        const float4 part =
            *reinterpret_cast<const float4*>(area + (w * 16 + r) * C::kResultPitch + c);
        o.x = fmaf(part.x, weight, o.x);
        o.y = fmaf(part.y, weight, o.y);
        o.z = fmaf(part.z, weight, o.z);
        o.w = fmaf(part.w, weight, o.w);
        sum = fmaf(shared_.warp_sum[w][r], weight, sum);
      }
      *reinterpret_cast<float4*>(result.o + (mt * 16 + r) * C::kResultPitch + c) = o;
      if (c == 0) {
        result.max[mt * 16 + r] = max;
        result.sum[mt * 16 + r] = sum;
      }
    }
    __syncthreads();
  }

  const KernelParams& p_;
  MmaShared<C>& shared_;
  const int lane_;
  const int warp_;
  char* const tiles_;
  const std::uint32_t query_;
  const std::uint32_t stage_k_;
  const std::uint32_t stage_v_;
  const std::uint32_t wide_k_;
  const std::uint32_t wide_v_;
  bool negate_;
  bool general_;
  float score_scale_;
  int kv_head_ = 0;
  int first_column_ = 0;
  int columns_ = 0;
  int kv_len_ = 0;
  int m_tiles_ = 0;
  float o_[C::kMTiles][kColumnTiles][4];
  float max_[C::kMTiles][2];
  float sum_[C::kMTiles][2];
};

template <class C>
__global__ void __launch_bounds__(kMmaThreads, C::kHeadK <= 128 ? 2 : 1)
    attention_mma(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char memory[];
  MmaAttention<C>(p, memory).run();
}

}  // namespace quire::cuda::sm80
