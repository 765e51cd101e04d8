// The CUDA backend: everything in semantics.md, on any GPU from sm_80 on.
#include "backend.h"

#include <algorithm>
#include <vector>

#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/kernel_table.h"
#include "cuda/kernels.h"
#include "cuda/layer_plan.h"

namespace quire::cuda {
namespace {

class CudaBackend final : public Backend {
 public:
  const char* name() const override { return "cuda"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }
  int num_devices() const override { return inventory().count; }

  std::string instruction_set() const override {
    if (!available()) return inventory().reason;
    std::string text;
    for (int i = 0; i < inventory().count; ++i) {
      const DeviceInfo& info = device_info(i);
      text += (i == 0 ? "" : "; ") + ("sm_" + std::to_string(info.major)) +
              std::to_string(info.minor) + " (" + info.name + ", " + std::to_string(info.sm_count) +
              " multiprocessors)";
    }
    return text;
  }

  const BackendCapabilities& capabilities() const override {
    static const BackendCapabilities caps = [] {
      BackendCapabilities all = full_capabilities();
      all.graph_capture = true;
      return all;
    }();
    return caps;
  }

  std::vector<KernelInfo> kernel_table() const override {
    std::vector<KernelInfo> list;
    for (const std::span<const AttentionKernel> architecture : quire::cuda::kernel_table()) {
      for (const AttentionKernel& kernel : architecture) {
        const auto same =
            std::find_if(architecture.begin(), architecture.end(), [&](const auto& k) {
              return k.launch == kernel.launch && k.launch_beside == kernel.launch_beside;
            });
        list.push_back({kernel.name, describe(kernel), &*same == &kernel ? "" : same->name});
      }
    }
    list.push_back({"plan", "every batch, once a step", ""});
    list.push_back({"find_partners", "batches of auto_cascade, once a step", ""});
    list.push_back({"cascade_tensors", "AttentionMetadata with a common prefix, once a step", ""});
    list.push_back({"block_quantize", "fp8 outputs with block scales", ""});
    list.push_back({"cache_write_rows", "write_kv_cache of rows of whole aligned pieces", ""});
    list.push_back({"cache_write_elements", "write_kv_cache of other rows", ""});
    list.push_back({"cache_write_int4", "write_kv_cache of int4 caches", ""});
    list.push_back({"merge", "merge_states", ""});
    return list;
  }

  std::unique_ptr<LayerPlan> make_plan(const LayerParams& layer) const override {
    // Kernels are prepared for the device that is current: each has its own limit of shared memory.
    const DeviceScope scope(layer.device);
    return std::make_unique<CudaPlan>(layer);
  }
  void cache_write(const CacheWriteParams& params, const Context& ctx) const override {
    const DeviceScope scope(params.device);
    launch_cache_write(params, stream_of(ctx));
  }
  void merge(const MergeParams& params, const Context& ctx) const override {
    const DeviceScope scope(params.device);
    launch_merge(params, stream_of(ctx));
  }

  void read(Device device, void* to, const void* from, std::size_t bytes,
            const Context& ctx) const override {
    const DeviceScope scope(device);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(ctx)),
          "copying index tensors to the host");
    check(cudaStreamSynchronize(stream_of(ctx)), "copying index tensors to the host");
  }

  void fill_zero(const TensorView& output, const Context& ctx) const override {
    const DeviceScope scope(output.device);
    const std::int64_t element = size_of(output.dtype);
    const std::int64_t heads = output.ndim == 3 ? output.shape[1] : 1;
    const std::int64_t head_stride = output.ndim == 3 ? output.strides[1] : 0;
    const auto row_bytes = static_cast<std::size_t>(output.shape[output.ndim - 1] * element);
    const std::int64_t pitch = output.strides[0] * element;
    if (output.num_elements() == 0) return;
    for (std::int64_t h = 0; h < heads; ++h) {
      char* first = static_cast<char*>(output.data) + h * head_stride * element;
      if (pitch >= static_cast<std::int64_t>(row_bytes)) {
        check(cudaMemset2DAsync(first, static_cast<std::size_t>(pitch), 0, row_bytes,
                                static_cast<std::size_t>(output.shape[0]), stream_of(ctx)),
              "cudaMemset2DAsync");
        continue;
      }
      for (std::int64_t i = 0; i < output.shape[0]; ++i) {
        check(cudaMemsetAsync(first + i * pitch, 0, row_bytes, stream_of(ctx)), "cudaMemsetAsync");
      }
    }
  }
};

}  // namespace

const Backend& backend() {
  static const CudaBackend instance;
  return instance;
}

}  // namespace quire::cuda
