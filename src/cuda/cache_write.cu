// New K and V rows into the cache. Rows of whole aligned pieces go piece by piece
// (cache_write_rows.cuh), others element by element:
//
//   slot_mapping -> (block, slot) | one warp a (token, head): K row, then V row, coalesced
//
// where per-token-head caches take the row's largest magnitude first (two passes over a row that is
// then in the L1). Rows for int4 caches are rotated in shared memory, by a warp each.
#include <algorithm>
#include <initializer_list>

#include "cuda/cache_write_rows.cuh"
#include "cuda/check.h"
#include "cuda/early_launch.h"
#include "cuda/kernels.h"
#include "semantics/int4.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Side {
  const char* from;
  char* to;
  float* token_scale;
  int size;
};

__device__ Side side_of(const CacheWriteParams& p, const KvParams& kv, const void* data,
                        std::int64_t token_stride, std::int64_t head_stride, int size,
                        std::int64_t token, std::int64_t slot, int head) {
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot - block * p.block_size;
  Side side;
  side.from = static_cast<const char*>(data) +
              (token * token_stride + head * head_stride) * size_of(p.dtype);
  side.to = static_cast<char*>(kv.data) +
            semantics::cache_offset(kv.strides, block, offset, head) * size_of(kv.dtype);
  side.token_scale =
      kv.token_scales == nullptr
          ? nullptr
          : kv.token_scales + semantics::cache_offset(kv.token_scale_strides, block, offset, head);
  side.size = size;
  return side;
}

__device__ void write_elements(const CacheWriteParams& p, const KvParams& kv, const Side& side) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (kv.dtype == p.dtype) {
    // Bits, so that NaN payloads survive.
    if (size_of(p.dtype) == 2) {
      for (int i = lane; i < side.size; i += 32) {
        reinterpret_cast<std::uint16_t*>(side.to)[i] =
            reinterpret_cast<const std::uint16_t*>(side.from)[i];
      }
    } else {
      for (int i = lane; i < side.size; i += 32) {
        reinterpret_cast<std::uint32_t*>(side.to)[i] =
            reinterpret_cast<const std::uint32_t*>(side.from)[i];
      }
    }
    return;
  }
  float scale = semantics::value_of(kv.scale);
  if (side.token_scale != nullptr) {
    float absmax = 0.0F;
    for (int i = lane; i < side.size; i += 32) {
      const float magnitude = fabsf(semantics::load_element(side.from, p.dtype, i));
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    for (int d = 16; d > 0; d /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(~0U, absmax, d));
    scale = semantics::token_head_scale(
        absmax, kv.dtype == DType::kInt8 ? semantics::kInt8Max : semantics::kE4M3Max);
    if (lane == 0) *side.token_scale = scale;
  }
  const float inverse = 1.0F / scale;
  for (int i = lane; i < side.size; i += 32) {
    const float element = semantics::load_element(side.from, p.dtype, i);
    semantics::store_element(side.to, kv.dtype, i,
                             side.token_scale != nullptr ? element * inverse : element / scale);
  }
}

// One warp, as semantics/int4.h calls the threads of a vector.
struct Warp {
  static constexpr int kSize = 32;
  static __device__ int thread() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ void sync() { __syncwarp(); }
};

// `y`: shared memory of this warp.
__device__ void write_int4(const CacheWriteParams& p, const Side& side, float* y) {
  const int lane = Warp::thread();
  semantics::rotate_row<Warp>(side.from, p.dtype, side.size, y);
  semantics::Int4Range range;
  for (int i = lane; i < side.size; i += 32) range.add(y[i]);  // this lane's own
  for (int d = 16; d > 0; d /= 2) {
    range.low = fminf(range.low, __shfl_xor_sync(~0U, range.low, d));
    range.high = fmaxf(range.high, __shfl_xor_sync(~0U, range.high, d));
  }
  const semantics::Int4Encoder encoder(range);
  if (lane == 0) *side.token_scale = encoder.stored_scale();
  __syncwarp();
  for (int i = lane; i < side.size / 2; i += 32) {
    side.to[i] = static_cast<char>(encoder.code(y[2 * i]) | encoder.code(y[2 * i + 1]) << 4);
  }
  __syncwarp();  // the next row goes where this one was
}

// Calls write(kv, side) for the K and then the V of each token and head, a warp each.
template <class Write>
__device__ void for_each_row(const CacheWriteParams& p, const Write& write) {
  const std::int64_t num_rows = p.num_slots * p.num_kv_heads;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < num_rows;
       row += stride) {
    const std::int64_t token = row / p.num_kv_heads;
    const auto head = static_cast<int>(row - token * p.num_kv_heads);
    const std::int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_blocks * p.block_size) continue;
    write(p.k, side_of(p, p.k, p.key, p.key_token_stride, p.key_head_stride, p.head_size, token,
                       slot, head));
    write(p.v, side_of(p, p.v, p.value, p.value_token_stride, p.value_head_stride, p.head_size_v,
                       token, slot, head));
  }
}

