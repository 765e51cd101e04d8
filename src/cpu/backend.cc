// The CPU backend: everything in semantics.md, on SIMD kernels chosen at run time.
#include "backend.h"
#include "cpu/kernels.h"
#include "cpu/layer_plan.h"

namespace quire::cpu {
namespace {

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "cpu"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  int num_devices() const override { return 1; }
  std::string instruction_set() const override { return kernels().isa; }
  const BackendCapabilities& capabilities() const override {
    static const BackendCapabilities caps = full_capabilities();
    return caps;
  }

  std::unique_ptr<LayerPlan> make_plan(const LayerParams& layer) const override {
    return std::make_unique<CpuPlan>(layer);
  }
  void cache_write(const CacheWriteParams& params, const Context& ctx) const override {
    run_cache_write(params, pool_of(ctx));
  }
  void merge(const MergeParams& params, const Context& ctx) const override {
    run_merge(params, pool_of(ctx));
  }
};

}  // namespace

const Backend& backend() {
  static const CpuBackend instance;
  return instance;
}

}  // namespace quire::cpu
