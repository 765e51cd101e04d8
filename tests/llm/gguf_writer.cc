#include "gguf_writer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace quire::llm {
namespace {

constexpr std::size_t kAlignment = 32;

template <class T>
void append(std::vector<std::byte>& out, T value) {
  std::byte bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.insert(out.end(), bytes, bytes + sizeof(T));
}

void append_string(std::vector<std::byte>& out, std::string_view text) {
  append<std::uint64_t>(out, text.size());
  for (const char c : text) out.push_back(static_cast<std::byte>(c));
}

}  // namespace

void GgufWriter::add_key(std::string_view key, std::uint32_t type) {
  append_string(metadata_, key);
  append(metadata_, type);
  ++num_values_;
}

void GgufWriter::add_uint(std::string_view key, std::uint32_t value) {
  add_key(key, 4);
  append(metadata_, value);
}

void GgufWriter::add_float(std::string_view key, float value) {
  add_key(key, 6);
  append(metadata_, value);
}

void GgufWriter::add_bool(std::string_view key, bool value) {
  add_key(key, 7);
  append<std::uint8_t>(metadata_, value ? 1 : 0);
}

void GgufWriter::add_string(std::string_view key, std::string_view value) {
  add_key(key, 8);
  append_string(metadata_, value);
}

void GgufWriter::add_strings(std::string_view key, const std::vector<std::string>& values) {
  add_key(key, 9);
  append<std::uint32_t>(metadata_, 8);
  append<std::uint64_t>(metadata_, values.size());
  for (const std::string& value : values) append_string(metadata_, value);
}

void GgufWriter::add_ints(std::string_view key, const std::vector<std::int32_t>& values) {
  add_key(key, 9);
  append<std::uint32_t>(metadata_, 5);
  append<std::uint64_t>(metadata_, values.size());
  for (const std::int32_t value : values) append(metadata_, value);
}

void GgufWriter::add_tensor(std::string_view name, const std::vector<std::uint64_t>& shape,
                            std::uint32_t type, std::vector<std::byte> data) {
  tensors_.push_back({std::string(name), shape, type, std::move(data)});
}

void GgufWriter::add_floats(std::string_view name, const std::vector<std::uint64_t>& shape,
                            const std::vector<float>& values) {
  std::vector<std::byte> data(values.size() * sizeof(float));
  std::memcpy(data.data(), values.data(), data.size());
  add_tensor(name, shape, 0, std::move(data));
}

std::vector<std::byte> GgufWriter::bytes() const {
  std::vector<std::byte> out;
  for (const char c : {'G', 'G', 'U', 'F'}) out.push_back(static_cast<std::byte>(c));
  append<std::uint32_t>(out, 3);
  append<std::uint64_t>(out, tensors_.size());
  append<std::uint64_t>(out, num_values_);
  out.insert(out.end(), metadata_.begin(), metadata_.end());
  const auto aligned = [](std::size_t size) {
    return (size + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::size_t offset = 0;
  for (const TensorEntry& tensor : tensors_) {
    append_string(out, tensor.name);
    append(out, static_cast<std::uint32_t>(tensor.shape.size()));
    for (const std::uint64_t size : tensor.shape) append(out, size);
    append(out, tensor.type);
    append<std::uint64_t>(out, offset);
    offset = aligned(offset + tensor.data.size());
  }
  for (const TensorEntry& tensor : tensors_) {
    out.resize(aligned(out.size()));
    out.insert(out.end(), tensor.data.begin(), tensor.data.end());
  }
  return out;
}

std::size_t find_text(const std::vector<std::byte>& bytes, std::string_view text) {
  const auto* begin = reinterpret_cast<const char*>(bytes.data());
  const auto* end = begin + bytes.size();
  const auto* found = std::search(begin, end, text.begin(), text.end());
  if (found == end) throw std::logic_error("no such text: " + std::string(text));
  return static_cast<std::size_t>(found - begin);
}

}  // namespace quire::llm
