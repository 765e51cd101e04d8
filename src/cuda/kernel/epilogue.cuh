// The last step of a row, when all its keys have been seen: divided by l, scaled, written to output
// and lse. Rows of a shared prefix's tile are stored as they are (O, m, l) in the prefix partials;
// rows of the tiles behind it are first combined with these.
#pragma once

#include <cstdint>

#include "cuda/kernel/partial.cuh"
#include "cuda/kernel/row_table.cuh"
#include "cuda/ptx/mma.cuh"
#include "semantics/quant.h"

namespace quire::cuda {

// All is inlined but normalise(): around a call registers are set aside, also in the loop over
// keys.
template <class Team, int kRows>
class Epilogue {
 public:
  // `columns`: of this pass, from column `first_column` of the head on.
  __device__ Epilogue(const KernelParams& p, RowTable<kRows>& table) : p_(p), table_(table) {}

  __device__ void set_pass(int first_column, int columns) {
    first_column_ = first_column;
    columns_ = columns;
  }
  __device__ int columns() const { return columns_; }

  // The rows of an item, complete but not normalised, to the output.
  __device__ __forceinline__ void write(const Split& split, const PartialRows& result) {
    const int pieces = (columns_ + 7) / 8;
#pragma unroll 1
    for (int i = Team::thread(); i < split.tile.rows * pieces; i += Team::kSize) {
      const int r = i / pieces;
      const int c = i % pieces * 8;
      const auto* from =
          reinterpret_cast<const float4*>(result.o + std::int64_t{r} * result.pitch + c);
      normalise(split.tile, r, c, result.max[r], result.sum[r], from[0], from[1]);
    }
  }

  // Eight columns of row `r`, complete but not normalised, to where they belong.
  __device__ __noinline__ void normalise(const WorkTile& tile, int r, int c, float max, float sum,
                                         float4 low, float4 high) const {
    if (tile.prefix_row >= 0) {
      const PrefixPartials& prefix_partials = p_.schedule.prefix_partials;
      const std::int64_t token = tile.prefix_row + (tile.first_sub + r) / p_.layer.group;
      const std::int64_t row = token * p_.layer.num_heads + table_.head[r];
      const int column = first_column_ + c;
      auto* prefix_o =
          reinterpret_cast<float4*>(prefix_partials.o + row * prefix_partials.pitch + column);
      // Each pass over a row's columns has a maximum of its own: passes may have been cut at other
      // keys, and the prefill kernel's maximum depends on the cuts.
      const std::int64_t state = row * prefix_partials.passes + column / prefix_partials.columns;
      if (p_.schedule.shared_rows != nullptr) {
        prefix_o[0] = low;
        prefix_o[1] = high;
        if (c == 0) {
          prefix_partials.max[state] = max;
          prefix_partials.sum[state] = sum;
        }
        return;
      }
      Combine combine{prefix_partials.max[state], prefix_partials.sum[state]};
      combine.add(max, sum);
      max = combine.max;
      sum = combine.sum;
      low = combine.value(prefix_o[0], low);
      high = combine.value(prefix_o[1], high);
    }
    // Every thread of a row computes the same scale: no exchange needed.
    const float scale = output_scale_of(r, max, sum, c == 0);
    const float values[8] = {low.x * scale,  low.y * scale,  low.z * scale,  low.w * scale,
                             high.x * scale, high.y * scale, high.z * scale, high.w * scale};
    store(r, c, values);
  }

  // For kernels that normalise a row in registers, where it has no shared prefix: the factor of O,
  __device__ __forceinline__ float output_scale_of(int r, float max, float sum,
                                                   bool writes_lse) const {
    const bool has_sink = p_.layer.sinks != nullptr;
    const int head = table_.head[r];
    const auto normalised = semantics::normalise(semantics::SoftmaxState<float>{max, sum}, has_sink,
                                                 has_sink ? table_.sink[r] : 0.0F);
    if (writes_lse && p_.lse != nullptr && first_column_ == 0) {
      p_.lse[head * p_.lse_head_stride + table_.token[r] * p_.lse_token_stride] = normalised.lse;
    }
    return normalised.output_scale * value_of(p_.v.scale);
  }

  // and where it goes, two 16-bit elements a word, if the output is that simple.
  __device__ bool stores_pairs() const {
    return p_.output_aligned && p_.block_output == nullptr && size_of(p_.output_dtype) == 2;
  }
  __device__ std::uint32_t* output_row(int r) const {
    const std::int64_t offset = table_.token[r] * p_.output_token_stride +
                                table_.head[r] * p_.output_head_stride + first_column_;
    return reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(p_.output) + offset);
  }

 private:
  __device__ void store(int r, int c, const float (&values)[8]) const {
    const std::int64_t token = table_.token[r];
    const std::int64_t head = table_.head[r];
    const int column = first_column_ + c;
    const int count = min(8, columns_ - c);
    DType dtype = p_.output_dtype;
    char* to;
    bool whole = p_.output_aligned && count == 8;
    if (p_.block_output != nullptr) {
      dtype = DType::kFloat32;
      to = reinterpret_cast<char*>(
          p_.block_output + (token * p_.layer.num_heads + head) * p_.layer.head_size_v + column);
      whole = p_.layer.head_size_v % 8 == 0 && count == 8;
    } else {
      to =
          static_cast<char*>(p_.output) +
          (token * p_.output_token_stride + head * p_.output_head_stride + column) * size_of(dtype);
    }
    if (whole && dtype == DType::kBFloat16) {
      *reinterpret_cast<uint4*>(to) = pack<ptx::BFloat16>(values);
    } else if (whole && dtype == DType::kFloat16) {
      *reinterpret_cast<uint4*>(to) = pack<ptx::Half>(values);
    } else if (whole && dtype == DType::kFloat32) {
      auto* out = reinterpret_cast<float4*>(to);
      out[0] = make_float4(values[0], values[1], values[2], values[3]);
      out[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      // Element by element, and small: this code is in every kernel. Fp8 outputs come here:
      // divided, for the inverse of a denormal scale is infinite.
      const float divisor = p_.has_output_scale ? value_of(p_.output_scale) : 1.0F;
#pragma unroll 1
      for (int i = 0; i < count; ++i) semantics::store_element(to, dtype, i, values[i] / divisor);
    }
  }

  template <class Type>
  static __device__ uint4 pack(const float (&values)[8]) {
    return make_uint4(Type::pack(values[0], values[1]), Type::pack(values[2], values[3]),
                      Type::pack(values[4], values[5]), Type::pack(values[6], values[7]));
  }

  const KernelParams& p_;
  RowTable<kRows>& table_;
  int first_column_ = 0;
  int columns_ = 0;
};

}  // namespace quire::cuda
