#include "device_ops.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu_ops.h"
#if QUIRE_CUDA
#include "cuda_ops.h"
#include "quire/backend.h"
#endif

namespace quire::llm {
namespace {

std::unique_ptr<DeviceOps> make_cuda(int num_threads) {
#if QUIRE_CUDA
  const AttentionBackend& backend = attention_backend("cuda");
  if (backend.available()) return make_cuda_ops(num_threads);
  throw std::runtime_error("--device cuda cannot run here: " + backend.instruction_set() +
                           "; see what nvidia-smi says, or use --device cpu");
#else
  static_cast<void>(num_threads);
  throw std::runtime_error(
      "--device cuda cannot run here: this quire was built without CUDA; build it with "
      "-DQUIRE_CUDA=ON (docs/guide/building.md says how), or use --device cpu");
#endif
}

}  // namespace

std::int64_t Weight::num_rows() const {
  if (parts.empty()) return tensor.view.shape[0];
  std::int64_t sum = 0;
  for (const GgufTensor& part : parts) sum += part.num_rows();
  return sum;
}

std::unique_ptr<DeviceOps> make_ops(DeviceType type, int num_threads) {
  if (type == DeviceType::kCuda) return make_cuda(num_threads);
  return std::make_unique<CpuOps>(num_threads);
}

Tensor make_tensor(Device device, DType dtype, std::span<const std::int64_t> shape,
                   std::shared_ptr<void> (*allocate)(std::size_t bytes)) {
  auto bytes = static_cast<std::size_t>(size_of(dtype));
  bool overflow = false;
  for (const std::int64_t size : shape) {
    overflow |= __builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes);
  }
  Tensor tensor;
  if (!overflow) tensor.memory = allocate(std::max<std::size_t>(bytes, 1));
  if (!tensor.memory) {
    throw std::runtime_error("out of memory: the model, its cache or a batch of this size needs " +
                             (overflow ? "too many" : std::to_string(bytes)) + " bytes");
  }
  TensorView& view = tensor.view;
  view.data = tensor.memory.get();
  view.dtype = dtype;
  view.device = device;
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; stride *= shape[d]) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
  }
  return tensor;
}

}  // namespace quire::llm
