#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <system_error>
#include <utility>

namespace quire::llm {
namespace {

// ggml's type numbers of metadata values.
enum class ValueType : std::uint32_t {
  kUInt8 = 0,
  kInt8 = 1,
  kUInt16 = 2,
  kInt16 = 3,
  kUInt32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUInt64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// The fewest bytes that one value of the type takes in the file; 0 for an unknown type.
std::uint64_t min_bytes(ValueType type) {
  switch (type) {
    case ValueType::kUInt8:
    case ValueType::kInt8:
    case ValueType::kBool: return 1;
    case ValueType::kUInt16:
    case ValueType::kInt16: return 2;
    case ValueType::kUInt32:
    case ValueType::kInt32:
    case ValueType::kFloat32: return 4;
    case ValueType::kUInt64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
    case ValueType::kString: return 8;
    case ValueType::kArray: return 12;
  }
  return 0;
}

struct BlockLayout {
  std::uint64_t elements;
  std::uint64_t bytes;
};

std::optional<BlockLayout> block_layout(std::uint32_t type) {
  switch (static_cast<GgmlType>(type)) {
    case GgmlType::kF32: return BlockLayout{1, 4};
    case GgmlType::kF16:
    case GgmlType::kBF16: return BlockLayout{1, 2};
    case GgmlType::kQ4_0: return BlockLayout{32, 18};
    case GgmlType::kQ4_1: return BlockLayout{32, 20};
    case GgmlType::kQ8_0: return BlockLayout{32, 34};
  }
  return std::nullopt;
}

constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = 1U << 20;
constexpr std::uint32_t kMaxDims = 4;  // ggml's GGML_MAX_DIMS
// Longest piece of text from the file that an error repeats.
constexpr std::size_t kMaxQuoted = 80;

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text.substr(0, kMaxQuoted)) {
    const auto byte = static_cast<unsigned char>(c);
    result += byte < 0x20 || byte == 0x7F ? '?' : c;
  }
  return result + (text.size() > kMaxQuoted ? "...\"" : "\"");
}

std::string shape_string(const std::vector<std::int64_t>& shape) {
  std::string result = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return result + "]";
}

const char* kind_of_file(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  return S_ISSOCK(mode) ? "a socket" : "a device";
}

std::shared_ptr<const void> map_file(const std::string& path, std::span<const std::byte>& bytes) {
  const auto fail = [&](const char* action) -> void {
    throw ModelError(path + ": cannot " + action + ": " + std::system_category().message(errno));
  };
  // Without O_NONBLOCK opening a FIFO would wait for its writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail("open");
  const std::shared_ptr<void> closer(nullptr, [fd](void*) { ::close(fd); });
  struct stat status {};
  if (::fstat(fd, &status) != 0) fail("read its size");
  if (!S_ISREG(status.st_mode)) {
    throw ModelError(path + ": expected a GGUF file, got " + kind_of_file(status.st_mode));
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) {
    bytes = {};
    return nullptr;
  }
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) fail("map");
  bytes = {static_cast<const std::byte*>(data), size};
  return {data, [size](const void* p) { ::munmap(const_cast<void*>(p), size); }};
}

}  // namespace

const char* to_string(GgmlType type) {
  switch (type) {
    case GgmlType::kF32: return "F32";
    case GgmlType::kF16: return "F16";
    case GgmlType::kQ4_0: return "Q4_0";
    case GgmlType::kQ4_1: return "Q4_1";
    case GgmlType::kQ8_0: return "Q8_0";
    case GgmlType::kBF16: return "BF16";
  }
  return "?";
}

std::int64_t GgufTensor::num_rows() const {
  return std::accumulate(shape.begin() + 1, shape.end(), std::int64_t{1}, std::multiplies<>());
}

// ---------------------------------------------------------------------------------------------

