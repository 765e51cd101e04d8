// merge_states: two results over disjoint keys into one. One warp a (token, head), elements over
// the lanes; each element is read before it is written by the same thread, so outputs may alias.
#include "cuda/check.h"
#include "cuda/kernels.h"
#include "semantics/quant.h"
#include "semantics/softmax_state.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ std::int64_t lse_offset(const MergePart& part, std::int64_t token, std::int64_t head) {
  return head * part.lse_head_stride + token * part.lse_token_stride;
}

__device__ const void* row_of(const MergeParams& p, const MergePart& part, std::int64_t token,
                              std::int64_t head) {
  return static_cast<const char*>(part.output) +
         (token * part.token_stride + head * part.head_stride) * size_of(p.dtype);
}

__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ MergeParams p) {
  using State = semantics::SoftmaxState<float>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t num_rows = p.num_tokens * p.num_heads;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < num_rows;
       row += stride) {
    const std::int64_t token = row / p.num_heads;
    const std::int64_t head = row - token * p.num_heads;
    const auto merged = semantics::merge(State{p.a.lse[lse_offset(p.a, token, head)], 1.0F},
                                         State{p.b.lse[lse_offset(p.b, token, head)], 1.0F});
    const auto finished = semantics::finish(merged.state, false, 0.0F);
    const float weight_a = merged.weight_a * finished.output_scale;
    const float weight_b = merged.weight_b * finished.output_scale;
    const void* a = row_of(p, p.a, token, head);
    const void* b = row_of(p, p.b, token, head);
    void* result = const_cast<void*>(row_of(p, p.result, token, head));
    for (int i = lane; i < p.head_size_v; i += 32) {
      // A part without keys may hold anything, NaN included.
      const float part_a = weight_a > 0 ? weight_a * semantics::load_element(a, p.dtype, i) : 0.0F;
      const float part_b = weight_b > 0 ? weight_b * semantics::load_element(b, p.dtype, i) : 0.0F;
      semantics::store_element(result, p.dtype, i, part_a + part_b);
    }
    __syncwarp();  // all lanes have read both lse
    if (lane == 0 && p.result.lse != nullptr) {
      const_cast<float*>(p.result.lse)[lse_offset(p.result, token, head)] = finished.lse;
    }
  }
}

}  // namespace

void launch_merge(const MergeParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxGrid = 1 << 20;
  const std::int64_t rows = params.num_tokens * params.num_heads;
  const auto grid =
      static_cast<unsigned>(semantics::min_of((rows + kWarps - 1) / kWarps, kMaxGrid));
  merge<<<grid, kThreads, 0, stream>>>(params);
  check_launch("merge_states", dim3(grid), kThreads, 0);
}

}  // namespace quire::cuda
