// Damaged GGUF files: a ModelError that says where and why, never a crash or a huge allocation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "examples/llm/chat_template.h"
#include "examples/llm/gguf.h"
#include "examples/llm/model.h"
#include "examples/llm/tokenizer.h"
#include "tests/llm/gguf_writer.h"
#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr std::size_t kVersionOffset = 4;
constexpr std::size_t kTensorCountOffset = 8;
constexpr std::size_t kValueCountOffset = 16;
constexpr auto kHuge = std::numeric_limits<std::uint64_t>::max();

std::vector<std::byte> example() {
  GgufWriter writer;
  writer.add_string("general.architecture", "llama");
  writer.add_strings("words", {"one", "two"});
  writer.add_ints("numbers", {1, 2, 3});
  writer.add_uint("general.alignment", 32);
  writer.add_floats("weight", {32, 2}, std::vector<float>(64, 1.0F));
  return writer.bytes();
}

// Just past the key's text: the value's type.
std::size_t value_type_of(const std::vector<std::byte>& bytes, std::string_view key) {
  return find_text(bytes, key) + key.size();
}

void expect_error(const std::vector<std::byte>& bytes, const std::string& text) {
  EXPECT_THAT([&] { GgufFile::parse(bytes, "broken"); },
              ThrowsMessage<ModelError>(AllOf(HasSubstr("broken: at byte "), HasSubstr(text))))
      << text;
}

TEST(GgufCorruption, TruncatedAnywhere) {
  const auto bytes = example();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    // An exact copy: a sanitizer sees any read past its end.
    const std::vector<std::byte> part(bytes.begin(),
                                      bytes.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_THROW(GgufFile::parse(part, "truncated"), ModelError) << size;
  }
}

TEST(GgufCorruption, WrongMagicAndVersion) {
  auto bytes = example();
  poke<std::uint32_t>(bytes, 0, 0x46554746);
  expect_error(bytes, "not a GGUF file");
  bytes = example();
  poke<std::uint32_t>(bytes, kVersionOffset, 1);
  expect_error(bytes, "expected GGUF version 2 or 3, got 1");
  poke<std::uint32_t>(bytes, kVersionOffset, 0x03000000);
  expect_error(bytes, "got a big-endian file");
}

TEST(GgufCorruption, AbsurdCounts) {
  for (const std::uint64_t count : {kHuge, kHuge / 2, std::uint64_t{1} << 32}) {
    auto bytes = example();
    poke(bytes, kTensorCountOffset, count);
    expect_error(bytes, "as the number of tensors");
    bytes = example();
    poke(bytes, kValueCountOffset, count);
    expect_error(bytes, "as the number of metadata values");
    bytes = example();
    poke(bytes, value_type_of(bytes, "words") + 8, count);
    expect_error(bytes, "as the length of \"words\"");
    bytes = example();
    poke(bytes, value_type_of(bytes, "numbers") + 8, count);
    expect_error(bytes, "as the length of \"numbers\"");
    bytes = example();
    poke(bytes, find_text(bytes, "general.architecture") - 8, count);
    expect_error(bytes, "a metadata key of " + std::to_string(count) + " bytes");
    bytes = example();
    poke(bytes, value_type_of(bytes, "general.architecture") + 4, count);
    expect_error(bytes, "general.architecture of " + std::to_string(count) + " bytes");
  }
}

TEST(GgufCorruption, WrongTypes) {
  auto bytes = example();
  poke<std::uint32_t>(bytes, value_type_of(bytes, "numbers"), 13);
  expect_error(bytes, "expected a value type from 0 to 12, got 13");
  bytes = example();
  poke<std::uint32_t>(bytes, value_type_of(bytes, "numbers") + 4, 9);
  expect_error(bytes, "expected an array of numbers, booleans or strings, got type 9");
  bytes = example();
  poke<std::uint32_t>(bytes, value_type_of(bytes, "weight") + 4 + 16, 14);
  expect_error(bytes, "got ggml type 14");
}

