// Writes GGUF files in memory, for tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace quire::llm {

class GgufWriter {
 public:
  void add_uint(std::string_view key, std::uint32_t value);
  void add_float(std::string_view key, float value);
  void add_bool(std::string_view key, bool value);
  void add_string(std::string_view key, std::string_view value);
  void add_strings(std::string_view key, const std::vector<std::string>& values);
  void add_ints(std::string_view key, const std::vector<std::int32_t>& values);

  // `type` is ggml's number; `data` is as it is stored. `shape` in ggml's order.
  void add_tensor(std::string_view name, const std::vector<std::uint64_t>& shape,
                  std::uint32_t type, std::vector<std::byte> data);
  void add_floats(std::string_view name, const std::vector<std::uint64_t>& shape,
                  const std::vector<float>& values);

  // The file. Its last byte is the last one of the last tensor.
  std::vector<std::byte> bytes() const;

 private:
  struct TensorEntry {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::uint32_t type;
    std::vector<std::byte> data;
  };
  void add_key(std::string_view key, std::uint32_t type);

  std::uint64_t num_values_ = 0;
  std::vector<std::byte> metadata_;
  std::vector<TensorEntry> tensors_;
};

// Overwrites bytes at `offset` with the value's.
template <class T>
void poke(std::vector<std::byte>& bytes, std::size_t offset, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes.at(offset + i) = static_cast<std::byte>(value >> (8 * i));
  }
}

// Where `text` first stands in the bytes.
std::size_t find_text(const std::vector<std::byte>& bytes, std::string_view text);

}  // namespace quire::llm
