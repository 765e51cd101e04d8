#include "cuda/sm80/table.h"

#include <algorithm>

#include "cuda/check.h"

namespace quire::cuda::sm80 {

// X(name) for each file of instances/ that this build compiles, written by CMake.
#define X(name) MmaKernel name();
#include "cuda_instances.inc"
#undef X

const std::vector<MmaKernel>& mma_kernels() {
#define X(name) name(),
  static const std::vector<MmaKernel> list = {
#include "cuda_instances.inc"
  };
#undef X
  return list;
}

namespace {

const MmaKernel* find(const MmaKey& key) {
  for (const MmaKernel& kernel : mma_kernels()) {
    if (kernel.key == key) return &kernel;
  }
  return nullptr;
}

std::string requests_of(const MmaKernel& kernel) {
  if (kernel.key.requests != Requests::kMany) {
    return "requests of up to " + std::to_string(kernel.rows) + " rows";
  }
  MmaKey few = kernel.key;
  few.requests = Requests::kFew;
  return find(few) != nullptr ? "longer requests" : "all requests";
}

}  // namespace

std::string describe(const MmaKernel& kernel) {
  const MmaKey& key = kernel.key;
  const std::string compute = to_string(key.compute);
  const bool takes_fp8 = key.bytes && key.compute == DType::kFloat16;
  return compute + (takes_fp8 ? " and fp8" : "") + " queries; K and V in " +
         (key.bytes ? "8 bits" : compute) + "; head sizes up to " + std::to_string(key.head) +
         "; " + requests_of(kernel) + (key.general ? "; soft cap, ALiBi or query-query bias" : "");
}

namespace {

bool is_16_bit(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }
bool is_fp8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

int bucket_of(int head_size, int head_size_v) {
  const int size = std::max(head_size, head_size_v);
  for (const int bucket : {64, 128, 256}) {
    if (size <= bucket) return bucket;
  }
  return 576;
}

}  // namespace

const MmaKernel* find_mma_kernel(DType query, DType kv, int head_size, int head_size_v,
                                 Requests requests, bool general) {
  MmaKey key;
  key.bytes = size_of(kv) == 1;
  key.head = bucket_of(head_size, head_size_v);
  key.requests = requests;
  key.general = general;
  if (is_16_bit(query) && (kv == query || key.bytes)) {
    key.compute = query;
  } else if (query == DType::kFloat8E4M3 && is_fp8(kv)) {
    key.compute = DType::kFloat16;  // holds every fp8 value
  } else {
    return nullptr;
  }
  // An output of so few columns has too few weights' roundings to average.
  if (head_size_v < kLeastHeadSizeV) return nullptr;
  return find(key);
}

MmaLaunch mma_launch(const MmaKernel& kernel, int shared_bytes_per_block) {
  // More stages keep more copies under way; fewer are better where that doubles the CTAs of a
  // multiprocessor, which cover for each other.
  MmaLaunch best;
  allow_shared_bytes(kernel, shared_bytes_per_block);
  // Decode kernels wait for powers of two only.
  for (int stages = 1; stages <= kernel.max_stages;
       stages += kernel.key.requests != Requests::kMany ? stages : 1) {
    MmaLaunch launch;
    launch.stages = stages;
    launch.shared_bytes = kernel.shared_bytes(stages);
    if (launch.shared_bytes > shared_bytes_per_block) break;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
              &launch.ctas_per_sm, kernel.function, kernel.threads,
              static_cast<std::size_t>(launch.shared_bytes)),
          kernel.name);
    if (launch.ctas_per_sm == 0) break;
    if (best.stages == 0 || launch.ctas_per_sm * 2 > best.ctas_per_sm) best = launch;
  }
  return best;
}

void allow_shared_bytes(const MmaKernel& kernel, int shared_bytes_per_block) {
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes_per_block),
        kernel.name);
}

void launch_attention_mma(const MmaKernel& kernel, const MmaLaunch& launch,
                          const KernelParams& params, int grid, cudaStream_t stream) {
  void* arguments[] = {const_cast<KernelParams*>(&params)};
  const auto shared_bytes = static_cast<std::size_t>(launch.shared_bytes);
  const dim3 shape(static_cast<unsigned>(grid));
  const cudaError_t error =
      cudaLaunchKernel(kernel.function, shape, dim3(static_cast<unsigned>(kernel.threads)),
                       arguments, shared_bytes, stream);
  if (error != cudaSuccess) check_launch(kernel.name, shape, kernel.threads, shared_bytes);
}

}  // namespace quire::cuda::sm80
