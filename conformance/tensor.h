// Host tensors that own their memory, with any strides, and their copies on a device, surrounded by
// guard zones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "conformance/device_memory.h"
#include "conformance/random.h"
#include "quire/types.h"

namespace quire::conformance {

// The host image of one allocation. Several tensors may look into one buffer (K and V packed side
// by side, scales behind each row).
struct Buffer {
  std::vector<std::byte> bytes;
};

using Sizes = std::vector<std::int64_t>;

// Where the elements of a new tensor lie.
struct Layout {
  Sizes order;              // dimensions from outermost to innermost in memory; empty: 0, 1, 2, ...
  Sizes padding;            // extra elements appended to each dimension; empty: none
  std::int64_t offset = 0;  // elements before the first one
  std::int64_t slack = 0;   // elements after the last one
};

struct Tensor {
  std::shared_ptr<Buffer> buffer;
  DType dtype = DType::kNone;
  Sizes shape;
  Sizes strides;            // elements
  std::int64_t offset = 0;  // bytes from the buffer's start to element [0, ..., 0]

  explicit operator bool() const { return dtype != DType::kNone; }
  std::int64_t num_elements() const;

  // Lists beside vectors: these are called for every element, and a vector's allocation costs more
  // than all the rest.
  using Index = std::initializer_list<std::int64_t>;
  std::byte* at(Index index) const { return at(index.begin(), index.size()); }
  std::byte* at(const Sizes& index) const { return at(index.data(), index.size()); }
  double get(Index index) const;
  double get(const Sizes& index) const;
  void set(Index index, double value) const;
  void set(const Sizes& index, double value) const;
  // Integers beyond 2^53 (slots) need this one.
  void set_int64(std::int64_t index, std::int64_t value) const;

  // Calls visit(byte offset of the element in the buffer) for each element in row-major order.
  template <class Visit>
  void for_each_element(Visit visit) const;

 private:
  std::byte* at(const std::int64_t* index, std::size_t ndim) const;
};

// All elements, and all bytes between them, hold poison (fill_poison).
Tensor make_tensor(DType dtype, const Sizes& shape, const Layout& layout = {});
// A tensor over an existing buffer.
Tensor view_of(std::shared_ptr<Buffer> buffer, DType dtype, Sizes shape, Sizes strides,
               std::int64_t offset_bytes);
Tensor make_int32(const std::vector<std::int32_t>& values);
Tensor make_float32(const std::vector<float>& values);
void fill_normal(const Tensor& tensor, Rng* rng, double mean = 0, double deviation = 1);

// Copies of buffers on a device. Each lies between two guard zones with a known pattern; under
// AddressSanitizer the zones are closed for reads as well while the library runs.
class DeviceBuffers {
 public:
  explicit DeviceBuffers(DeviceMemory* memory)
      : memory_(memory), guard_bytes_(memory->guard_bytes()) {}
  ~DeviceBuffers();
  DeviceBuffers(const DeviceBuffers&) = delete;
  DeviceBuffers& operator=(const DeviceBuffers&) = delete;

  // The tensor's view on the device; its buffer is copied there on first use. An absent tensor
  // gives an absent view.
  TensorView view(const Tensor& tensor);
  // What the device's copy of the buffer holds now.
  std::vector<std::byte> download(const Tensor& tensor);
  // Overwrites the device's copy: with other bytes, or with the host image again.
  void store(const Tensor& tensor, const std::vector<std::byte>& bytes);
  void restore(const Tensor& tensor) { store(tensor, tensor.buffer->bytes); }

  // Empty if all guard zones are intact, and all buffers but the `outputs` hold what they held;
  // else what is wrong.
  std::string damage(const std::vector<const Tensor*>& outputs);

 private:
  struct Allocation {
    std::shared_ptr<Buffer> image;
    std::byte* base = nullptr;  // of the first guard zone
    std::size_t bytes = 0;      // between the guard zones
  };
  Allocation& allocation_of(const Tensor& tensor);
  void open_guards(const Allocation& allocation, bool open) const;
  bool holds(const std::byte* memory, const std::byte* wanted, std::size_t bytes) const;

  DeviceMemory* memory_;
  std::size_t guard_bytes_;
  std::unordered_map<const Buffer*, Allocation> allocations_;
};

// ---------------------------------------------------------------------------------------------

template <class Visit>
void Tensor::for_each_element(Visit visit) const {
  const std::int64_t count = num_elements();
  const std::int64_t size = size_of(dtype);
  Sizes index(shape.size(), 0);
  std::int64_t position = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    visit(offset + position * size);
    for (auto d = static_cast<std::int64_t>(shape.size()) - 1; d >= 0; --d) {
      position += strides[d];
      if (++index[d] < shape[d]) break;
      position -= strides[d] * shape[d];
      index[d] = 0;
    }
  }
}

}  // namespace quire::conformance