__global__ void __launch_bounds__(kThreads)
    cache_write_elements(const __grid_constant__ CacheWriteParams p) {
  ptx::start_dependents();
  for_each_row(p, [&](const KvParams& kv, const Side& side) { write_elements(p, kv, side); });
}

__global__ void __launch_bounds__(kThreads)
    cache_write_int4(const __grid_constant__ CacheWriteParams p) {
  ptx::start_dependents();
  __shared__ float y[kWarps][semantics::kMostInt4Elements];
  for_each_row(
      p, [&](const KvParams&, const Side& side) { write_int4(p, side, y[threadIdx.x / 32]); });
}

// Writes of a few tokens ask for shared memory on Hopper that they do not use: a multiprocessor
// divides its memory into L1 cache and shared memory anew only while it is empty, so attention,
// which wants all that there is, could not begin beside them (16 x 4k: 0.9 us). Large ones are
// slower by it, up to 7 %, for lack of L1.
constexpr int kFewCtas = 8;  // a multiprocessor

template <class Params>
void launch(const char* name, void (*kernel)(const Params), [[maybe_unused]] Device device,
            dim3 grid, int threads, const Params& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchAttribute carveout = {};
#if CUDART_VERSION >= 12050
  carveout.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  carveout.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  config.attrs = &carveout;
  const DeviceInfo& info = device_info(device.index);
  const bool is_small = std::int64_t{grid.x} * grid.y <= std::int64_t{kFewCtas} * info.sm_count;
  config.numAttrs = is_small && has_early_launches(info) ? 1 : 0;
#endif
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  if (error != cudaSuccess) check_launch(name, grid, threads, 0);
}

void launch_elements(const CacheWriteParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxGrid = 1 << 20;
  const std::int64_t rows = params.num_slots * params.num_kv_heads;
  const auto grid =
      static_cast<unsigned>(semantics::min_of((rows + kWarps - 1) / kWarps, kMaxGrid));
  if (params.k.dtype == semantics::kInt4) {
    launch("cache_write_int4", cache_write_int4, params.device, grid, kThreads, params, stream);
    return;
  }
  launch("cache_write_elements", cache_write_elements, params.device, grid, kThreads, params,
         stream);
}

// A kernel for rows of whole pieces, and what it asks of them.
struct RowKernel {
  void (*kernel)(const RowParams) = nullptr;  // null: there is none
  std::int64_t from_bytes = 0;                // of a piece
  std::int64_t to_bytes = 0;
  std::int64_t held = 0;  // pieces of a thread, at most
};

template <DType kFrom, DType kTo, bool kScaled = false>
RowKernel row_kernel() {
  // Bits are copied alike whatever they mean.
  if constexpr (kFrom == kTo && kFrom != DType::kFloat32) {
    return row_kernel<DType::kFloat32, DType::kFloat32>();
  }
  using P = Piece<kFrom, kTo>;
  return {cache_write_rows<kFrom, kTo, kScaled>, P::kFromBytes, P::kToBytes, kHeld<kFrom, kTo>};
}

template <DType kFrom>
RowKernel row_kernel_from(DType to, bool scaled) {
  switch (to) {
    case DType::kFloat32: return row_kernel<kFrom, DType::kFloat32>();
    case DType::kFloat16: return row_kernel<kFrom, DType::kFloat16>();
    case DType::kBFloat16: return row_kernel<kFrom, DType::kBFloat16>();
    case DType::kFloat8E5M2: return row_kernel<kFrom, DType::kFloat8E5M2>();
    case DType::kFloat8E4M3:
      return scaled ? row_kernel<kFrom, DType::kFloat8E4M3, true>()
                    : row_kernel<kFrom, DType::kFloat8E4M3>();
    case DType::kInt8: return row_kernel<kFrom, DType::kInt8, true>();
    default: return {};
  }
}

RowKernel row_kernel_of(DType from, DType to, bool scaled) {
  switch (from) {
    case DType::kFloat32: return row_kernel_from<DType::kFloat32>(to, scaled);
    case DType::kFloat16: return row_kernel_from<DType::kFloat16>(to, scaled);
    case DType::kBFloat16: return row_kernel_from<DType::kBFloat16>(to, scaled);
    default: return {};
  }
}

bool are_multiples(std::int64_t of, std::initializer_list<std::int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(),
                     [&](std::int64_t number) { return number % of == 0; });
}

