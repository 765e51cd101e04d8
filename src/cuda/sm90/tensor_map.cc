#include "cuda/sm90/tensor_map.h"

#include <cuda.h>

#include <array>
#include <numeric>
#include <string>

#include "cuda/check.h"

namespace quire::cuda::sm90 {
namespace {

// Bytes of a column, the swizzle's width; of rows of 64 bytes that is all.
constexpr std::int64_t kColumn = 128;
std::int64_t column_bytes(std::int64_t row_bytes) { return row_bytes < kColumn ? 64 : kColumn; }

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// Asked of the driver at run time: the library links no libcuda.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

// With the swizzle of the box's rows, 64 or 128 bytes; what is outside reads as zeros.
ptx::TensorMap encode(DType dtype, int rank, const void* data, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps) {
  const CUtensorMapDataType type = size_of(dtype) == 1         ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool narrow = box[0] * size_of(dtype) == 64;
  ptx::TensorMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(ptx::TensorMap));
  const CUresult status =
      encoder()(reinterpret_cast<CUtensorMap*>(&map), type, static_cast<cuuint32_t>(rank),
                const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                narrow ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

// All that a map of a cache's side is made of.
struct Key {
  const void* data;
  DType dtype;
  std::int64_t block_bytes;
  std::int64_t slot_bytes;
  std::int64_t head_bytes;
  std::int64_t num_blocks;
  std::int32_t block_size;
  std::int32_t num_heads;
  std::int32_t head_size;
  std::int32_t box_keys;

  friend bool operator==(const Key&, const Key&) = default;
};

std::int64_t heads_per_block(const Key& key) {
  return key.num_heads == 1 ? 1 : key.block_bytes / key.head_bytes;
}

// The stride of the dimension of blocks and heads.
std::int64_t row_bytes(const Key& key) {
  return key.num_heads == 1 ? key.block_bytes : key.head_bytes;
}

KvMap encode(const Key& key) {
  const std::int64_t element = size_of(key.dtype);
  const std::int64_t column = column_bytes(key.head_size * element);
  const auto columns = static_cast<cuuint64_t>(key.head_size * element / column);
  const auto rows =
      static_cast<cuuint64_t>((key.num_blocks - 1) * heads_per_block(key) + key.num_heads);
  const auto in_column = static_cast<cuuint64_t>(column / element);
  const cuuint64_t sizes[5] = {in_column, 8, columns, rows,
                               static_cast<cuuint64_t>(key.block_size / 8)};
  const cuuint64_t strides[4] = {
      static_cast<cuuint64_t>(key.slot_bytes), static_cast<cuuint64_t>(column),
      static_cast<cuuint64_t>(row_bytes(key)), static_cast<cuuint64_t>(8 * key.slot_bytes)};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(in_column), 8,
                             static_cast<cuuint32_t>(columns), 1,
                             static_cast<cuuint32_t>(key.box_keys / 8)};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  KvMap result;
  result.map = encode(key.dtype, 5, key.data, sizes, strides, box, steps);
  result.heads_per_block = static_cast<std::int32_t>(heads_per_block(key));
  return result;
}

// All that a map of rows is made of.
struct RowKey {
  const void* data;
  DType dtype;
  std::int64_t head_bytes;
  std::int64_t token_bytes;
  std::int64_t num_tokens;
  std::int32_t num_heads;
  std::int32_t box_heads;
  std::int32_t box_tokens;

