// fp32 rows -> fp8 rows with a scale for each group of 128 elements of the flattened row. Groups
// cross heads, so this runs when all heads of a token are there. One warp a group; CTA b takes the
// tokens of every sequence that are b modulo the grid.
#include "cuda/check.h"
#include "cuda/kernels.h"
#include "semantics/quant.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;

__device__ void quantize_token(const KernelParams& p, std::int64_t token) {
  const std::int64_t row_size = std::int64_t{p.layer.num_heads} * p.layer.head_size_v;
  const float* from = p.block_output + token * row_size;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t begin = threadIdx.x / 32 * semantics::kOutputGroup; begin < row_size;
       begin += kThreads / 32 * semantics::kOutputGroup) {
    const std::int64_t end = semantics::min_of(begin + semantics::kOutputGroup, row_size);
    float absmax = 0.0F;
    for (std::int64_t i = begin + lane; i < end; i += 32) absmax = fmaxf(absmax, fabsf(from[i]));
    for (int d = 16; d > 0; d /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(~0U, absmax, d));
    const float scale = semantics::block_output_scale(absmax);
    if (lane == 0) {
      p.block_scales[token * p.block_scales_token_stride +
                     begin / semantics::kOutputGroup * p.block_scales_group_stride] = scale;
    }
    for (std::int64_t i = begin + lane; i < end; i += 32) {
      const std::int64_t head = i / p.layer.head_size_v;
      auto* to = static_cast<std::uint8_t*>(p.output) + token * p.output_token_stride +
                 head * p.output_head_stride;
      to[i - head * p.layer.head_size_v] = semantics::float_to_e4m3(from[i] / scale);
    }
  }
}

__global__ void __launch_bounds__(kThreads) block_quantize(const __grid_constant__ KernelParams p) {
  for (std::int32_t s = 0; s < p.batch.num_seqs; ++s) {
    const std::int64_t begin = clamp_index(p.batch.query_start_loc[s], 0, p.batch.num_tokens);
    const std::int64_t end = clamp_index(p.batch.query_start_loc[s + 1], begin, p.batch.num_tokens);
    const std::int64_t grid = gridDim.x;
    const std::int64_t offset = (blockIdx.x + grid - begin % grid) % grid;
    for (std::int64_t token = begin + offset; token < end; token += grid) {
      quantize_token(p, token);
    }
  }
}

}  // namespace

void launch_block_quantize(const KernelParams& params, int grid, cudaStream_t stream) {
  block_quantize<<<grid, kThreads, 0, stream>>>(params);
  check_launch("block_quantize", dim3(static_cast<unsigned>(grid)), kThreads, 0);
}

}  // namespace quire::cuda
