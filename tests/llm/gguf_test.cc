// Sound GGUF files: what is written is what is read.
#include "examples/llm/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "tests/llm/gguf_writer.h"

namespace quire::llm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

GgufWriter example() {
  GgufWriter writer;
  writer.add_uint("a.uint", 7);
  writer.add_float("a.float", 0.5F);
  writer.add_bool("a.bool", true);
  writer.add_string("a.string", "text");
  writer.add_strings("a.strings", {"one", "", "three"});
  writer.add_ints("a.ints", {1, -2, 3});
  writer.add_floats("first", {3}, {1, 2, 3});
  writer.add_floats("second", {2, 3}, {1, 2, 3, 4, 5, 6});
  return writer;
}

TEST(Gguf, ReadsMetadata) {
  const auto bytes = example().bytes();
  const GgufFile file = GgufFile::parse(bytes, "example");
  EXPECT_EQ(file.integer("a.uint"), 7);
  EXPECT_EQ(file.number("a.uint"), 7.0);
  EXPECT_EQ(file.number("a.float"), 0.5);
  EXPECT_TRUE(file.boolean_or("a.bool", false));
  EXPECT_EQ(file.string("a.string"), "text");
  EXPECT_THAT(file.strings("a.strings"), ElementsAre("one", "", "three"));
  EXPECT_THAT(file.integers("a.ints"), ElementsAre(1, -2, 3));
  EXPECT_EQ(file.integer_or("missing", 5), 5);
  EXPECT_EQ(file.string_or("missing", "none"), "none");
}

TEST(Gguf, ReadsTensors) {
  const auto bytes = example().bytes();
  const GgufFile file = GgufFile::parse(bytes, "example");
  ASSERT_EQ(file.tensors().size(), 2U);
  const GgufTensor& tensor = file.tensor("second", {2, 3});
  EXPECT_EQ(tensor.num_rows(), 3);
  ASSERT_EQ(tensor.data.size(), 6 * sizeof(float));
  float last = 0;
  std::memcpy(&last, tensor.data.data() + 20, sizeof(last));
  EXPECT_EQ(last, 6.0F);
  EXPECT_EQ(file.find_tensor("third"), nullptr);
}

TEST(Gguf, OpensFiles) {
  const auto path = std::filesystem::path(testing::TempDir()) / "quire_gguf_test.gguf";
  const auto bytes = example().bytes();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  EXPECT_EQ(GgufFile::open(path).integer("a.uint"), 7);
  std::filesystem::remove(path);
}

TEST(Gguf, SaysWhyAFileCannotBeOpened) {
  EXPECT_THAT([] { GgufFile::open("/nowhere/model.gguf"); },
              ThrowsMessage<ModelError>(HasSubstr("/nowhere/model.gguf: cannot open")));
  EXPECT_THAT([] { GgufFile::open(testing::TempDir()); },
              ThrowsMessage<ModelError>(HasSubstr("expected a GGUF file")));
}

TEST(Gguf, SaysWhatIsMissingOrOfAnotherKind) {
  const auto bytes = example().bytes();
  const GgufFile file = GgufFile::parse(bytes, "example");
  EXPECT_THAT([&] { file.integer("none"); },
              ThrowsMessage<ModelError>("example: expected the metadata key \"none\", got a file "
                                        "without it"));
  EXPECT_THAT([&] { file.integer("a.string"); },
              ThrowsMessage<ModelError>(HasSubstr("key \"a.string\": expected an integer")));
  EXPECT_THAT([&] { file.strings("a.ints"); },
              ThrowsMessage<ModelError>(HasSubstr("an array of strings")));
  EXPECT_THAT([&] { file.tensor("none", {1}); },
              ThrowsMessage<ModelError>(HasSubstr("expected a tensor \"none\"")));
  EXPECT_THAT(
      [&] {
        file.tensor("second", {3, 2});
      },
      ThrowsMessage<ModelError>(HasSubstr("expected shape [3, 2], got [2, 3]")));
}

}  // namespace
}  // namespace quire::llm
