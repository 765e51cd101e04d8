// Attention in fp32 FFMA arithmetic.
//
//   per split: Q -> shared memory; per tile of 16 or 32 keys:
//     K -> shared (widened, scaled) | S = Q K^T, mask, softmax: 8 threads a row | V -> the same
//     shared memory | O += P V: a thread owns columns, all 16 rows in registers
//
// Barriers: one after each of the four steps. Not tuned: it serves accuracy and odd dtypes. Over
// int4 caches a warp rotates a row of Q, and of O before it leaves the CTA: whatever is made of
// partial results behind that is linear in O.
#include <algorithm>
#include <span>

#include "cuda/check.h"
#include "cuda/kernel/combine_splits.cuh"
#include "cuda/kernel/kv_address.cuh"
#include "cuda/kernel/score_mod.cuh"
#include "cuda/kernel/team.cuh"
#include "cuda/kernel_table.h"
#include "cuda/ptx/cp_async.cuh"
#include "semantics/kv_element.h"

namespace quire::cuda::fp32 {
namespace {

constexpr int kRows = 16;
constexpr int kThreads = 128;
constexpr int kKvTile = 64;  // of the plan; worked through in steps of 16 or 32 keys
using Team = CtaTeam<kThreads>;
constexpr int kMaxKeys = 32;
constexpr int kThreadsPerRow = kThreads / kRows;

struct Shared {
  RowTable<kRows> rows;
  Split split;  // at work
  bool works;
  SplitCombiner<Team, kRows>::Shared combine;
  float p[kRows][kMaxKeys + 1];
  float max[kRows];
  float sum[kRows];
  float alpha[kRows];
};

// Dynamic shared memory behind Shared: Q, then K or V or the result.
__host__ __device__ constexpr int result_pitch(int head_size_v) {
  return (head_size_v + 7) / 8 * 8 + 4;
}

__device__ void load_queries(const KernelParams& p, const RowTable<kRows>& rows, int num_rows,
                             float* q, int pitch) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int r = warp; r < kRows; r += kThreads / 32) {
    const char* from = static_cast<const char*>(p.query) +
                       (rows.token[r] * p.query_token_stride + rows.head[r] * p.query_head_stride) *
                           size_of(p.layer.dtype);
    for (int d = static_cast<int>(threadIdx.x) % 32; d < p.layer.head_size; d += 32) {
      q[r * pitch + d] = r < num_rows ? semantics::load_element(from, p.layer.dtype, d) : 0.0F;
    }
    if (p.k.dtype == semantics::kInt4) {
      semantics::rotate_query<WarpTeam>(q + r * pitch, p.layer.head_size);
    }
  }
}

__device__ void rotate_outputs(const PartialRows& rows, int size) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int r = warp; r < kRows; r += kThreads / 32) {
    semantics::rotate_output<WarpTeam>(rows.o + r * rows.pitch, size);
  }
}

// Keys [first, first + count) of one side, widened and scaled; unmapped rows are zeros.
__device__ void load_rows(const KernelParams& p, const KvParams& kv, const WorkTile& tile,
                          const RowTable<kRows>& rows, int kv_head, int first, int count, int size,
                          float* to, int pitch) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int t = warp; t < count; t += kThreads / 32) {
    const KvRow row = rows.may_read(first + t) ? kv_row(p, tile, first + t) : KvRow{};
    const auto scale = semantics::KvScale::of_token(row_scale(kv, row, kv_head), kv.dtype);
    const char* from = static_cast<const char*>(kv.data) +
                       (row.block < 0 ? 0 : row_offset(kv, row, kv_head) * size_of(kv.dtype));
    for (int d = static_cast<int>(threadIdx.x) % 32; d < size; d += 32) {
      to[t * pitch + d] =
          row.block < 0 ? 0.0F
                        : semantics::load_kv_element(from, kv.dtype, scale.zero, d) * scale.scale;
    }
  }
}