TEST(GgufCorruption, WrongTensors) {
  const std::size_t num_dims = value_type_of(example(), "weight");
  const std::size_t dims = num_dims + 4;
  const std::size_t type = dims + 16;
  const std::size_t offset = type + 4;
  for (const std::uint32_t count : {0U, 5U, 0xFFFFFFFFU}) {
    auto bytes = example();
    poke(bytes, num_dims, count);
    expect_error(bytes, "expected 1 to 4 dimensions");
  }
  for (const std::uint64_t size : {std::uint64_t{0}, kHuge, std::uint64_t{1} << 63}) {
    auto bytes = example();
    poke(bytes, dims + 8, size);
    expect_error(bytes, "expected dimensions with a product from 1 to 2^48");
  }
  auto bytes = example();
  poke(bytes, dims + 8, std::uint64_t{1} << 40);
  expect_error(bytes, "is the file truncated?");
  bytes = example();
  poke<std::uint64_t>(bytes, dims, 31);
  poke<std::uint32_t>(bytes, type, 3);
  expect_error(bytes, "expected rows of a multiple of 32 elements, got 31");
  for (const std::uint64_t wrong : {std::uint64_t{32}, kHuge - 31, std::uint64_t{1} << 62}) {
    bytes = example();
    poke(bytes, offset, wrong);
    expect_error(bytes, "is the file truncated?");
  }
  bytes = example();
  poke<std::uint64_t>(bytes, offset, 1);
  expect_error(bytes, "expected an offset that is a multiple of 32, got 1");
}

TEST(GgufCorruption, WrongAlignment) {
  for (const std::uint32_t alignment : {0U, 3U, 1U << 21, 0xFFFFFFFFU}) {
    auto bytes = example();
    poke(bytes, value_type_of(bytes, "general.alignment") + 4, alignment);
    expect_error(bytes, "expected a power of two");
  }
}

TEST(GgufCorruption, SameNameTwice) {
  GgufWriter keys;
  keys.add_uint("key", 1);
  keys.add_uint("key", 2);
  expect_error(keys.bytes(), "expected each metadata key once");
  GgufWriter tensors;
  tensors.add_floats("weight", {1}, {1});
  tensors.add_floats("weight", {1}, {1});
  expect_error(tensors.bytes(), "expected each tensor once");
}

// Each byte before the data changed in several ways: whatever comes of it, everything that reads a
// model's file takes it or throws an exception of its own. (std::bad_alloc would be a huge
// allocation.)
TEST(GgufCorruption, AnyByteChanged) {
  GgufWriter writer = tiny_model_writer();
  add_tiny_tokenizer(writer, "smollm");
  writer.add_string("tokenizer.chat_template", "{{'<|im_start|>' + x + '<|im_end|>'}}");
  const auto bytes = writer.bytes();
  const std::size_t end = find_text(bytes, "blk.1.ffn_down.weight") + 64;
  const auto read_all = [](const std::vector<std::byte>& changed) {
    const GgufFile file = GgufFile::parse(changed, "changed");
    const ModelConfig config = ModelConfig::read(file);
    const Tokenizer tokenizer(file);
    const ChatTemplate chat(file);
    const ChatMessage message{"user", "hello"};
    return tokenizer.encode(chat.render({&message, 1})).size() +
           static_cast<std::size_t>(config.vocab_size);
  };
  EXPECT_GT(read_all(bytes), 0U);
  std::size_t refused = 0;
  for (std::size_t i = 0; i < end; ++i) {
    for (const std::uint8_t flip : {0x01, 0x80, 0xFF}) {
      auto changed = bytes;
      changed[i] ^= static_cast<std::byte>(flip);
      try {
        read_all(changed);
      } catch (const ModelError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, end / 2);
}

}  // namespace
}  // namespace quire::llm
