#include "quire/types.h"

#include <algorithm>

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

namespace {

int checked_rank(std::size_t rank) {
  if (rank > kMaxDims) throw Error("shape", "at most 6 dimensions", std::to_string(rank));
  return static_cast<int>(rank);
}

}  // namespace

TensorView::TensorView(void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_,
                       Device device_)
    : data(data_), dtype(dtype_), device(device_), ndim(checked_rank(shape_.size())) {
  std::copy(shape_.begin(), shape_.end(), shape.begin());
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape[d];
  }
}

TensorView::TensorView(void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_,
                       std::initializer_list<std::int64_t> strides_, Device device_)
    : TensorView(data_, dtype_, shape_, device_) {
  if (strides_.size() != shape_.size()) {
    throw Error("strides", std::to_string(shape_.size()) + " strides, one for each dimension",
                std::to_string(strides_.size()));
  }
  std::copy(strides_.begin(), strides_.end(), strides.begin());
}

std::int64_t TensorView::num_elements() const {
  std::int64_t count = 1;
  for (int d = 0; d < ndim; ++d) count *= shape[d];
  return count;
}

bool TensorView::is_contiguous() const {
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] == 0) return true;
    if (shape[d] != 1 && strides[d] != stride) return false;
    stride *= shape[d];
  }
  return true;
}

namespace {

void check_dim(const TensorView& view, int dim) {
  if (dim < 0 || dim >= view.ndim) {
    throw Error("dim", "a dimension of " + view.to_string(), std::to_string(dim));
  }
}

}  // namespace

TensorView TensorView::select(int dim, std::int64_t i) const {
  check_dim(*this, dim);
  if (i < 0 || i >= shape[dim]) {
    throw Error("i", "an index into dimension " + std::to_string(dim) + " of " + to_string(),
                std::to_string(i));
  }
  TensorView view = *this;
  view.data = static_cast<char*>(data) + i * strides[dim] * size_of(dtype);
  for (int d = dim; d + 1 < ndim; ++d) {
    view.shape[d] = shape[d + 1];
    view.strides[d] = strides[d + 1];
  }
  --view.ndim;
  view.shape[view.ndim] = 0;
  view.strides[view.ndim] = 0;
  return view;
}

TensorView TensorView::slice(int dim, std::int64_t begin, std::int64_t end) const {
  check_dim(*this, dim);
  if (begin < 0 || begin > end || end > shape[dim]) {
    throw Error("begin", "0 <= begin <= end <= " + std::to_string(shape[dim]),
                std::to_string(begin) + ", " + std::to_string(end));
  }
  TensorView view = *this;
  view.data = static_cast<char*>(data) + begin * strides[dim] * size_of(dtype);
  view.shape[dim] = end - begin;
  return view;
}

TensorView TensorView::transpose(int dim_a, int dim_b) const {
  check_dim(*this, dim_a);
  check_dim(*this, dim_b);
  TensorView view = *this;
  std::swap(view.shape[dim_a], view.shape[dim_b]);
  std::swap(view.strides[dim_a], view.strides[dim_b]);
  return view;
}

std::string TensorView::to_string() const {
  if (!*this) return "no tensor";
  const auto list = [this](const std::array<std::int64_t, kMaxDims>& values) {
    std::string text = "[";
    for (int d = 0; d < ndim; ++d) text += (d == 0 ? "" : ", ") + std::to_string(values[d]);
    return text + "]";
  };
  return std::string(quire::to_string(dtype)) + " " + list(shape) + " strides " + list(strides) +
         " on " + quire::to_string(device);
}

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
  throw Error("tensor.dtype", "a DLPack type that Quire knows",
              "code " + std::to_string(code) + ", " + std::to_string(bits) + " bits, " +
                  std::to_string(lanes) + " lanes");
}

std::pair<int, int> dtype_to_dlpack(DType dtype) {
  for (const DlpackType& type : kDlpackTypes) {
    if (type.dtype == dtype) return {type.code, type.bits};
  }
  throw Error("view.dtype", "a type that DLPack knows", to_string(dtype));
}

Device device_from_dlpack(int type, int index) {
  // kDLCPU 1, kDLCUDA 2, kDLCUDAHost 3 (pinned memory, readable by the CPU).
  if (type == 1 || type == 3) return {DeviceType::kCpu, 0};
  if (type == 2) return {DeviceType::kCuda, index};
  throw Error("tensor.device", "a CPU (1) or CUDA (2) device", std::to_string(type));
}

}  // namespace detail
}  // namespace quire