class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, GgufFile& file) : bytes_(bytes), file_(file) {}

  void parse();

 private:
  std::uint64_t remaining() const { return bytes_.size() - offset_; }

  [[noreturn]] void fail(const std::string& message) const {
    file_.fail("at byte " + std::to_string(offset_) + ": " + message);
  }

  void need(std::uint64_t count, std::string_view what) const {
    if (count > remaining()) {
      fail("expected " + std::string(what) + " of " + std::to_string(count) +
           " bytes, got a file with " + std::to_string(remaining()) + " bytes left");
    }
  }

  template <class T>
  T read(std::string_view what) {
    need(sizeof(T), what);
    T value;
    std::memcpy(&value, bytes_.data() + offset_, sizeof(T));
    offset_ += sizeof(T);
    return value;
  }

  std::string_view read_string(std::string_view what) {
    const auto size = read<std::uint64_t>(what);
    need(size, what);
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data() + offset_), size);
    offset_ += size;
    return text;
  }

  // A count of things that take at least `each` bytes in the file.
  std::uint64_t read_count(std::string_view what, std::uint64_t each) {
    const auto count = read<std::uint64_t>(what);
    check_count(count, what, each);
    return count;
  }
  void check_count(std::uint64_t count, std::string_view what, std::uint64_t each) const {
    if (count > remaining() / each) {
      fail("expected at most " + std::to_string(remaining() / each) + " as the " +
           std::string(what) + " in what is left of the file, got " + std::to_string(count));
    }
  }

  GgufFile::Value read_scalar(ValueType type, std::string_view key);
  GgufFile::Value read_array(std::string_view key);
  void read_metadata();
  void read_tensor_info();
  void place_tensors(std::uint64_t alignment);

  std::span<const std::byte> bytes_;
  GgufFile& file_;
  std::uint64_t offset_ = 0;
  std::vector<std::uint64_t> tensor_offsets_;
};

GgufFile::Value GgufParser::read_scalar(ValueType type, std::string_view key) {
  switch (type) {
    case ValueType::kUInt8: return std::int64_t{read<std::uint8_t>(key)};
    case ValueType::kInt8: return std::int64_t{read<std::int8_t>(key)};
    case ValueType::kUInt16: return std::int64_t{read<std::uint16_t>(key)};
    case ValueType::kInt16: return std::int64_t{read<std::int16_t>(key)};
    case ValueType::kUInt32: return std::int64_t{read<std::uint32_t>(key)};
    case ValueType::kInt32: return std::int64_t{read<std::int32_t>(key)};
    case ValueType::kInt64: return read<std::int64_t>(key);
    case ValueType::kUInt64: {
      const auto value = read<std::uint64_t>(key);
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        fail("key " + quoted(key) + ": expected less than 2^63, got " + std::to_string(value));
      }
      return static_cast<std::int64_t>(value);
    }
    case ValueType::kFloat32: return double{read<float>(key)};
    case ValueType::kFloat64: return read<double>(key);
    case ValueType::kBool: return read<std::uint8_t>(key) != 0;
    case ValueType::kString: return read_string(key);
    case ValueType::kArray: return read_array(key);
  }
  fail("key " + quoted(key) + ": expected a value type from 0 to 12, got " +
       std::to_string(static_cast<std::uint32_t>(type)));
}

GgufFile::Value GgufParser::read_array(std::string_view key) {
  const auto type = static_cast<ValueType>(read<std::uint32_t>(key));
  const std::uint64_t each = min_bytes(type);
  if (each == 0 || type == ValueType::kArray) {
    fail("key " + quoted(key) + ": expected an array of numbers, booleans or strings, got type " +
         std::to_string(static_cast<std::uint32_t>(type)));
  }
  const std::uint64_t count = read_count("length of " + quoted(key), each);
  if (type == ValueType::kString) {
    std::vector<std::string_view> strings(count);
    for (auto& text : strings) text = read_string(key);
    return strings;
  }
  if (type == ValueType::kFloat32 || type == ValueType::kFloat64) {
    std::vector<double> numbers(count);
    for (auto& number : numbers) number = std::get<double>(read_scalar(type, key));
    return numbers;
  }
  std::vector<std::int64_t> integers(count);
  for (auto& integer : integers) {
    const GgufFile::Value value = read_scalar(type, key);
    integer = type == ValueType::kBool ? std::get<bool>(value) : std::get<std::int64_t>(value);
  }
  return integers;
}

