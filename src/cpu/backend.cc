// The CPU backend: everything in semantics.md, on SIMD kernels chosen at run time.
#include "backend.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace quire::cpu {
namespace {

ThreadPool& pool_of(const Context& ctx) {
  return ctx.threads != nullptr ? *ctx.threads : default_thread_pool();
}

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

  std::unique_ptr<PlanState> make_plan(const LayerParams& layer) const override {
    return std::make_unique<Workspace>(layer);
  }
  void plan(PlanState& state, const LayerParams& layer, const BatchParams& batch,
            const Context& ctx) const override {
    static_cast<Workspace&>(state).plan(layer, batch, pool_of(ctx).num_threads());
  }
  void cache_write(const CacheWriteParams& params, const Context& ctx) const override {
    run_cache_write(params, pool_of(ctx));
  }
  void attention(PlanState& state, const AttentionParams& params,
                 const Context& ctx) const override {
    run_attention(static_cast<Workspace&>(state), params, pool_of(ctx));
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