// Scores of this thread's row at keys lane, lane + 8, ...; softmax state and P.
__device__ void scores(const KernelParams& p, Shared& shared, const Split& split, const float* q,
                       int q_pitch, const float* k, int k_pitch, int first, int keys, float scale) {
  const int r = static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int lane = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  // Four partial sums a dot product: the rounding of one long sum shows where logits are large.
  constexpr int kSums = 4;
  float sums[kMaxKeys / kThreadsPerRow][kSums] = {};
  for (int d = 0; d < p.layer.head_size; d += kSums) {
#pragma unroll
    for (int u = 0; u < kSums; ++u) {
      if (d + u >= p.layer.head_size) continue;
      const float x = q[r * q_pitch + d + u];
#pragma unroll
      for (int n = 0; n < kMaxKeys / kThreadsPerRow; ++n) {
        const int t = lane + n * kThreadsPerRow;
        if (t < keys) sums[n][u] += x * k[t * k_pitch + d + u];
      }
    }
  }
  float s[kMaxKeys / kThreadsPerRow];
#pragma unroll
  for (int n = 0; n < kMaxKeys / kThreadsPerRow; ++n) {
    s[n] = (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]);
  }
  float max = -INFINITY;
#pragma unroll
  for (int n = 0; n < kMaxKeys / kThreadsPerRow; ++n) {
    const int t = lane + n * kThreadsPerRow;
    const int j = first + t;
    const bool visible = t < keys && sees(shared.rows.visible[r], j);
    s[n] = visible
               ? modify_score<ExactFloatOps>(p, shared.rows, shared.split.tile, r, j, s[n] * scale)
               : -INFINITY;
    max = fmaxf(max, s[n]);
  }
  for (int d = 1; d < kThreadsPerRow; d *= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, d));
  const float old_max = shared.max[r];
  max = fmaxf(max, old_max);
  const float shift = semantics::softmax_shift(max);
  float sum = 0.0F;
#pragma unroll
  for (int n = 0; n < kMaxKeys / kThreadsPerRow; ++n) {
    const int t = lane + n * kThreadsPerRow;
    const float weight = expf(s[n] - shift);
    if (t < keys) shared.p[r][t] = weight;
    sum += weight;
  }
  for (int d = 1; d < kThreadsPerRow; d *= 2) sum += __shfl_xor_sync(~0U, sum, d);
  __syncwarp();
  if (lane == 0) {
    const float alpha = expf(old_max - shift);
    shared.alpha[r] = alpha;
    shared.max[r] = max;
    shared.sum[r] = shared.sum[r] * alpha + sum;
  }
}

// A tile's products are summed up by themselves first: added one by one to sums over 90,000 keys,
// they cost more than the 1e-5 that fp32 results are good to.
template <int kColumns>
__device__ void add_values(const Shared& shared, const float* v, int pitch, int keys, int size,
                           float (&acc)[kRows][kColumns]) {
  float part[kRows][kColumns] = {};
  for (int t = 0; t < keys; ++t) {
    float x[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = static_cast<int>(threadIdx.x) + c * kThreads;
      x[c] = column < size ? v[t * pitch + column] : 0.0F;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float weight = shared.p[r][t];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) part[r][c] += weight * x[c];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float alpha = shared.alpha[r];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[r][c] = acc[r][c] * alpha + part[r][c];
  }
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    attention(const __grid_constant__ KernelParams p, int keys) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int q_pitch = p.layer.head_size | 1;
  const int k_pitch = q_pitch;
  const int v_pitch = p.layer.head_size_v | 1;
  float* q = reinterpret_cast<float*>(memory + (sizeof(Shared) + 15) / 16 * 16);
  float* kv = q + (kRows * q_pitch + 3) / 4 * 4;
  const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
  Epilogue<Team, kRows> epilogue(p, shared.rows);
  epilogue.set_pass(0, p.layer.head_size_v);
  SplitCombiner<Team, kRows> combiner(p, epilogue, shared.combine);
  WorkIterator iterator(p.schedule, static_cast<std::int32_t>(blockIdx.x));
  Split& split = shared.split;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) shared.works = iterator.next(p.schedule, &split);
    __syncthreads();
    if (!shared.works) break;
    const int kv_head = split.head;
    fill_rows<Team>(p, split, kv_head, shared.rows);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    if (threadIdx.x < kRows) {
      shared.max[threadIdx.x] = -INFINITY;
      shared.sum[threadIdx.x] = 0.0F;
    }
    __syncthreads();
    load_queries(p, shared.rows, split.tile.rows, q, q_pitch);
    float acc[kRows][kColumns] = {};
    const int steps = kKvTile / keys;
    const int end = split.existing_end(keys_of(p, split.tile), kKvTile);
    for (int i = split.kv_tile_begin * steps; i < end * steps; ++i) {
      const int first = split.tile.kv_tile(i / steps) * kKvTile + i % steps * keys;
      load_rows(p, p.k, split.tile, shared.rows, kv_head, first, keys, p.layer.head_size, kv,
                k_pitch);
      __syncthreads();
      scores(p, shared, split, q, q_pitch, kv, k_pitch, first, keys, scale);
      __syncthreads();
      load_rows(p, p.v, split.tile, shared.rows, kv_head, first, keys, p.layer.head_size_v, kv,
                v_pitch);
      __syncthreads();
      add_values<kColumns>(shared, kv, v_pitch, keys, p.layer.head_size_v, acc);
      __syncthreads();
    }
    const PartialRows result{kv, shared.max, shared.sum, result_pitch(p.layer.head_size_v)};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = static_cast<int>(threadIdx.x) + c * kThreads;
        if (column < p.layer.head_size_v) result.o[r * result.pitch + column] = acc[r][c];
      }
    }
    __syncthreads();
    if (p.v.dtype == semantics::kInt4) {
      rotate_outputs(result, p.layer.head_size_v);
      __syncthreads();
    }
    if (split.whole()) {
      epilogue.write(split, result);
    } else {
      combiner.store_partial(split, result,
                             combiner.partial(static_cast<std::int32_t>(blockIdx.x),
                                              split.kv_tile_begin == 0 ? 0 : 1));
      combiner.combine_if_last(iterator.item_ctas(split), split);
    }
  }
}

