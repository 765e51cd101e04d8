#include "conformance/noise.h"

#include <map>
#include <utility>
#include <vector>

#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kElements = std::int64_t{1} << 17U;

std::vector<std::byte> draw(DType dtype, double deviation) {
  Rng rng(static_cast<std::uint64_t>(dtype));
  const std::int64_t size = size_of(dtype);
  std::vector<std::byte> bytes((kElements + kMostNoise) * size);
  for (std::int64_t i = 0; i < kElements + kMostNoise; ++i) {
    // Bytes are two codes of an int4 cache.
    const bool is_byte = dtype == DType::kUInt8;
    const double x = is_byte ? static_cast<double>(rng.uniform(0, 255)) : deviation * rng.normal();
    encode(dtype, x, bytes.data() + i * size);
  }
  return bytes;
}

}  // namespace

const std::byte* noise(DType dtype, double deviation, Rng* rng) {
  static std::map<std::pair<DType, double>, std::vector<std::byte>> kinds;
  std::vector<std::byte>& kind = kinds[{dtype, deviation}];
  if (kind.empty()) kind = draw(dtype, deviation);
  const std::int64_t start = rng->uniform(0, kElements - 1);
  return kind.data() + start * size_of(dtype);
}

}  // namespace quire::conformance
