// What src/cpu/attention.cc (scheduling, plain C++) and the per-ISA kernels share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/plan.h"
#include "params.h"

namespace quire::cpu {

// Row and column counts of scratch tiles are padded to these, whatever the ISA.
inline constexpr std::int32_t kPadK = 16;  // head_size: the widest vector
inline constexpr std::int32_t kPadV = 64;  // head_size_v: the widest panel
inline constexpr std::int64_t kMaxKvTile = 64;

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

// Weights and so outputs and sums are kept 2^-16 times what they are until a row is finished: sums
// of 65,536 values of any size do not overflow. By a power of two, nothing is rounded.
inline constexpr int kWeightsDownLog2 = 16;

// The running result of an item's rows, head after head (head_rows apart): unnormalised
// outputs [rows, padded head_size_v], maxima, sums.
struct PartialRows {
  float* o = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
};

// A query token of the current tile, and what it sees (already clipped to the tile's keys).
struct TileToken {
  std::int64_t row = 0;
  std::int64_t distance = 0;     // from its position to that of key 0
  std::int64_t kv_stride = 1;    // and from each key to the next
  std::int64_t context_len = 0;  // index of this step's first key
  std::int64_t query_index = 0;  // its row within its sequence
  std::int32_t seq = 0;
  semantics::Spans visible;
};

// One worker's scratch: everything a tile needs, sized by the plan's largest tile.
struct Scratch {
  AlignedFloats memory;
  std::vector<TileToken> tokens;

  float* q = nullptr;        // [heads, head_rows, padded head_size], scaled
  float* k = nullptr;        // one K tile of each head, in the layout of the path taken
  float* v = nullptr;        // one V tile of each head, in panels
  float* staging = nullptr;  // a few widened K rows before transposition
  float* s = nullptr;        // [rows, kMaxKvTile] logits, then weights
  float* alpha = nullptr;    // [rows] rescaling of what came before
  float* new_max = nullptr;  // [rows]
  PartialRows result;
  PartialRows chunk;  // a chunk to be folded into `result`
};

// Everything a kernel needs to know about the item it works on.
struct Item {
  const AttentionParams* params = nullptr;
  const WorkTile* tile = nullptr;
  Scratch* scratch = nullptr;
  std::int32_t kv_head = 0;     // the first of
  std::int32_t heads = 0;       // this many
  std::int32_t rows = 0;        // of one head: num_tokens * group, group fastest
  std::int32_t head_rows = 0;   // distance of heads in `q` and in results, in rows
  std::int64_t hull_begin = 0;  // no row of the tile sees a key before it
  std::int64_t hull_end = 0;    // no row of the tile sees a key at or past it
  semantics::Spans common;      // every row of the tile sees these keys
  std::int64_t first_kv_row = 0;
  bool cold = false;         // the first chunk of a run: nobody asked for its keys yet
  float query_scale = 1.0F;  // softmax, query and key scales
  std::int64_t padded_k = 0;
  std::int64_t padded_v = 0;
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  // Fills scratch->q.
  void (*load_queries)(const Item& item);
  // Attends the units [unit_begin, unit_end) from scratch: overwrites `out`.
  void (*run_chunk)(const Item& item, std::int32_t unit_begin, std::int32_t unit_end,
                    const PartialRows& out);
  // into = into + part, rows [0, rows).
  void (*fold)(const PartialRows& into, const PartialRows& part, std::int32_t rows,
               std::int64_t padded_v);
  // to[0, size) = from[0, size) * scale / divisor in `dtype`; 16 and 32 bits know no divisor but 1.
  void (*store_row)(const float* from, std::int64_t size, float scale, float divisor, void* to,
                    DType dtype);
};

// Kernels for this machine, or for QUIRE_CPU_ISA if set (AVX3, AVX2, NEON, SCALAR). Throws Error if
// that ISA is unknown to this build or missing on this machine.
const Kernels& kernels();

}  // namespace quire::cpu
