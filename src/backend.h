// What a backend is. The stages have the same names as the public calls: plan, cache_write,
// attention, and merge. Everything handed over has been checked by src/api.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "params.h"
#include "quire/backend.h"

namespace quire {

// A layer's plan on a backend: which kernels serve it, how the last batch is cut into work, and the
// workspace. One call at a time.
class LayerPlan {
 public:
  virtual ~LayerPlan() = default;
  virtual void update(const BatchParams& batch, const Context& ctx) = 0;
  // Over the batch of the last update, which `params.batch` is.
  virtual void attention(const AttentionParams& params, const Context& ctx) = 0;
  virtual std::int64_t workspace_bytes() const = 0;
  virtual std::string to_string() const = 0;

  // The three cascade tensors of AttentionMetadata, as one array (plan/cascade_tensors.h) in memory
  // of the layer's device that lives as long as the plan; the last call's content. Host memory
  // unless overridden.
  virtual const std::int32_t* cascade_tensors(const BatchParams& batch, const Context& ctx);

 private:
  std::vector<std::int32_t> cascade_tensors_;
};

// A member of a configuration that a backend cannot serve.
struct Unsupported {
  std::string argument;
  std::string expected;
  std::string got;
  std::string text() const { return argument + ": expected " + expected + ", got " + got; }
};

class Backend : public AttentionBackend {
 public:
  // Devices of its type that it can run on now: indices from 0.
  virtual int num_devices() const = 0;
  bool available() const override { return num_devices() > 0; }

  // A configuration is supported unless one of the capabilities is missing.
  std::vector<Unsupported> unsupported(const AttentionConfig& config) const;
  std::vector<std::string> supports(const AttentionConfig& config) const override;

  virtual std::unique_ptr<LayerPlan> make_plan(const LayerParams& layer) const = 0;
  virtual void cache_write(const CacheWriteParams& params, const Context& ctx) const = 0;
  virtual void merge(const MergeParams& params, const Context& ctx) const = 0;

  // Copies device memory to the host and waits for it, for Context::check_indices. Host memory: a
  // plain copy.
  virtual void read(Device device, void* to, const void* from, std::size_t bytes,
                    const Context& ctx) const;

  // Fills a tensor [rows, (heads,) size] with zeros: the output of a profiling run. Host memory.
  virtual void fill_zero(const TensorView& output, const Context& ctx) const;
};

// Limits that all backends share, so that products of sizes fit 64 bits and sizes 32.
inline constexpr std::int64_t kMaxHeads = 65536;
inline constexpr std::int64_t kMaxBlockSize = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxRowSize = std::int64_t{1} << 20;  // elements of a head

// The one explicit list of backends (backends.cc), best first for each device.
const std::vector<const Backend*>& backends();

// The backend that serves a device: `name`, or QUIRE_BACKEND, or the first available one. Throws
// Error if there is none, or no such device; `argument` is what named the device.
const Backend& pick_backend(Device device, std::string_view name, const char* argument = "device");

// The whole of semantics.md: what the reference and the CPU backend have.
BackendCapabilities full_capabilities();

namespace reference {
const Backend& backend();
}
namespace cpu {
const Backend& backend();
}
namespace cuda {
const Backend& backend();  // builds with QUIRE_CUDA only
}

}  // namespace quire
