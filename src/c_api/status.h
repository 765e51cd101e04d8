// How the C ABI's functions end: statuses and last errors in place of exceptions. And what is the
// same in all of them: pointers that must not be null, numbers of an enumeration, text results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "quire/quire_c.h"
#include "quire/types.h"

namespace quire::c_api {

// The status of the exception that is being handled, kept as the calling thread's last error.
quire_status status_of_current_exception() noexcept;

const char* last_error_text() noexcept;
const char* last_error_argument() noexcept;

// Every function's body runs in here.
template <class Body>
quire_status guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return QUIRE_OK;
  } catch (...) {
    return status_of_current_exception();
  }
}

template <class T>
T& deref(T* pointer, std::string_view argument) {
  if (pointer == nullptr) throw Error(argument, "a pointer", "null");
  return *pointer;
}

template <class Enum>
Enum to_enum(std::int32_t value, Enum last, std::string_view argument,
             const std::string& what = "") {
  if (value < 0 || value > static_cast<std::int32_t>(last)) {
    throw Error(argument, what + "0 to " + std::to_string(static_cast<std::int32_t>(last)),
                std::to_string(value));
  }
  return static_cast<Enum>(value);
}

inline bool to_bool(std::int32_t value, std::string_view argument) {
  if (value != 0 && value != 1) throw Error(argument, "0 or 1", std::to_string(value));
  return value == 1;
}

// A text for the caller's buffer, cut to it.
void return_text(std::string_view text, char* out, std::size_t capacity, std::size_t* length);

}  // namespace quire::c_api