// Sets up one side; false if its rows are not whole aligned pieces, or have a scale and are too
// long.
bool set_side(const RowKernel& kernel, const CacheWriteParams& p, const KvParams& kv,
              const void* rows, std::int64_t token_stride, std::int64_t head_stride,
              std::int64_t size, RowSide* side) {
  const std::int64_t from = size_of(p.dtype);
  const std::int64_t to = size_of(kv.dtype);
  const auto in_bytes = [](const semantics::CacheStrides& strides, std::int64_t bytes) {
    return semantics::CacheStrides{strides.block * bytes, strides.slot * bytes,
                                   strides.head * bytes};
  };
  side->from = static_cast<const char*>(rows);
  side->to = static_cast<char*>(kv.data);
  side->from_token_stride = token_stride * from;
  side->from_head_stride = head_stride * from;
  side->to_strides = in_bytes(kv.strides, to);
  side->scale = kv.scale;
  side->token_scales = reinterpret_cast<char*>(kv.token_scales);
  side->token_scale_strides = in_bytes(kv.token_scale_strides, sizeof(float));

  const bool is_scaled = kv.token_scales != nullptr;
  const auto to_is_aligned_to = [&](std::int64_t bytes) {
    return are_multiples(bytes, {reinterpret_cast<std::intptr_t>(side->to), side->to_strides.block,
                                 side->to_strides.slot, side->to_strides.head});
  };
  side->to_is_aligned = to_is_aligned_to(kernel.to_bytes);
  if (!side->to_is_aligned && !(is_scaled && to_is_aligned_to(4))) return false;
  if (!are_multiples(kernel.from_bytes, {size * from, reinterpret_cast<std::intptr_t>(side->from),
                                         side->from_token_stride, side->from_head_stride})) {
    return false;
  }

  const std::int64_t pieces = size * from / kernel.from_bytes;
  side->pieces = static_cast<std::uint32_t>(pieces);
  // Lanes: 4, so that even 8-byte pieces fill sectors of 32 bytes; then 2 pieces each up to 8
  // lanes, which read whole lines (with 4 lanes for head size 128, writes were 6 % slower); then up
  // to `held` pieces each.
  while ((1LL << side->lanes_log2) < 4 ||
         ((1LL << side->lanes_log2) < 8 && 2LL << side->lanes_log2 < pieces) ||
         kernel.held << side->lanes_log2 < pieces) {
    ++side->lanes_log2;
  }
  return !is_scaled || side->lanes_log2 <= 5;
}

// False, and nothing is written, if rows are not whole aligned pieces (or too many pieces a token).
bool launch_rows(const CacheWriteParams& p, cudaStream_t stream) {
  const RowKernel kernel = row_kernel_of(p.dtype, p.k.dtype, p.k.token_scales != nullptr);
  RowParams params;
  if (kernel.kernel == nullptr ||
      !set_side(kernel, p, p.k, p.key, p.key_token_stride, p.key_head_stride, p.head_size,
                &params.sides[0]) ||
      !set_side(kernel, p, p.v, p.value, p.value_token_stride, p.value_head_stride, p.head_size_v,
                &params.sides[1])) {
    return false;
  }
  params.num_slots = static_cast<std::uint64_t>(p.num_blocks * p.block_size);
  params.heads = RowDivider(static_cast<std::uint32_t>(p.num_kv_heads));
  params.block_size = SlotDivider(p.block_size);
  const std::uint32_t lanes_log2 =
      semantics::max_of(params.sides[0].lanes_log2, params.sides[1].lanes_log2);

  // The kernels count threads in 31 bits.
  const std::int64_t most_tokens = (1LL << 31 >> lanes_log2) / p.num_kv_heads;
  if (most_tokens == 0) return false;
  for (std::int64_t first = 0; first < p.num_slots; first += most_tokens) {
    const std::int64_t rows = semantics::min_of(most_tokens, p.num_slots - first) * p.num_kv_heads;
    RowParams part = params;
    part.slot_mapping = p.slot_mapping + first;
    part.num_rows = static_cast<std::uint32_t>(rows);
    for (RowSide& side : part.sides) side.from += first * side.from_token_stride;
    const std::int64_t threads = rows << lanes_log2;
    const dim3 grid(static_cast<unsigned>((threads + kRowThreads - 1) / kRowThreads), 2);
    launch("cache_write_rows", kernel.kernel, p.device, grid, kRowThreads, part, stream);
  }
  return true;
}

}  // namespace

bool is_cache_write(const void* function) {
  const auto is = [&](auto* kernel) { return reinterpret_cast<const void*>(kernel) == function; };
  if (is(cache_write_elements) || is(cache_write_int4)) return true;
  for (const DType from : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const DType to : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E5M2,
                           DType::kFloat8E4M3, DType::kInt8}) {
      for (const bool scaled : {false, true}) {
        if (is(row_kernel_of(from, to, scaled).kernel)) return true;
      }
    }
  }
  return false;
}

void launch_cache_write(const CacheWriteParams& params, cudaStream_t stream) {
  if (params.num_slots == 0 || params.num_kv_heads == 0) return;
  if (!launch_rows(params, stream)) launch_elements(params, stream);
}

}  // namespace quire::cuda
