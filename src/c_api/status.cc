#include "c_api/status.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <new>
#include <system_error>

namespace quire::c_api {
namespace {

// Fixed buffers: telling what went wrong must not fail, also when memory has run out.
struct LastError {
  std::array<char, 2048> text{};
  std::array<char, 128> argument{};
};
thread_local LastError last_error;

template <std::size_t n>
void copy_text(std::string_view text, std::array<char, n>* out) noexcept {
  const std::size_t length = text.copy(out->data(), n - 1);
  (*out)[length] = '\0';
}

quire_status fail(quire_status status, std::string_view text,
                  std::string_view argument = {}) noexcept {
  copy_text(text, &last_error.text);
  copy_text(argument, &last_error.argument);
  return status;
}

}  // namespace

quire_status status_of_current_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return fail(QUIRE_INVALID_ARGUMENT, error.what(), error.argument());
  } catch (const OutOfMemory& error) {
    return fail(QUIRE_OUT_OF_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return fail(QUIRE_OUT_OF_MEMORY, "out of memory");
  } catch (const std::system_error& error) {
    // A thread pool that the system does not start: see make_thread_pool().
    const bool no_threads = error.code() == std::errc::resource_unavailable_try_again;
    return fail(no_threads ? QUIRE_OUT_OF_MEMORY : QUIRE_INTERNAL, error.what());
  } catch (const std::exception& error) {
    return fail(QUIRE_INTERNAL, error.what());
  } catch (...) {
    return fail(QUIRE_INTERNAL, "unknown error");
  }
}

const char* last_error_text() noexcept { return last_error.text.data(); }
const char* last_error_argument() noexcept { return last_error.argument.data(); }

void return_text(std::string_view text, char* out, std::size_t capacity, std::size_t* length) {
  if (capacity > 0) {
    deref(out, "text");
    const std::size_t copied = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), copied);
    out[copied] = '\0';
  }
  if (length != nullptr) *length = text.size();
}

}  // namespace quire::c_api
