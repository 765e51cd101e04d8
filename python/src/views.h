// From what Python passes to what the library takes: tensors, numbers or tensors that are scales,
// names of an enumeration. And from the library's exceptions to Python's.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "quire/quire.h"

namespace quire::python {

namespace ffi = tvm::ffi;
using OptionalTensor = ffi::Optional<ffi::TensorView>;

// A view of the tensor's memory, which must stay as long as the view is used. TypeError naming
// `name` for element types that Quire does not know.
TensorView view(const char* name, const ffi::TensorView& tensor);
TensorView view(const char* name, const OptionalTensor& tensor);  // absent for None

// The same of rows that may be [batch, rows of each, ...], as FlashAttention's functions have them: with
// 4 dimensions the first two become one. They must be at equal distances in memory.
TensorView rows_view(const char* name, const ffi::TensorView& tensor);

// A number, or a float32 tensor with one element on the device of the call, which is read when the
// work runs; of a tensor on the CPU a GPU gets the number that it holds now. A tensor of several
// elements counts as one where all its strides are 0 (vLLM expands its scales).
Scale scale(const char* name, const ffi::AnyView& value, Device device);

// The stream that the caller's library (torch, ...) has as current on that device; null on the CPU.
void* current_stream(Device device);

DType parse_dtype(std::string_view name);
AttentionType parse_attention_type(std::string_view name);
WindowKind parse_window(std::string_view name);

// Throws the Python exception of the exception that is being handled:
//   NotImplementedError  a backend lacks what was asked for, or cannot run here
//   TypeError            a tensor has another dtype than it must have
//   ValueError           any other mistake of the caller
//   MemoryError, RuntimeError  as the library's OutOfMemory and std::runtime_error
[[noreturn]] void throw_as_python();

template <class Body>
decltype(auto) guarded(Body&& body) {
  try {
    return std::forward<Body>(body)();
  } catch (...) {
    throw_as_python();
  }
}

}  // namespace quire::python
