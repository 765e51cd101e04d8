#include "api/check.h"

#include <array>
#include <charconv>
#include <cmath>

namespace quire::check {

namespace {

std::string join_dtypes(std::span<const DType> dtypes) {
  std::string text;
  for (const DType dtype : dtypes) {
    text += text.empty() ? "" : " or ";
    text += to_string(dtype);
  }
  return text;
}

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text = "shape [";
  bool first = true;
  for (const std::int64_t size : shape) {
    text += first ? "" : ", ";
    text += size == kAny ? "*" : std::to_string(size);
    first = false;
  }
  return text + "]";
}

bool shape_matches(const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  if (view.ndim != static_cast<int>(shape.size())) return false;
  int dim = 0;
  for (const std::int64_t size : shape) {
    const std::int64_t got = view.shape[dim++];
    if (got < 0 || (size != kAny && got != size)) return false;
  }
  return true;
}

}  // namespace

void tensor(std::string_view name, const ConstTensorView& view, Device device,
            std::span<const DType> dtypes, std::initializer_list<std::int64_t> shape) {
  if (!view) throw Error(name, "a tensor of " + shape_text(shape), "none");
  bool dtype_ok = false;
  for (const DType dtype : dtypes) dtype_ok = dtype_ok || view.dtype == dtype;
  if (!dtype_ok) throw Error(name, join_dtypes(dtypes), to_string(view.dtype));
  if (!shape_matches(view, shape)) throw Error(name, shape_text(shape), view.to_string());
  if (view.device != device) throw Error(name, "memory on " + to_string(device), view.to_string());
  if (view.data == nullptr && view.num_elements() > 0) {
    throw Error(name, "a data pointer", "null for " + view.to_string());
  }
}

void unit_last_stride(std::string_view name, const ConstTensorView& view) {
  const int last = view.ndim - 1;
  if (view.shape[last] > 1 && view.strides[last] != 1) {
    throw Error(name, "unit stride in the last dimension", view.to_string());
  }
}

void contiguous(std::string_view name, const ConstTensorView& view) {
  if (!view.is_contiguous()) throw Error(name, "a contiguous tensor", view.to_string());
}

void at_least(std::string_view name, const ConstTensorView& view, int dim, std::int64_t least,
              std::string_view why) {
  if (view.shape[dim] < least) {
    throw Error(name,
                "at least " + std::to_string(least) + " in dimension " + std::to_string(dim) +
                    " (" + std::string(why) + ")",
                view.to_string());
  }
}

std::string text_of(float number) {
  std::array<char, 32> text;
  const auto result = std::to_chars(text.data(), text.data() + text.size(), number);
  return std::string(text.data(), result.ptr);
}

void scale_value(std::string_view name, float value) {
  that(std::isfinite(value) && value > 0.0F, name, "a finite scale above 0", value);
}

void scale(std::string_view name, const Scale& scale) {
  if (scale.data == nullptr) scale_value(name, scale.value);
}

}  // namespace quire::check
