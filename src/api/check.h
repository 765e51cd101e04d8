// Checks of the public boundary. Each throws quire::Error naming the argument.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "params.h"
#include "quire/types.h"

namespace quire::check {

inline constexpr std::int64_t kAny = -1;

// `view` is present, on `device`, of one of `dtypes`, and of `shape` (kAny matches every size).
// Data may be null only if the view has no elements.
void tensor(std::string_view name, const TensorView& view, Device device,
            std::initializer_list<DType> dtypes, std::initializer_list<std::int64_t> shape);

// Unit stride in the last dimension (or at most one element there).
void unit_last_stride(std::string_view name, const TensorView& view);
void contiguous(std::string_view name, const TensorView& view);

// Dimension `dim` holds at least `least` entries.
void at_least(std::string_view name, const TensorView& view, int dim, std::int64_t least,
              std::string_view why);

// Texts of a failed check: words, a number, a tensor, or a function that makes them. Checks that
// pass must not build strings: calls in steady state allocate nothing.
inline std::string text_of(std::string_view words) { return std::string(words); }
inline std::string text_of(std::int64_t number) { return std::to_string(number); }
inline std::string text_of(const TensorView& view) { return view.to_string(); }
template <std::invocable F>
std::string text_of(const F& make) {
  return make();
}

template <class Expected, class Got>
void that(bool ok, std::string_view name, const Expected& expected, const Got& got) {
  if (!ok) throw Error(name, text_of(expected), text_of(got));
}

// A finite, positive host value, or a pointer whose value is the device's business.
void scale(std::string_view name, const Scale& scale);

template <class T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

}  // namespace quire::check
