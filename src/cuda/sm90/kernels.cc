#include "cuda/sm90/kernels.h"

#include <deque>
#include <span>
#include <string>
#include <vector>

#include "cuda/check.h"

namespace quire::cuda::sm90 {

// X(name) for each line of instances.def that this build compiles, written by CMake.
#define X(name) AttentionKernel name();
#include "sm90_instances.inc"
#undef X

namespace {

// Decode kernels over 8-bit caches multiply in fp16 but take queries in bf16 too: each gets a second
// row for those. (Prefill kernels widen the cache to the queries' type.)
std::vector<AttentionKernel> with_bf16_queries(std::vector<AttentionKernel> rows) {
  static std::deque<std::string> names;
  for (std::size_t i = 0, count = rows.size(); i < count; ++i) {
    if (!rows[i].key.kv8 || rows[i].key.max_rows == kAnyRows) continue;
    AttentionKernel row = rows[i];
    row.key.compute = DType::kBFloat16;
    std::string& name = names.emplace_back(row.name);
    name.replace(name.find("fp16"), 4, "bf16");
    row.name = name.c_str();
    rows.push_back(row);
  }
  return rows;
}

}  // namespace

std::span<const AttentionKernel> kernels() {
#define X(name) name(),
  static const std::vector<AttentionKernel> rows = with_bf16_queries({
#include "sm90_instances.inc"
  });
#undef X
  return rows;
}

bool prepare(const Instance& instance, const LayerParams& layer, const DeviceInfo& device,
             Launch* launch) {
  if (!maps_fit(layer) || instance.shared_bytes > device.shared_bytes_per_block ||
      !has_tensor_maps()) {
    return false;
  }
  // All there is, as in sm80: the limit belongs to the process.
  check(cudaFuncSetAttribute(instance.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.shared_bytes_per_block),
        instance.name);
  launch->pipeline_stages = 1;
  launch->shared_bytes = instance.shared_bytes;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &launch->ctas_per_sm, instance.function, instance.threads,
            static_cast<std::size_t>(instance.shared_bytes)),
        instance.name);
  return launch->ctas_per_sm > 0;
}

namespace {

// `early`: may begin while the cache write before it is under way; kernels wait for it themselves.
void launch_with(const Instance& instance, const Launch& launch, int grid, void** arguments,
                 bool early, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(instance.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelExC(&config, instance.function, arguments);
  if (error != cudaSuccess) {
    check_launch(instance.name, config.gridDim, instance.threads, config.dynamicSmemBytes);
  }
}

}  // namespace

void launch(const Instance& instance, const Launch& launch, int grid, const KernelParams& params,
            cudaStream_t stream) {
  KvMaps maps = kv_maps(params, instance.tile_keys);
  RowMaps rows;
  if (instance.box_tokens != nullptr) rows = row_maps(params, instance.box_tokens(params.layer));
  // A function without RowMaps reads two of them.
  void* arguments[] = {const_cast<KernelParams*>(&params), &maps, &rows};
  launch_with(instance, launch, grid, arguments, params.follows_write, stream);
}

void launch_beside(const Instance& instance, const Launch& launch, int grid,
                   const KernelParams& few, const KernelParams& many, cudaStream_t stream) {
  KvMaps few_maps = kv_maps(few, instance.tile_keys);
  KvMaps many_maps = kv_maps(many, instance.tile_keys_beside);
  void* arguments[] = {const_cast<KernelParams*>(&few), &few_maps, const_cast<KernelParams*>(&many),
                       &many_maps};
  launch_with(instance, launch, grid, arguments, few.follows_write, stream);
}

}  // namespace quire::cuda::sm90