  friend bool operator==(const RowKey&, const RowKey&) = default;
};

ptx::TensorMap encode(const RowKey& key) {
  const auto elements = static_cast<cuuint64_t>(kColumn / 2);
  const cuuint64_t sizes[3] = {elements, static_cast<cuuint64_t>(key.num_heads),
                               static_cast<cuuint64_t>(key.num_tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(key.head_bytes),
                                 static_cast<cuuint64_t>(key.token_bytes)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(elements),
                             static_cast<cuuint32_t>(key.box_heads),
                             static_cast<cuuint32_t>(key.box_tokens)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(key.dtype, 3, key.data, sizes, strides, box, steps);
}

bool fits(const KvParams& kv, std::int64_t head_bytes, std::int64_t slot_bytes,
          std::int64_t block_bytes, std::int32_t num_heads, std::int64_t num_blocks) {
  // What the driver asks of addresses and strides.
  constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;
  const auto is_stride = [](std::int64_t bytes) {
    return bytes > 0 && bytes % 16 == 0 && bytes < kMostBytes;
  };
  if (reinterpret_cast<std::uintptr_t>(kv.data) % 16 != 0) return false;
  if (!is_stride(8 * slot_bytes) || slot_bytes % 16 != 0 || !is_stride(block_bytes)) return false;
  if (num_blocks <= 0) return false;
  if (num_heads == 1) return num_blocks < (std::int64_t{1} << 31);
  return is_stride(head_bytes) && block_bytes % head_bytes == 0 &&
         block_bytes / head_bytes * num_blocks < (std::int64_t{1} << 31);
}

// A thread's maps, the most recent of each place. A map is a function of its key, so nothing here
// can be out of date.
struct Memory {
  struct Entry {
    Key k{};
    Key v{};
    KvMaps maps{};
  };
  std::array<Entry, 64> entries;  // a model's layers
};

Key key_of(const KernelParams& p, bool is_k, int box_keys) {
  const KvParams& kv = is_k ? p.k : p.v;
  return {kv.data,
          kv.dtype,
          is_k ? p.k_block_bytes : p.v_block_bytes,
          is_k ? p.k_slot_bytes : p.v_slot_bytes,
          is_k ? p.k_head_bytes : p.v_head_bytes,
          p.num_blocks,
          p.layer.block_size,
          p.layer.num_kv_heads,
          is_k ? p.layer.head_size : p.layer.head_size_v,
          box_keys};
}

}  // namespace

bool has_tensor_maps() { return encoder() != nullptr; }

bool maps_fit(const LayerParams& layer) {
  const std::int64_t element = size_of(layer.kv_dtype);
  const auto has_columns = [element](std::int64_t size) {
    return size * element % column_bytes(size * element) == 0;
  };
  return layer.paged && layer.block_size % 16 == 0 && has_columns(layer.head_size) &&
         has_columns(layer.head_size_v);
}

bool maps_fit(const KernelParams& p) {
  return fits(p.k, p.k_head_bytes, p.k_slot_bytes, p.k_block_bytes, p.layer.num_kv_heads,
              p.num_blocks) &&
         fits(p.v, p.v_head_bytes, p.v_slot_bytes, p.v_block_bytes, p.layer.num_kv_heads,
              p.num_blocks);
}

const KvMaps& kv_maps(const KernelParams& p, int tile_keys) {
  thread_local Memory memory;
  const int box_keys = std::gcd(p.layer.block_size, tile_keys);
  const Key k = key_of(p, true, box_keys);
  const Key v = key_of(p, false, box_keys);
  // Caches are far apart: any bits above the first ones tell them apart.
  const auto address = reinterpret_cast<std::uintptr_t>(k.data);
  const std::uint64_t hash =
      (address / 256 + static_cast<std::uint64_t>(box_keys)) * 0x9E3779B97F4A7C15U;
  Memory::Entry& entry = memory.entries[hash >> 58];
  if (entry.k != k || entry.v != v) {
    entry.maps = {encode(k), encode(v), box_keys};
    entry.k = k;
    entry.v = v;
  }
  return entry.maps;
}

namespace {

// What the driver asks of the addresses and strides of rows.
bool rows_fit(const void* data, std::int64_t head_stride, std::int64_t token_stride) {
  const auto fits = [](std::int64_t stride) {
    return stride > 0 && stride % 8 == 0 && stride < (std::int64_t{1} << 39);
  };
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && fits(head_stride) &&
         fits(token_stride);
}

struct RowMemory {
  struct Entry {
    RowKey query{};
    RowKey output{};
    RowMaps maps{};
  };
  std::array<Entry, 64> entries;
};

}  // namespace

bool row_maps_fit(const KernelParams& p) {
  return p.layer.head_size == 64 && p.layer.head_size_v == 64 && size_of(p.layer.dtype) == 2 &&
         p.batch.num_tokens > 0 && p.batch.num_tokens < (std::int64_t{1} << 31) &&
         rows_fit(p.query, p.query_head_stride, p.query_token_stride) &&
         rows_fit(p.output, p.output_head_stride, p.output_token_stride);
}

const RowMaps& row_maps(const KernelParams& p, int box_tokens) {
  thread_local RowMemory memory;
  const auto key = [&](const void* data, std::int64_t head_stride, std::int64_t token_stride) {
    return RowKey{data,
                  p.layer.dtype,
                  head_stride * 2,
                  token_stride * 2,
                  p.batch.num_tokens,
                  p.layer.num_heads,
                  p.layer.group,
                  box_tokens};
  };
  const RowKey query = key(p.query, p.query_head_stride, p.query_token_stride);
  const RowKey output = key(p.output, p.output_head_stride, p.output_token_stride);
  const auto address = reinterpret_cast<std::uintptr_t>(p.output);
  const std::uint64_t hash =
      (address / 256 + static_cast<std::uint64_t>(p.batch.num_tokens)) * 0x9E3779B97F4A7C15U;
  RowMemory::Entry& entry = memory.entries[hash >> 58];
  if (entry.query != query || entry.output != output) {
    entry.maps = {encode(query), encode(output)};
    entry.query = query;
    entry.output = output;
  }
  return entry.maps;
}

}  // namespace quire::cuda::sm90
