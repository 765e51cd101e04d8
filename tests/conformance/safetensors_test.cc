// The reader of golden files on files that are broken: a clear error, never an access outside.
#include "conformance/safetensors.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace quire::conformance {
namespace {

std::vector<char> file_of(const std::string& header, std::size_t data_bytes,
                          std::uint64_t stated_bytes) {
  std::vector<char> file(sizeof stated_bytes + header.size() + data_bytes, '\x01');
  std::memcpy(file.data(), &stated_bytes, sizeof stated_bytes);
  std::memcpy(file.data() + sizeof stated_bytes, header.data(), header.size());
  return file;
}

std::vector<char> file_of(const std::string& header, std::size_t data_bytes = 8) {
  return file_of(header, data_bytes, header.size());
}

std::string error_of(const std::vector<char>& file) {
  try {
    parse_safetensors("broken", file);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "(no error)";
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

TEST(Safetensors, ReadsWhatIsRight) {
  const Safetensors read = parse_safetensors("good", file_of(entry("U8", "[2,3]", "[1,7]")));
  ASSERT_EQ(read.tensors.count("t"), 1U);
  EXPECT_EQ(read.tensors.at("t").shape, (Sizes{2, 3}));
  EXPECT_EQ(read.tensors.at("t").get({1, 2}), 1.0);
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const std::vector<char> good = file_of(entry("F32", "[2]", "[0,8]"));
  for (std::size_t size = 0; size < good.size(); ++size) {
    const std::string error = error_of({good.begin(), good.begin() + size});
    EXPECT_EQ(error.rfind("broken", 0), 0U) << size << " bytes: " << error;
  }
}

TEST(Safetensors, HeadersThatLie) {
  for (const std::uint64_t stated :
       {std::uint64_t{1000}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    EXPECT_NE(error_of(file_of("{}", 8, stated)).find("does not fit"), std::string::npos);
  }
  EXPECT_NE(error_of(file_of("[1, 2")).find("bad header"), std::string::npos);
  EXPECT_NE(error_of(file_of(R"({"t":{"dtype":"U8"}})")).find("bad header"), std::string::npos);
  EXPECT_NE(error_of(file_of(R"({"t":7})")).find("bad header"), std::string::npos);
}

TEST(Safetensors, TensorsThatLie) {
  const auto fails_with = [](const std::string& header, const char* what) {
    EXPECT_NE(error_of(file_of(header, 64)).find(what), std::string::npos) << header;
  };
  fails_with(entry("F99", "[2]", "[0,8]"), "unknown dtype");
  fails_with(entry("F32", "[2]", "[0,80]"), "not inside the file");
  fails_with(entry("F32", "[2]", "[8,0]"), "not inside the file");
  fails_with(entry("F32", "[2]", "[0,8,9]"), "not inside the file");
  fails_with(entry("F32", "[3]", "[0,8]"), "do not agree");
  fails_with(entry("F32", "[1]", "[0,8]"), "do not agree");
  fails_with(entry("F32", "[-2]", "[0,8]"), "negative size");
  fails_with(entry("F32", "[9223372036854775807,4]", "[0,8]"), "larger than the file");
  fails_with(entry("U8", "[4294967296,4294967296]", "[0,0]"), "larger than the file");
}

}  // namespace
}  // namespace quire::conformance
