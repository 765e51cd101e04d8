// Checks of the public boundary. Each throws quire::Error naming the argument.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "params.h"
#include "quire/types.h"

namespace quire::check {

inline constexpr std::int64_t kAny = -1;

// `view` is present, on `device`, of one of `dtypes`, and of `shape` (kAny matches every size).
// Data may be null only if the view has no elements.
void tensor(std::string_view name, const ConstTensorView& view, Device device,
            std::span<const DType> dtypes, std::initializer_list<std::int64_t> shape);
inline void tensor(std::string_view name, const ConstTensorView& view, Device device,
                   std::initializer_list<DType> dtypes, std::initializer_list<std::int64_t> shape) {
  tensor(name, view, device, std::span(dtypes.begin(), dtypes.size()), shape);
}

// Unit stride in the last dimension (or at most one element there).
void unit_last_stride(std::string_view name, const ConstTensorView& view);
void contiguous(std::string_view name, const ConstTensorView& view);

// Dimension `dim` holds at least `least` entries.
void at_least(std::string_view name, const ConstTensorView& view, int dim, std::int64_t least,
              std::string_view why);

// Texts of a failed check: words, a number, a tensor, or a function that makes them. Checks that
// pass must not build strings: calls in steady state allocate nothing.
inline std::string text_of(std::string_view words) { return std::string(words); }
inline std::string text_of(std::integral auto number) { return std::to_string(number); }
std::string text_of(float number);  // as short as it can be read back: 1e-39, not 0.000000
inline std::string text_of(const ConstTensorView& view) { return view.to_string(); }
template <std::invocable F>
std::string text_of(const F& make) {
  return make();
}

template <class Expected, class Got>
void that(bool ok, std::string_view name, const Expected& expected, const Got& got) {
  if (!ok) throw Error(name, text_of(expected), text_of(got));
}

template <class T>
bool contains(const std::vector<T>& values, T value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// What a call asks for is among the backend's capabilities (BackendCapabilities).
template <class Got>
void capability(bool has, std::string_view name, const Got& got) {
  that(has, name, "what the capabilities of the backend have", got);
}

// A finite, positive host value, or a pointer whose value is the device's business.
void scale(std::string_view name, const Scale& scale);
void scale_value(std::string_view name, float value);

template <class T, class Data>
T* data(const BasicTensorView<Data>& view) {
  return static_cast<T*>(view.data);
}

}  // namespace quire::check