std::size_t shared_bytes(const LayerParams& layer, int keys) {
  const int q_pitch = layer.head_size | 1;
  const int v_pitch = layer.head_size_v | 1;
  const int kv =
      std::max(keys * std::max(q_pitch, v_pitch), kRows * result_pitch(layer.head_size_v));
  return (sizeof(Shared) + 15) / 16 * 16 +
         sizeof(float) * static_cast<std::size_t>((kRows * q_pitch + 3) / 4 * 4 + kv);
}

using Function = void (*)(KernelParams, int);

// By the output columns that a thread has.
constexpr int kMaxHeadSizeV = 5 * kThreads;
Function function_of(const LayerParams& layer) {
  const int columns = (layer.head_size_v + kThreads - 1) / kThreads;
  if (columns <= 1) return attention<1>;
  if (columns <= 2) return attention<2>;
  return attention<5>;
}

// Keys of a step: what fits beside the queries.
int step_keys(const LayerParams& layer) {
  return std::max(layer.head_size, layer.head_size_v) <= 256 ? 32 : 16;
}

bool prepare(const LayerParams& layer, const DeviceInfo& device, Launch* launch) {
  const Function function = function_of(layer);
  launch->shared_bytes = static_cast<int>(shared_bytes(layer, step_keys(layer)));
  // For all plans of this process: see sm80::prepare().
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.shared_bytes_per_block),
        "fp32::attention: shared memory");
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&launch->ctas_per_sm, function, kThreads,
                                                    static_cast<std::size_t>(launch->shared_bytes)),
      "fp32::attention: occupancy");
  return launch->ctas_per_sm > 0;
}

void launch(const Launch& launch, int grid, const KernelParams& params, cudaStream_t stream) {
  const auto bytes = static_cast<std::size_t>(launch.shared_bytes);
  function_of(params.layer)<<<grid, kThreads, bytes, stream>>>(params, step_keys(params.layer));
  check_launch("fp32::attention", dim3(static_cast<unsigned>(grid)), kThreads, bytes);
}

AttentionKernel make_row() {
  AttentionKernel row;
  row.key.compute = DType::kFloat32;
  row.key.max_head_size = 576;
  row.key.score_mod = true;
  row.name = "fp32::attention";
  // The costs of the sm80 kernels, not measured for this one: they hardly matter where arithmetic
  // takes ten times as long.
  row.policy.rows = kRows;
  row.policy.kv_tile = kKvTile;
  row.policy.v_columns = kMaxHeadSizeV;
  row.policy.item_overhead = 2;
  row.policy.min_range_cost = 6;
  row.policy.cut_cost = 6;
  row.policy.max_uncut = 8;
  row.policy.min_chunk = 8;
  row.shared_prefix = true;
  row.prepare = prepare;
  row.launch = launch;
  return row;
}

}  // namespace

std::span<const AttentionKernel> kernels() {
  static const AttentionKernel row = make_row();
  return {&row, 1};
}

}  // namespace quire::cuda::fp32
