#include "cuda/sm80/kernels.h"

#include <span>

#include "cuda/check.h"

namespace quire::cuda::sm80 {

// X(name) for each line of instances.def that this build compiles, written by CMake.
#define X(name) AttentionKernel name();
#include "sm80_instances.inc"
#undef X

// In the order of instances.def: of several that take a layer, the one with the least head size
// first.
std::span<const AttentionKernel> kernels() {
#define X(name) name(),
  static const std::vector<AttentionKernel> rows = {
#include "sm80_instances.inc"
  };
#undef X
  return rows;
}

bool prepare(const Instance& instance, const DeviceInfo& device, Launch* launch) {
  // The limit belongs to the process, not to a plan: set to what one plan needs, it made launches
  // of another plan fail, or of another thread meanwhile. So every kernel may take all there is.
  check(cudaFuncSetAttribute(instance.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.shared_bytes_per_block),
        instance.name);
  // More stages keep more copies under way; fewer are better where that doubles the CTAs of a
  // multiprocessor, which hide each other's latencies.
  for (int stages = 1; stages <= instance.max_pipeline_stages;
       stages += instance.powers_of_two ? stages : 1) {
    Launch next;
    next.pipeline_stages = stages;
    next.shared_bytes = instance.shared_bytes(stages);
    if (next.shared_bytes > device.shared_bytes_per_block) break;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
              &next.ctas_per_sm, instance.function, instance.threads,
              static_cast<std::size_t>(next.shared_bytes)),
          instance.name);
    if (next.ctas_per_sm == 0) break;
    if (launch->pipeline_stages == 0 || next.ctas_per_sm * 2 > launch->ctas_per_sm) *launch = next;
  }
  return launch->pipeline_stages > 0;
}

void launch(const Instance& instance, const Launch& launch, int grid, const KernelParams& params,
            cudaStream_t stream) {
  void* arguments[] = {const_cast<KernelParams*>(&params)};
  const auto shared_bytes = static_cast<std::size_t>(launch.shared_bytes);
  const dim3 shape(static_cast<unsigned>(grid));
  const cudaError_t error =
      cudaLaunchKernel(instance.function, shape, dim3(static_cast<unsigned>(instance.threads)),
                       arguments, shared_bytes, stream);
  if (error != cudaSuccess) check_launch(instance.name, shape, instance.threads, shared_bytes);
}

}  // namespace quire::cuda::sm80
