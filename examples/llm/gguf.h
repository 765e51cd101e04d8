// Reads GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3,
// little-endian. The file is mapped, never copied: strings and tensor data point into the mapping.
//
// Nothing in the file is trusted. Each count, size and offset is checked against the bytes that are
// really there before anything is read or allocated, so a damaged file gives a ModelError and at
// most a small multiple of its own size in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

namespace quire::llm {

// A model file that cannot be used. `what()` names the file, the place in it and what was expected.
class ModelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The storage types that Quire's example reads; the values are ggml's.
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ8_0 = 8,
  kBF16 = 30,
};

const char* to_string(GgmlType type);

struct GgufTensor {
  std::string_view name;
  GgmlType type = GgmlType::kF32;
  // ggml's order: shape[0] is the contiguous dimension. A weight [out, in] has shape {in, out}.
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;

  std::int64_t row_size() const { return shape[0]; }
  std::int64_t num_rows() const;
};

class GgufFile {
 public:
  // Maps the file. Throws ModelError if it cannot be opened or is not a sound GGUF file.
  static GgufFile open(const std::filesystem::path& path);

  // Reads from memory, which must outlive the result. `name` stands for the file in errors.
  static GgufFile parse(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }
  bool has(std::string_view key) const { return values_.contains(key); }

  // Metadata. Without a default a missing key throws; a key of another type always does.
  std::string_view string(std::string_view key) const;
  std::int64_t integer(std::string_view key) const;
  double number(std::string_view key) const;
  std::string_view string_or(std::string_view key, std::string_view fallback) const;
  std::int64_t integer_or(std::string_view key, std::int64_t fallback) const;
  double number_or(std::string_view key, double fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  const std::vector<std::string_view>& strings(std::string_view key) const;
  const std::vector<std::int64_t>& integers(std::string_view key) const;

  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find_tensor(std::string_view name) const;
  // Throws ModelError if the tensor is missing or has another shape (ggml's order).
  const GgufTensor& tensor(std::string_view name, const std::vector<std::int64_t>& shape) const;

  // Throws a ModelError that starts with the file's name.
  [[noreturn]] void fail(const std::string& message) const;

 private:
  using Value =
      std::variant<bool, std::int64_t, double, std::string_view, std::vector<std::int64_t>,
                   std::vector<double>, std::vector<std::string_view>>;
  friend class GgufParser;

  template <class T>
  const T& value(std::string_view key, const char* expected) const;

  std::string name_;
  std::shared_ptr<const void> mapping_;  // keeps an open()ed file mapped; null after parse()
  std::unordered_map<std::string_view, Value> values_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, std::size_t> tensor_index_;
};

}  // namespace quire::llm
