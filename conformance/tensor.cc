#include "conformance/tensor.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "conformance/number_format.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace quire::conformance {
namespace {

constexpr std::byte kGuardPattern{0xC5};

}  // namespace

std::int64_t Tensor::num_elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::byte* Tensor::at(const std::int64_t* index, std::size_t ndim) const {
  std::int64_t position = 0;
  for (std::size_t d = 0; d < ndim; ++d) position += index[d] * strides[d];
  return buffer->bytes.data() + offset + position * size_of(dtype);
}

double Tensor::get(Index index) const { return decode(dtype, at(index)); }
double Tensor::get(const Sizes& index) const { return decode(dtype, at(index)); }
void Tensor::set(Index index, double value) const { encode(dtype, value, at(index)); }
void Tensor::set(const Sizes& index, double value) const { encode(dtype, value, at(index)); }

void Tensor::set_int64(std::int64_t index, std::int64_t value) const {
  std::memcpy(at({index}), &value, sizeof value);
}

Tensor make_tensor(DType dtype, const Sizes& shape, const Layout& layout) {
  const auto ndim = static_cast<std::int64_t>(shape.size());
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.shape = shape;
  tensor.strides.assign(ndim, 1);
  tensor.offset = layout.offset * size_of(dtype);
  std::int64_t stride = 1;
  for (std::int64_t place = ndim - 1; place >= 0; --place) {
    const std::int64_t dim = layout.order.empty() ? place : layout.order[place];
    tensor.strides[dim] = stride;
    stride *= shape[dim] + (layout.padding.empty() ? 0 : layout.padding[dim]);
  }
  // Up to the last element exactly: what lies behind it belongs to the guard zone.
  std::int64_t last = 0;
  for (std::int64_t d = 0; d < ndim; ++d)
    last += std::max<std::int64_t>(shape[d] - 1, 0) * tensor.strides[d];
  const std::int64_t used = tensor.num_elements() == 0 ? 0 : last + 1;
  const std::int64_t elements = layout.offset + used + layout.slack;
  tensor.buffer = std::make_shared<Buffer>();
  tensor.buffer->bytes.resize(elements * size_of(dtype));
  fill_poison(dtype, tensor.buffer->bytes.data(), elements);
  return tensor;
}

Tensor view_of(std::shared_ptr<Buffer> buffer, DType dtype, Sizes shape, Sizes strides,
               std::int64_t offset_bytes) {
  Tensor tensor;
  tensor.buffer = std::move(buffer);
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.strides = std::move(strides);
  tensor.offset = offset_bytes;
  return tensor;
}

Tensor make_int32(const std::vector<std::int32_t>& values) {
  Tensor tensor = make_tensor(DType::kInt32, {static_cast<std::int64_t>(values.size())});
  if (!values.empty()) {
    std::memcpy(tensor.buffer->bytes.data(), values.data(), values.size() * sizeof(values[0]));
  }
  return tensor;
}

Tensor make_float32(const std::vector<float>& values) {
  Tensor tensor = make_tensor(DType::kFloat32, {static_cast<std::int64_t>(values.size())});
  if (!values.empty()) {
    std::memcpy(tensor.buffer->bytes.data(), values.data(), values.size() * sizeof(values[0]));
  }
  return tensor;
}

void fill_normal(const Tensor& tensor, Rng* rng, double mean, double deviation) {
  std::byte* bytes = tensor.buffer->bytes.data();
  tensor.for_each_element([&](std::int64_t offset) {
    encode(tensor.dtype, mean + deviation * rng->normal(), bytes + offset);
  });
}

DeviceBuffers::~DeviceBuffers() {
  for (const auto& [image, allocation] : allocations_) {
    open_guards(allocation, true);
    memory_->release(allocation.base);
  }
}