void GgufParser::read_metadata() {
  const std::string_view key = read_string("a metadata key");
  const auto type = static_cast<ValueType>(read<std::uint32_t>("a metadata value type"));
  if (!file_.values_.emplace(key, read_scalar(type, key)).second) {
    fail("expected each metadata key once, got " + quoted(key) + " twice");
  }
}

void GgufParser::read_tensor_info() {
  GgufTensor tensor;
  tensor.name = read_string("a tensor name");
  const std::string label = "tensor " + quoted(tensor.name);
  const auto num_dims = read<std::uint32_t>(label);
  if (num_dims == 0 || num_dims > kMaxDims) {
    fail(label + ": expected 1 to 4 dimensions, got " + std::to_string(num_dims));
  }
  std::uint64_t num_elements = 1;
  for (std::uint32_t d = 0; d < num_dims; ++d) {
    const auto size = read<std::uint64_t>(label);
    // A whole tensor of fewer than 2^48 elements: every later product of sizes fits 64 bits.
    if (size == 0 || size > (std::uint64_t{1} << 48) / num_elements) {
      fail(label + ": expected dimensions with a product from 1 to 2^48, got " +
           std::to_string(size) + " as dimension " + std::to_string(d));
    }
    num_elements *= size;
    tensor.shape.push_back(static_cast<std::int64_t>(size));
  }
  const auto type = read<std::uint32_t>(label);
  const auto layout = block_layout(type);
  if (!layout) {
    fail(label + ": expected type F32, F16, BF16, Q8_0, Q4_0 or Q4_1, got ggml type " +
         std::to_string(type));
  }
  if (static_cast<std::uint64_t>(tensor.shape[0]) % layout->elements != 0) {
    fail(label + ": expected rows of a multiple of " + std::to_string(layout->elements) +
         " elements, got " + std::to_string(tensor.shape[0]));
  }
  tensor.type = static_cast<GgmlType>(type);
  tensor_offsets_.push_back(read<std::uint64_t>(label));
  if (!file_.tensor_index_.emplace(tensor.name, file_.tensors_.size()).second) {
    fail("expected each tensor once, got " + quoted(tensor.name) + " twice");
  }
  file_.tensors_.push_back(std::move(tensor));
}

void GgufParser::place_tensors(std::uint64_t alignment) {
  // Rounding up may pass the end of a file without tensors; that is only wrong if there are any.
  const std::uint64_t start = (offset_ + alignment - 1) / alignment * alignment;
  const std::uint64_t available = start <= bytes_.size() ? bytes_.size() - start : 0;
  for (std::size_t i = 0; i < file_.tensors_.size(); ++i) {
    GgufTensor& tensor = file_.tensors_[i];
    const std::uint64_t offset = tensor_offsets_[i];
    const auto layout = block_layout(static_cast<std::uint32_t>(tensor.type)).value();
    const auto num_elements = static_cast<std::uint64_t>(tensor.row_size() * tensor.num_rows());
    const std::uint64_t size = num_elements / layout.elements * layout.bytes;
    const std::string label = "tensor " + quoted(tensor.name);
    if (offset % alignment != 0) {
      fail(label + ": expected an offset that is a multiple of " + std::to_string(alignment) +
           ", got " + std::to_string(offset));
    }
    if (offset > available || size > available - offset) {
      fail(label + ": expected " + std::to_string(size) + " bytes at offset " +
           std::to_string(offset) + " of the data, got " + std::to_string(available) +
           " bytes of data (is the file truncated?)");
    }
    tensor.data = bytes_.subspan(start + offset, size);
  }
}

