// What src/cpu/attention.cc (scheduling, plain C++) and the per-ISA kernels share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/pairs.h"
#include "cpu/plan.h"
#include "cpu/tiles.h"
#include "params.h"

namespace quire::cpu {

// Rows and columns of scratch tiles are padded to these, whatever the ISA.
inline constexpr std::int32_t kPadK = 16;        // head_size: the widest vector
inline constexpr std::int32_t kPadV = 64;        // head_size_v: the widest panel
inline constexpr std::int64_t kMaxKvTile = 128;  // keys of any kv tile

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A grow-only buffer of floats on a cache line boundary.
class AlignedFloats {
 public:
  void grow(std::int64_t count) {
    if (count <= size_) return;
    const auto bytes = static_cast<std::size_t>(round_up(count * 4, 64));
    auto* fresh = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (fresh == nullptr) throw std::bad_alloc();
    data_.reset(fresh);
    size_ = count;
  }
  float* data() const { return data_.get(); }
  std::int64_t bytes() const { return size_ * 4; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  std::int64_t size_ = 0;
};

// Weights, and with them outputs and sums, are kept times 2^-16 until a row is normalised: sums of
// 65,536 values of any size do not overflow. By a power of two, nothing is rounded.
inline constexpr int kWeightsDownLog2 = 16;

// Unnormalised results of an item's rows over some of its keys (O, m, l): outputs [rows, padded
// head_size_v], maxima, sums. Kv heads follow each other, head_rows() rows apart.
struct Partial {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
};

// A query token of the current tile, and what it sees (already clipped to the tile's keys).
struct TileToken {
  std::int64_t row = 0;
  std::int64_t distance = 0;     // position of key 0 minus its own
  std::int64_t kv_stride = 1;    // positions from a key to the next
  std::int64_t context_len = 0;  // index of this step's first key
  std::int64_t query_index = 0;  // its row within its sequence
  std::int32_t seq = 0;
  semantics::Spans visible;
};

// Scratch of prefill_tiles-inl.h and decode_pairs-inl.h: bf16, in the layouts of TileProduct.
struct TileScratch {
  std::uint16_t* q = nullptr;     // [head_rows, padded head_size]; in decode PairScores::q a head
  std::uint16_t* k = nullptr;     // tiles of K transposed
  std::uint16_t* v = nullptr;     // tiles of V
  std::uint16_t* p = nullptr;     // [32 rows, kMaxKvTile] weights
  std::uint16_t* rows = nullptr;  // a few rows of K or V before they become tiles
};

// One thread's scratch: everything an item needs, sized by the plan's largest.
struct Scratch {
  AlignedFloats memory;
  std::vector<TileToken> tokens;

  float* q = nullptr;        // [kv_heads, head_rows, padded head_size], scaled
  float* k = nullptr;        // one widened K tile of each kv head, in its kernel's layout
  float* v = nullptr;        // one widened V tile of each kv head, in panels
  float* staging = nullptr;  // a few widened K rows before transposition
  float* s = nullptr;        // [rows, kMaxKvTile] logits, then weights
  float* alpha = nullptr;    // [rows] rescaling of earlier sums and outputs
  float* new_max = nullptr;  // [rows]
  TileScratch tiles;
  Partial item_partial;   // of the chunks of an item so far
  Partial chunk_partial;  // of one chunk, to be combined with item_partial
};

// Everything a kernel needs to know about the item it works on.
struct WorkItem {
  const AttentionParams* params = nullptr;
  const WorkTile* tile = nullptr;
  Scratch* scratch = nullptr;
  MultiplyTiles multiply_tiles = nullptr;       // null: not a prefill by products of bf16
  const PairKernels* multiply_pairs = nullptr;  // null: not a decode by products of bf16
  std::int32_t first_kv_head = 0;
  std::int32_t kv_heads = 0;
  std::int32_t rows = 0;           // of one kv head: num_tokens * group, group fastest
  std::int32_t head_rows = 0;      // rows from a kv head to the next in `q` and in partials
  std::int64_t visible_begin = 0;  // no row of the tile sees a key before it
  std::int64_t visible_end = 0;    // no row of the tile sees a key from here on
  semantics::Spans common;         // every row of the tile sees these keys
  std::int64_t first_kv_row = 0;   // direct attention: row of key 0
  bool cold = false;         // the thread's first chunk of the item: its first keys must be fetched
  float query_scale = 1.0F;  // softmax, query and key scales
  std::int64_t padded_k = 0;
  std::int64_t padded_v = 0;

  // Row r of the item's kv head h.
  const char* query_row(std::int32_t h, std::int32_t r) const {
    const LayerParams& layer = params->layer;
    const TileToken& token = scratch->tokens[static_cast<std::size_t>(r / layer.group)];
    const std::int64_t head = (first_kv_head + h) * layer.group + r % layer.group;
    return static_cast<const char*>(params->query) +
           (token.row * params->query_token_stride + head * params->query_head_stride) *
               size_of(layer.dtype);
  }
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  MultiplyTiles multiply_tiles;       // null: the ISA has no products of bf16
  const PairKernels* multiply_pairs;  // null: it has none for few rows
  // Fills scratch->q, or scratch->tiles.q where the item has multiply_tiles or multiply_pairs.
  void (*load_queries)(const WorkItem& item);
  // Attends to the kv tiles [kv_tile_begin, kv_tile_end) of the item's tile; overwrites `out`.
  void (*attend_chunk)(const WorkItem& item, std::int32_t kv_tile_begin, std::int32_t kv_tile_end,
                       const Partial& out);
  // Combines `later`, which is over other keys, into `into`: rows [0, rows).
  void (*combine)(const Partial& into, const Partial& later, std::int32_t rows,
                  std::int64_t padded_v);
  // to[0, size) = from[0, size) * scale / divisor in `dtype`. Only 8-bit dtypes divide; for the
  // others the divisor must be 1.
  void (*store_row)(const float* from, std::int64_t size, float scale, float divisor, void* to,
                    DType dtype);
};

// What the bytes of an fp8 or int8 cache stand for.
const ByteTable& byte_table(DType dtype);

// Kernels for this machine, or for QUIRE_CPU_ISA if set: AVX3, AVX2, NEON, SCALAR, or AVX3_BF16 or AMX,
// which are AVX3 with bf16 products by AVX-512 or by tile instructions. AMX_PORTABLE is their arithmetic
// in plain code, for tests. Throws Error if that ISA is unknown to this build or missing on this machine.
const Kernels& kernels();

}  // namespace quire::cpu
