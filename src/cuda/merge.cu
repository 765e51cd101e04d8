// merge_states: two results over disjoint keys into one. One warp a (token, head), elements over
// the lanes; each element is read before it is written by the same thread, so outputs may alias.
#include "cuda/check.h"
#include "cuda/kernels.h"
#include "semantics/merge_row.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ MergeParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t num_rows = p.num_tokens * p.num_heads;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < num_rows;
       row += stride) {
    const std::int64_t token = row / p.num_heads;
    const std::int64_t head = row - token * p.num_heads;
    const auto merged =
        semantics::merge_rows<float>(*p.a.lse_at(token, head), *p.b.lse_at(token, head));
    const void* a = p.a.row(p.dtype, token, head);
    const void* b = p.b.row(p.dtype, token, head);
    void* result = const_cast<void*>(p.result.row(p.dtype, token, head));
    for (int i = lane; i < p.head_size_v; i += 32) {
      semantics::store_element(result, p.dtype, i, merged.element(a, b, p.dtype, i));
    }
    __syncwarp();  // all lanes have read both lse
    if (lane == 0 && p.result.lse != nullptr) {
      *const_cast<float*>(p.result.lse_at(token, head)) = merged.lse;
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
