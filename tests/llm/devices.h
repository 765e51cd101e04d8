// The devices that tests of examples/llm run on.
#pragma once

#include <string>
#include <vector>

#include "quire/backend.h"

namespace quire::llm {

inline std::vector<DeviceType> devices_of_this_build() {
#if QUIRE_CUDA
  return {DeviceType::kCpu, DeviceType::kCuda};
#else
  return {DeviceType::kCpu};
#endif
}

// Why this machine cannot run the device's tests; empty if it can.
inline std::string missing(DeviceType device) {
  if (device == DeviceType::kCpu) return "";
  const AttentionBackend& backend = attention_backend("cuda");
  return backend.available() ? "" : "no CUDA device: " + backend.instruction_set();
}

}  // namespace quire::llm
