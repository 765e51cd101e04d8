#include <cstdlib>
#include <cstring>

#include "backend.h"
#include "plan/cascade_tensors.h"

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

const Backend& backend_by_name(std::string_view name, const char* argument) {
  for (const Backend* backend : backends()) {
    if (name == backend->name()) return *backend;
  }
  throw Error(argument, "one of " + known_names(), "\"" + std::string(name) + "\"");
}

}  // namespace

const AttentionBackend& attention_backend(std::string_view name) {
  return backend_by_name(name, "name");
}

const std::int32_t* LayerPlan::cascade_tensors(const BatchParams& batch, const Context&) {
  cascade_tensors_.resize(static_cast<std::size_t>(planning::num_cascade_entries(batch)));
  for (std::size_t i = 0; i < cascade_tensors_.size(); ++i) {
    cascade_tensors_[i] = planning::cascade_entry(batch, static_cast<std::int64_t>(i));
  }
  return cascade_tensors_.data();
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

namespace {

// The backend that was asked for by name.
const Backend& named_backend(Device device, std::string_view name, const char* name_argument,
                             const char* device_argument) {
  const Backend& backend = backend_by_name(name, name_argument);
  if (backend.device_type() != device.type) {
    throw Error(device_argument, std::string("a device that backend ") + backend.name() + " serves",
                to_string(device));
  }
  if (!backend.available()) {
    throw Error(name_argument, "a backend that can run on this machine",
                std::string(name) + " (" + backend.instruction_set() + ")");
  }
  return backend;
}

const Backend& best_backend(Device device, const char* argument) {
  std::string reasons;
  for (const Backend* backend : backends()) {
    if (backend->device_type() != device.type) continue;
    if (backend->available()) return *backend;
    reasons += (reasons.empty() ? "" : "; ") + backend->instruction_set();
  }
  if (reasons.empty()) reasons = "not in this build: make build PRESET=cuda, or -DQUIRE_CUDA=ON";
  throw Error(argument, "a device that a backend of this build can run on (cpu always is one)",
              to_string(device) + " (" + reasons + ")");
}

}  // namespace

const Backend& pick_backend(Device device, std::string_view name, const char* argument) {
  const char* forced = std::getenv("QUIRE_BACKEND");
  const bool is_forced = name.empty() && forced != nullptr && *forced != '\0';
  const Backend& backend = is_forced      ? named_backend(device, forced, "QUIRE_BACKEND", argument)
                           : name.empty() ? best_backend(device, argument)
                                          : named_backend(device, name, "backend", argument);
  if (device.index < 0 || device.index >= backend.num_devices()) {
    throw Error(argument,
                "one of the " + std::to_string(backend.num_devices()) + " devices of backend " +
                    backend.name() + " (indices from 0)",
                to_string(device));
  }
  return backend;
}

}  // namespace quire
