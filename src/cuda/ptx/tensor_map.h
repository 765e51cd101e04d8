// A tensor map as the driver encodes it: a CUtensorMap, without cuda.h. Host and device.
#pragma once

#include <cstdint>

namespace quire::cuda::ptx {

struct alignas(64) TensorMap {
  std::uint64_t opaque[16];
};

}  // namespace quire::cuda::ptx
