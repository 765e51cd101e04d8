#include "conformance/safetensors.h"

#include <cstring>
#include <fstream>
#include <stdexcept>

namespace quire::conformance {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw std::runtime_error(name + ": " + what);
}

DType dtype_of(const std::string& name, const std::string& text) {
  static const std::map<std::string, DType> known = {
      {"F32", DType::kFloat32},        {"F16", DType::kFloat16},        {"BF16", DType::kBFloat16},
      {"F8_E4M3", DType::kFloat8E4M3}, {"F8_E5M2", DType::kFloat8E5M2}, {"I8", DType::kInt8},
      {"U8", DType::kUInt8},           {"I32", DType::kInt32},          {"I64", DType::kInt64},
      {"BOOL", DType::kBool}};
  const auto found = known.find(text);
  if (found == known.end()) fail(name, "unknown dtype " + text);
  return found->second;
}

// The number of bytes of a tensor of that shape, at most `limit`.
std::uint64_t checked_bytes(const std::string& name, const Sizes& shape, DType dtype,
                            std::uint64_t limit) {
  auto bytes = static_cast<std::uint64_t>(size_of(dtype));
  for (const std::int64_t size : shape) {
    if (size < 0) fail(name, "negative size in its shape");
    if (size > 0 && bytes > limit / static_cast<std::uint64_t>(size)) {
      fail(name, "shape is larger than the file");
    }
    bytes *= static_cast<std::uint64_t>(size);
  }
  return bytes;
}

Tensor parse_tensor(const std::string& name, const json& entry, const char* data,
                    std::uint64_t data_bytes) {
  const DType dtype = dtype_of(name, entry.at("dtype").get<std::string>());
  const auto shape = entry.at("shape").get<Sizes>();
  const auto offsets = entry.at("data_offsets").get<std::vector<std::uint64_t>>();
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes) {
    fail(name, "data_offsets are not inside the file");
  }
  const std::uint64_t bytes = checked_bytes(name, shape, dtype, data_bytes);
  if (bytes != offsets[1] - offsets[0]) fail(name, "shape and data_offsets do not agree");
  Tensor tensor = make_tensor(dtype, shape);
  if (bytes > 0) std::memcpy(tensor.buffer->bytes.data(), data + offsets[0], bytes);
  return tensor;
}

}  // namespace

Safetensors parse_safetensors(const std::string& name, const std::vector<char>& file) {
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) fail(name, "shorter than a safetensors header");
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  const std::uint64_t rest = file.size() - sizeof header_bytes;
  if (header_bytes > rest || header_bytes > kMaxHeaderBytes) {
    fail(name, "header of " + std::to_string(header_bytes) + " bytes does not fit into the file");
  }
  const char* begin = file.data() + sizeof header_bytes;
  Safetensors result;
  try {
    const json header = json::parse(begin, begin + header_bytes);
    for (const auto& [key, entry] : header.items()) {
      if (key == "__metadata__") {
        result.metadata = entry;
      } else {
        result.tensors[key] =
            parse_tensor(name + ": " + key, entry, begin + header_bytes, rest - header_bytes);
      }
    }
  } catch (const json::exception& error) {
    fail(name, std::string("bad header: ") + error.what());
  }
  return result;
}

Safetensors read_safetensors(const std::string& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) fail(path, "cannot be opened");
  const std::streamoff bytes = stream.tellg();
  if (bytes < 0) fail(path, "cannot be read");
  std::vector<char> file(static_cast<std::size_t>(bytes));
  stream.seekg(0);
  if (!stream.read(file.data(), bytes)) fail(path, "cannot be read");
  return parse_safetensors(path, file);
}

}  // namespace quire::conformance