DeviceBuffers::Allocation& DeviceBuffers::allocation_of(const Tensor& tensor) {
  Allocation& allocation = allocations_[tensor.buffer.get()];
  if (allocation.base != nullptr) return allocation;
  allocation.image = tensor.buffer;
  allocation.bytes = tensor.buffer->bytes.size();
  const std::vector<std::byte> guard(guard_bytes_, kGuardPattern);
  allocation.base = static_cast<std::byte*>(memory_->allocate(allocation.bytes + 2 * guard_bytes_));
  std::byte* start = allocation.base + guard_bytes_;
  memory_->upload(allocation.base, guard.data(), guard_bytes_);
  memory_->upload(start, tensor.buffer->bytes.data(), allocation.bytes);
  memory_->upload(start + allocation.bytes, guard.data(), guard_bytes_);
  open_guards(allocation, false);
  return allocation;
}

void DeviceBuffers::open_guards(const Allocation& allocation, bool open) const {
#if defined(__SANITIZE_ADDRESS__)
  if (!memory_->poisonable()) return;
  std::byte* behind = allocation.base + guard_bytes_ + allocation.bytes;
  if (open) {
    __asan_unpoison_memory_region(allocation.base, guard_bytes_);
    __asan_unpoison_memory_region(behind, guard_bytes_);
  } else {
    __asan_poison_memory_region(allocation.base, guard_bytes_);
    __asan_poison_memory_region(behind, guard_bytes_);
  }
#else
  (void)allocation;
  (void)open;
#endif
}

TensorView DeviceBuffers::view(const Tensor& tensor) {
  if (!tensor) return {};
  TensorView view;
  view.data = allocation_of(tensor).base + guard_bytes_ + tensor.offset;
  view.dtype = tensor.dtype;
  view.device = memory_->device();
  view.ndim = static_cast<int>(tensor.shape.size());
  std::copy(tensor.shape.begin(), tensor.shape.end(), view.shape.begin());
  std::copy(tensor.strides.begin(), tensor.strides.end(), view.strides.begin());
  return view;
}

std::vector<std::byte> DeviceBuffers::download(const Tensor& tensor) {
  const Allocation& allocation = allocation_of(tensor);
  std::vector<std::byte> bytes(allocation.bytes);
  memory_->download(bytes.data(), allocation.base + guard_bytes_, bytes.size());
  return bytes;
}

void DeviceBuffers::store(const Tensor& tensor, const std::vector<std::byte>& bytes) {
  const Allocation& allocation = allocation_of(tensor);
  memory_->upload(allocation.base + guard_bytes_, bytes.data(), allocation.bytes);
}

std::string DeviceBuffers::damage(const std::vector<const Tensor*>& outputs) {
  for (const auto& [image, allocation] : allocations_) {
    open_guards(allocation, true);
    const std::vector<std::byte> guard(guard_bytes_, kGuardPattern);
    const std::byte* start = allocation.base + guard_bytes_;
    const bool before = holds(allocation.base, guard.data(), guard_bytes_);
    const bool behind = holds(start + allocation.bytes, guard.data(), guard_bytes_);
    const bool is_output = std::any_of(outputs.begin(), outputs.end(), [&](const Tensor* output) {
      return output->buffer.get() == image;
    });
    const bool unchanged = is_output || holds(start, image->bytes.data(), allocation.bytes);
    open_guards(allocation, false);
    const std::string bytes = " a buffer of " + std::to_string(allocation.bytes) + " bytes";
    if (!before) return "wrote before the start of" + bytes;
    if (!behind) return "wrote past the end of" + bytes;
    if (!unchanged) return "changed an input," + bytes;
  }
  return {};
}

bool DeviceBuffers::holds(const std::byte* memory, const std::byte* wanted,
                          std::size_t bytes) const {
  // In pieces that stay in the processor's cache.
  constexpr std::size_t kPiece = std::size_t{1} << 20U;
  thread_local std::vector<std::byte> piece(kPiece);
  for (std::size_t done = 0; done < bytes; done += kPiece) {
    const std::size_t size = std::min(kPiece, bytes - done);
    memory_->download(piece.data(), memory + done, size);
    if (std::memcmp(piece.data(), wanted + done, size) != 0) return false;
  }
  return true;
}

}  // namespace quire::conformance
