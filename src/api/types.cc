#include "quire/types.h"

#include <algorithm>
#include <array>

namespace quire {

const char* to_string(DType dtype) {
  switch (dtype) {
    case DType::kNone: return "none";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat8E4M3: return "float8_e4m3";
    case DType::kFloat8E5M2: return "float8_e5m2";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

std::string to_string(Device device) {
  const bool cpu = device.type == DeviceType::kCpu;
  if (cpu && device.index == 0) return "cpu";
  return (cpu ? "cpu:" : "cuda:") + std::to_string(device.index);
}

void Sizes::check_count() const {
  if (count_ > kMaxDims) {
    throw Error("shape", "at most " + std::to_string(kMaxDims) + " dimensions",
                std::to_string(count_));
  }
}

template <class Data>
BasicTensorView<Data>::BasicTensorView(Data* data_, DType dtype_, const Sizes& shape_,
                                       Device device_)
    : data(data_), dtype(dtype_), device(device_), ndim(shape_.size()) {
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    shape[d] = shape_[d];
    strides[d] = stride;
    stride *= shape[d];
  }
}

template <class Data>
BasicTensorView<Data>::BasicTensorView(Data* data_, DType dtype_, const Sizes& shape_,
                                       const Sizes& strides_, Device device_)
    : BasicTensorView(data_, dtype_, shape_, device_) {
  if (strides_.size() != ndim) {
    throw Error("strides", std::to_string(ndim) + " strides, one for each dimension",
                std::to_string(strides_.size()));
  }
  for (int d = 0; d < ndim; ++d) strides[d] = strides_[d];
}

template <class Data>
std::int64_t BasicTensorView<Data>::num_elements() const {
  std::int64_t count = 1;
  for (int d = 0; d < ndim; ++d) count *= shape[d];
  return count;
}

template <class Data>
bool BasicTensorView<Data>::is_contiguous() const {
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] == 0) return true;
    if (shape[d] != 1 && strides[d] != stride) return false;
    stride *= shape[d];
  }
  return true;
}

namespace {

void check_dim(const ConstTensorView& view, int dim) {
  if (dim < 0 || dim >= view.ndim) {
    throw Error("dim", "a dimension of " + view.to_string(), std::to_string(dim));
  }
}

template <class Data>
Data* offset_by(Data* data, std::int64_t elements, DType dtype) {
  using Bytes = std::conditional_t<std::is_const_v<Data>, const char, char>;
  return static_cast<Bytes*>(data) + elements * size_of(dtype);
}

}  // namespace

template <class Data>
BasicTensorView<Data> BasicTensorView<Data>::select(int dim, std::int64_t i) const {
  check_dim(*this, dim);
  if (i < 0 || i >= shape[dim]) {
    throw Error("i", "an index into dimension " + std::to_string(dim) + " of " + to_string(),
                std::to_string(i));
  }
  BasicTensorView view = *this;
  view.data = offset_by(data, i * strides[dim], dtype);
  for (int d = dim; d + 1 < ndim; ++d) {
    view.shape[d] = shape[d + 1];
    view.strides[d] = strides[d + 1];
  }
  --view.ndim;
  view.shape[view.ndim] = 0;
  view.strides[view.ndim] = 0;
  return view;
}

template <class Data>
BasicTensorView<Data> BasicTensorView<Data>::slice(int dim, std::int64_t begin,
                                                   std::int64_t end) const {
  check_dim(*this, dim);
  if (begin < 0 || begin > end || end > shape[dim]) {
    throw Error("begin", "0 <= begin <= end <= " + std::to_string(shape[dim]),
                std::to_string(begin) + ", " + std::to_string(end));
  }
  BasicTensorView view = *this;
  view.data = offset_by(data, begin * strides[dim], dtype);
  view.shape[dim] = end - begin;
  return view;
}

template <class Data>
BasicTensorView<Data> BasicTensorView<Data>::transpose(int dim_a, int dim_b) const {
  check_dim(*this, dim_a);
  check_dim(*this, dim_b);
  BasicTensorView view = *this;
  std::swap(view.shape[dim_a], view.shape[dim_b]);
  std::swap(view.strides[dim_a], view.strides[dim_b]);
  return view;
}

template <class Data>
std::string BasicTensorView<Data>::to_string() const {
  if (!*this) return "none";
  const auto list = [this](const std::array<std::int64_t, kMaxDims>& values) {
    // A caller's struct, so its ndim may be anything.
    std::string text = "[";
    for (int d = 0; d < std::min(ndim, kMaxDims); ++d) {
      text += (d == 0 ? "" : ", ") + std::to_string(values[d]);
    }
    return text + "]";
  };
  std::string text = quire::to_string(dtype);
  return text + " " + list(shape) + " strides " + list(strides) + " on " + quire::to_string(device);
}

template struct BasicTensorView<void>;
template struct BasicTensorView<const void>;

namespace detail {

namespace {

struct DlpackType {
  DType dtype;
  int code;
  int bits;
};

// Codes of dlpack.h: kDLInt 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4, kDLBool 6, and since 1.1
// kDLFloat8_e4m3fn 10 and kDLFloat8_e5m2 12.
constexpr DlpackType kDlpackTypes[] = {
    {DType::kFloat32, 2, 32},    {DType::kFloat16, 2, 16},    {DType::kBFloat16, 4, 16},
    {DType::kFloat8E4M3, 10, 8}, {DType::kFloat8E5M2, 12, 8}, {DType::kInt8, 0, 8},
    {DType::kUInt8, 1, 8},       {DType::kInt32, 0, 32},      {DType::kInt64, 0, 64},
    {DType::kBool, 6, 8},
};

}  // namespace

DType dtype_from_dlpack(int code, int bits, int lanes) {
  for (const DlpackType& type : kDlpackTypes) {
    if (lanes == 1 && type.code == code && type.bits == bits) return type.dtype;
  }
  throw Error("tensor", "a DLPack type that Quire knows",
              "code " + std::to_string(code) + ", " + std::to_string(bits) + " bits, " +
                  std::to_string(lanes) + " lanes");
}

std::pair<int, int> dtype_to_dlpack(DType dtype) {
  for (const DlpackType& type : kDlpackTypes) {
    if (type.dtype == dtype) return {type.code, type.bits};
  }
  throw Error("view", "a type that DLPack knows", to_string(dtype));
}

Device device_from_dlpack(int type, int index) {
  // kDLCPU 1, kDLCUDA 2, kDLCUDAHost 3 (pinned memory, the CPU's), kDLCUDAManaged 13.
  if (type == 1 || type == 3) return {DeviceType::kCpu, 0};
  if (type == 2) return {DeviceType::kCuda, index};
  if (type == 13) {
    throw Error("tensor", "memory of one device",
                "managed memory (13): fill in a view with the device that is to work on it");
  }
  throw Error("tensor", "a CPU (1, 3) or CUDA (2) device", std::to_string(type));
}

}  // namespace detail
}  // namespace quire
