// The C ABI's tensors: quire_tensor_init, and views of DLPack's tensors.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "c_api/status.h"
#include "c_api/structs.h"
#include "quire/types.h"

namespace quire::c_api {
namespace {

// dlpack.h's DLTensor. Its layout is part of DLPack's ABI and has not changed since 0.2.
struct DlTensor {
  void* data;
  struct {
    std::int32_t device_type;
    std::int32_t device_id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
  } dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

void check_ndim(std::int32_t ndim, std::string_view argument) {
  if (ndim < 0 || ndim > QUIRE_MAX_DIMS) {
    throw Error(argument, "0 to 6 dimensions", std::to_string(ndim));
  }
}

void set_row_major(const std::int64_t* shape, std::int32_t ndim, std::string_view argument,
                   std::int64_t* strides) {
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] < 0) throw Error(argument, "no negative size", std::to_string(shape[d]));
    strides[d] = stride;
    // An empty tensor's outer strides are never used: keep them from becoming 0.
    const std::int64_t size = std::max<std::int64_t>(shape[d], 1);
    if (stride > std::numeric_limits<std::int64_t>::max() / size) {
      throw Error(argument, "less than 2^63 elements", std::to_string(shape[d]));
    }
    stride *= size;
  }
}

}  // namespace
}  // namespace quire::c_api

using namespace quire::c_api;  // NOLINT(google-build-using-namespace): the folder's own helpers

extern "C" {

quire_status quire_tensor_init(quire_tensor* tensor, const void* data, quire_dtype dtype,
                               int32_t ndim, const int64_t* shape) {
  return guarded([&] {
    quire_tensor out{};
    out.data = const_cast<void*>(data);  // a view of either: see the header
    out.dtype = dtype;
    out.ndim = ndim;
    check_ndim(ndim, "ndim");
    to_enum(dtype, quire::DType::kBool, "dtype");
    if (ndim > 0) deref(shape, "shape");
    std::copy_n(shape, ndim, out.shape);
    set_row_major(shape, ndim, "shape", out.strides);
    deref(tensor, "tensor") = out;
  });
}

quire_status quire_tensor_from_dlpack(quire_tensor* view, const void* tensor) {
  return guarded([&] {
    DlTensor from = deref(static_cast<const DlTensor*>(tensor), "tensor");
    std::int64_t row_major[QUIRE_MAX_DIMS] = {};
    check_ndim(from.ndim, "tensor");
    if (from.ndim > 0 && from.shape == nullptr) {
      throw quire::Error("tensor", "a shape", "null");
    }
    if (from.strides == nullptr) {
      set_row_major(from.shape, from.ndim, "tensor", row_major);
      from.strides = row_major;
    }
    deref(view, "view") = from_view(quire::from_dlpack(from));
  });
}

quire_status quire_dtype_name(quire_dtype dtype, const char** name) {
  return guarded(
      [&] { deref(name, "name") = to_string(to_enum(dtype, quire::DType::kBool, "dtype")); });
}

}  // extern "C"
