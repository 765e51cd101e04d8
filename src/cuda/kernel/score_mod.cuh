// What is done to a score before the softmax, besides masks: soft cap, ALiBi, query-query bias.
#pragma once

#include <cstdint>

#include "cuda/kernel/row_table.cuh"
#include "semantics/host_device.h"

namespace quire::cuda {

// Scores' number type for semantics/score.inc.
struct FloatOps {
  __device__ float mul(float a, float b) const { return a * b; }
  __device__ float add(float a, float b) const { return a + b; }
  // 1 - 2 / (e^2x + 1): absolute error about 1e-7, unlike tanh.approx's 5e-4 of a cap of 50.
  __device__ float tanh(float x) const { return 1.0F - __fdividef(2.0F, __expf(2.0F * x) + 1.0F); }
  __device__ float sqrt(float x) const { return sqrtf(x); }
  __device__ float max(float a, float b) const { return fmaxf(a, b); }
  __device__ float neg(float a) const { return -a; }
  __device__ float zero() const { return 0.0F; }
};

// As FloatOps, to fp32 precision.
struct ExactFloatOps : FloatOps {
  __device__ float tanh(float x) const { return tanhf(x); }
};

namespace score {
#include "semantics/score.inc"
}

// Soft cap, ALiBi and query-query bias on the score in natural units of (row, key j). Masks come
// after. Differences modulo 2^32: exact for all positions below 2^31.
template <class Ops, int kRows>
__device__ __forceinline__ float modify_score(const KernelParams& p, const RowTable<kRows>& table,
                                              const WorkTile& tile, int r, int j, float s) {
  const Ops ops;
  if (p.layer.soft_cap > 0) {
    s = score::soft_cap(ops, s, p.layer.soft_cap, score::inverse_of_cap(p.layer.soft_cap));
  }
  if (p.layer.alibi_slopes != nullptr) {
    const auto distance = static_cast<float>(static_cast<std::int32_t>(
        static_cast<std::uint32_t>(j) * static_cast<std::uint32_t>(table.kv_stride) -
        static_cast<std::uint32_t>(table.position[r])));
    s = p.layer.alibi_sqrt ? score::alibi_sqrt(ops, s, table.slope[r], distance)
                           : score::alibi(ops, s, table.slope[r], distance);
  }
  if (p.batch.qq_bias != nullptr) {
    const int i = table.query_index[r];
    const std::uint32_t n =
        static_cast<std::uint32_t>(j) - static_cast<std::uint32_t>(tile.context_len);
    if (n < p.batch.qq_size && i < p.batch.qq_size) {
      s += p.batch.qq_bias[tile.seq * p.batch.qq_seq_stride + i * p.batch.qq_row_stride + n];
    }
  }
  return s;
}

}  // namespace quire::cuda