void GgufParser::parse() {
  static_assert(std::endian::native == std::endian::little, "the reader copies little-endian data");
  if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
    fail("expected the magic \"GGUF\", got something else: not a GGUF file");
  }
  offset_ = 4;
  const auto version = read<std::uint32_t>("the version");
  if (version != 2 && version != 3) {
    const bool swapped = version == 0x02000000 || version == 0x03000000;
    fail("expected GGUF version 2 or 3, got " +
         (swapped ? std::string("a big-endian file") : std::to_string(version)));
  }
  const auto num_tensors = read<std::uint64_t>("the number of tensors");
  // Least sizes: key length, type, one byte; and name length, dimensions, one size, type, offset.
  const std::uint64_t num_values = read_count("number of metadata values", 8 + 4 + 1);
  check_count(num_tensors, "number of tensors", 8 + 4 + 8 + 4 + 8);
  for (std::uint64_t i = 0; i < num_values; ++i) read_metadata();
  check_count(num_tensors, "number of tensors", 8 + 4 + 8 + 4 + 8);
  file_.tensors_.reserve(num_tensors);
  for (std::uint64_t i = 0; i < num_tensors; ++i) read_tensor_info();

  const auto alignment = static_cast<std::uint64_t>(
      file_.integer_or("general.alignment", static_cast<std::int64_t>(kDefaultAlignment)));
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    fail("key \"general.alignment\": expected a power of two up to " +
         std::to_string(kMaxAlignment) + ", got " + std::to_string(alignment));
  }
  place_tensors(alignment);
}

// ---------------------------------------------------------------------------------------------

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile file;
  file.name_ = path.string();
  std::span<const std::byte> bytes;
  file.mapping_ = map_file(file.name_, bytes);
  GgufParser(bytes, file).parse();
  return file;
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.name_ = std::move(name);
  GgufParser(bytes, file).parse();
  return file;
}

void GgufFile::fail(const std::string& message) const { throw ModelError(name_ + ": " + message); }

template <class T>
const T& GgufFile::value(std::string_view key, const char* expected) const {
  const auto it = values_.find(key);
  if (it == values_.end()) {
    fail("expected the metadata key " + quoted(key) + ", got a file without it");
  }
  if (const T* value = std::get_if<T>(&it->second)) return *value;
  fail("key " + quoted(key) + ": expected " + expected + ", got a value of another type");
}

std::string_view GgufFile::string(std::string_view key) const {
  return value<std::string_view>(key, "a string");
}

std::int64_t GgufFile::integer(std::string_view key) const {
  return value<std::int64_t>(key, "an integer");
}

double GgufFile::number(std::string_view key) const {
  const auto it = values_.find(key);
  if (it != values_.end() && std::holds_alternative<std::int64_t>(it->second)) {
    return static_cast<double>(std::get<std::int64_t>(it->second));
  }
  return value<double>(key, "a number");
}

std::string_view GgufFile::string_or(std::string_view key, std::string_view fallback) const {
  return has(key) ? string(key) : fallback;
}

std::int64_t GgufFile::integer_or(std::string_view key, std::int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}

double GgufFile::number_or(std::string_view key, double fallback) const {
  return has(key) ? number(key) : fallback;
}

bool GgufFile::boolean_or(std::string_view key, bool fallback) const {
  return has(key) ? value<bool>(key, "a boolean") : fallback;
}

const std::vector<std::string_view>& GgufFile::strings(std::string_view key) const {
  return value<std::vector<std::string_view>>(key, "an array of strings");
}

const std::vector<std::int64_t>& GgufFile::integers(std::string_view key) const {
  return value<std::vector<std::int64_t>>(key, "an array of integers");
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

const GgufTensor& GgufFile::tensor(std::string_view name,
                                   const std::vector<std::int64_t>& shape) const {
  const GgufTensor* tensor = find_tensor(name);
  if (tensor == nullptr) fail("expected a tensor " + quoted(name) + ", got a file without it");
  if (tensor->shape != shape) {
    fail("tensor " + quoted(name) + ": expected shape " + shape_string(shape) + ", got " +
         shape_string(tensor->shape));
  }
  return *tensor;
}

}  // namespace quire::llm
