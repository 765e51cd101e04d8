#include <cstdlib>
#include <cstring>

#include "backend.h"

namespace quire {

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list = {
    &cpu::backend(),
#if QUIRE_CUDA
    &cuda::backend(),
#endif
    &reference::backend(),
  };
  return list;
}

const std::vector<const AttentionBackend*>& attention_backends() {
  static const std::vector<const AttentionBackend*> list(backends().begin(), backends().end());
  return list;
}

namespace {

std::string known_names() {
  std::string names;
  for (const Backend* backend : backends()) {
    names += names.empty() ? "" : ", ";
    names += backend->name();
  }
  return names;
}

const Backend& backend_by_name(const std::string& name, const char* argument) {
  for (const Backend* backend : backends()) {
    if (name == backend->name()) return *backend;
  }
  throw Error(argument, "one of " + known_names(), "\"" + name + "\"");
}

}  // namespace

const AttentionBackend& attention_backend(std::string_view name) {
  return backend_by_name(std::string(name), "name");
}

void Backend::read(Device, void* to, const void* from, std::size_t bytes, const Context&) const {
  std::memcpy(to, from, bytes);
}

void Backend::fill_zero(const TensorView& output, const Context&) const {
  const std::int64_t heads = output.ndim == 3 ? output.shape[1] : 1;
  const std::int64_t bytes = output.shape[output.ndim - 1] * size_of(output.dtype);
  for (std::int64_t row = 0; row < output.shape[0]; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t offset =
          row * output.strides[0] + (output.ndim == 3 ? head * output.strides[1] : 0);
      std::memset(static_cast<char*>(output.data) + offset * size_of(output.dtype), 0,
                  static_cast<std::size_t>(bytes));
    }
  }
}

const Backend& pick_backend(Device device, const std::string& name) {
  const char* forced = std::getenv("QUIRE_BACKEND");
  const bool from_environment = name.empty() && forced != nullptr && *forced != '\0';
  if (!name.empty() || from_environment) {
    const Backend& backend = backend_by_name(from_environment ? forced : name,
                                             from_environment ? "QUIRE_BACKEND" : "config.backend");
    if (backend.device_type() != device.type) {
      throw Error("config.device",
                  std::string("a device that backend ") + backend.name() + " serves",
                  to_string(device));
    }
    if (!backend.available()) {
      throw Error("config.backend", "a backend that can run on this machine",
                  std::string(backend.name()) + " (" + backend.instruction_set() + ")");
    }
    return backend;
  }
  for (const Backend* backend : backends()) {
    if (backend->device_type() == device.type && backend->available()) return *backend;
  }
  throw Error("config.device", "a device that a backend of this build can run on",
              to_string(device));
}

}  // namespace quire
