#include "python/src/views.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <array>
#include <cstdint>
#include <optional>

namespace quire::python {
namespace {

constexpr DType kDTypes[] = {
    DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2,
    DType::kInt8,    DType::kUInt8,   DType::kInt32,    DType::kInt64,      DType::kBool};

[[noreturn]] void raise(const char* kind, const std::string& text) {
  throw ffi::Error(kind, text, "");
}

// What the library says where a backend's capabilities lack something, or it cannot run at all.
bool is_unsupported(const std::string& text) {
  for (const char* words :
       {"expected what this backend supports", "expected what the capabilities of the backend have",
        "expected one that can run here", "devices of backend",
        "expected a device that a backend of this build can run on"}) {
    if (text.find(words) != std::string::npos) return true;
  }
  return false;
}

// A text that ends in ", got <dtype>" is about a dtype.
bool is_about_dtype(const std::string& text) {
  const std::string_view got = ", got ";
  const std::size_t at = text.rfind(got);
  if (at == std::string::npos) return false;
  const std::string name = text.substr(at + got.size());
  for (const DType dtype : kDTypes) {
    if (name == to_string(dtype)) return true;
  }
  return false;
}

}  // namespace

TensorView view(const char* name, const ffi::TensorView& tensor) {
  const ffi::ShapeView shape = tensor.shape();
  if (tensor.ndim() > kMaxDims) {
    throw Error(name, "at most 6 dimensions", std::to_string(tensor.ndim()));
  }
  DLTensor dl;
  dl.data = tensor.data_ptr();
  dl.device = tensor.device();
  dl.ndim = tensor.ndim();
  dl.dtype = tensor.dtype();
  dl.shape = const_cast<std::int64_t*>(shape.data());
  // Of an array without elements NumPy says that all strides are 0: without strides it is row-major.
  const bool empty = tensor.numel() == 0;
  dl.strides = empty ? nullptr : const_cast<std::int64_t*>(tensor.strides().data());
  dl.byte_offset = tensor.byte_offset();
  try {
    return from_dlpack(dl);
  } catch (const Error& error) {
    const std::string text = error.what();  // "tensor: expected ..."
    raise("TypeError", name + text.substr(error.argument().size()));
  }
}

TensorView view(const char* name, const OptionalTensor& tensor) {
  return tensor.has_value() ? view(name, *tensor) : TensorView{};
}

TensorView rows_view(const char* name, const ffi::TensorView& tensor) {
  TensorView rows = view(name, tensor);
  if (rows.ndim != 4) return rows;
  const bool even = rows.strides[0] == rows.shape[1] * rows.strides[1] || rows.shape[0] == 1;
  if (!even && rows.shape[1] != 1) {
    throw Error(name, "rows at equal distances over the first two dimensions", rows.to_string());
  }
  if (rows.shape[1] == 1) rows.strides[1] = rows.strides[0];
  const std::int64_t count = rows.shape[0] * rows.shape[1];
  rows = rows.select(0, 0);
  rows.shape[0] = count;
  return rows;
}

Scale scale(const char* name, const ffi::AnyView& value, Device device) {
  if (const std::optional<double> number = value.try_cast<double>()) {
    return static_cast<float>(*number);
  }
  const std::optional<ffi::TensorView> tensor = value.try_cast<ffi::TensorView>();
  if (!tensor) raise("TypeError", std::string(name) + ": expected a number or a tensor");
  const TensorView one = view(name, *tensor);
  if (one.dtype != DType::kFloat32) throw Error(name, "float32", to_string(one.dtype));
  bool single = true;
  for (int d = 0; d < one.ndim; ++d) {
    if (one.shape[d] != 1 && (one.strides[d] != 0 || one.shape[d] == 0)) single = false;
  }
  if (!single) throw Error(name, "one element", one.to_string());
  const float* data = static_cast<const float*>(one.data);
  if (one.device == device) return Scale::in_memory(data);
  // On the host it is a number: a GPU could not read it there.
  if (one.device.type == DeviceType::kCpu) return *data;
  throw Error(name, "memory on " + to_string(device), one.to_string());
}

void* current_stream(Device device) {
  if (device.type == DeviceType::kCpu) return nullptr;
  return TVMFFIEnvGetStream(kDLCUDA, device.index);
}

DType parse_dtype(std::string_view name) {
  std::string known;
  for (const DType dtype : kDTypes) {
    if (name == to_string(dtype)) return dtype;
    known += (known.empty() ? "" : ", ") + std::string(to_string(dtype));
  }
  throw Error("dtype", "one of " + known, "'" + std::string(name) + "'");
}

AttentionType parse_attention_type(std::string_view name) {
  if (name == "decoder") return AttentionType::kDecoder;
  if (name == "encoder") return AttentionType::kEncoder;
  if (name == "encoder_only") return AttentionType::kEncoderOnly;
  if (name == "encoder_decoder") return AttentionType::kEncoderDecoder;
  throw Error("type", "decoder, encoder, encoder_only or encoder_decoder",
              "'" + std::string(name) + "'");
}

WindowKind parse_window(std::string_view name) {
  if (name == "none") return WindowKind::kNone;
  if (name == "left") return WindowKind::kLeft;
  if (name == "both") return WindowKind::kBoth;
  if (name == "chunked") return WindowKind::kChunked;
  throw Error("window", "none, left, both or chunked", "'" + std::string(name) + "'");
}

void throw_as_python() {
  try {
    throw;
  } catch (const ffi::Error&) {
    throw;
  } catch (const Error& error) {
    const std::string text = error.what();
    if (is_unsupported(text)) raise("NotImplementedError", text);
    raise(is_about_dtype(text) ? "TypeError" : "ValueError", text);
  } catch (const std::bad_alloc& error) {
    raise("MemoryError", error.what());
  } catch (const std::exception& error) {
    raise("RuntimeError", error.what());
  }
}

}  // namespace quire::python
