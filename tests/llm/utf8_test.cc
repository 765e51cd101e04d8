#include "examples/llm/utf8.h"

#include <gtest/gtest.h>

namespace quire::llm {
namespace {

constexpr const char* kBad = "\xEF\xBF\xBD";

TEST(Utf8Stream, HoldsBackUntilACharacterIsComplete) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.push("\x99"), "");
  EXPECT_EQ(stream.push("\x82z"), "\xF0\x9F\x99\x82z");
  EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8Stream, ByteByByteIsTheSame) {
  const std::string text = "h\xC3\xA9 \xE6\x97\xA5\xE6\x9C\xAC \xF0\x9F\x99\x82";
  Utf8Stream stream;
  std::string out;
  for (const char c : text) out += stream.push(std::string_view(&c, 1));
  EXPECT_EQ(out + stream.finish(), text);
}

TEST(Utf8Stream, IncompleteEndIsReplacedOnce) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("x\xE6\x97"), "x");
  EXPECT_EQ(stream.finish(), kBad);
  EXPECT_EQ(stream.finish(), "");
}

// Expected values are Python's bytes.decode(errors="replace").
TEST(Utf8Stream, InvalidPartsAreReplaced) {
  const std::string bad = kBad;
  EXPECT_EQ(sanitize_utf8("a\xFF"
                          "b"),
            "a" + bad + "b");
  EXPECT_EQ(sanitize_utf8("\x80\x80"), bad + bad);
  EXPECT_EQ(sanitize_utf8("\xC0\xAF"), bad + bad);            // overlong
  EXPECT_EQ(sanitize_utf8("\xE0\x80\x80"), bad + bad + bad);  // overlong
  EXPECT_EQ(sanitize_utf8("\xED\xA0\x80"), bad + bad + bad);  // surrogate
  EXPECT_EQ(sanitize_utf8("\xF4\x90\x80\x80"), bad + bad + bad + bad);
  EXPECT_EQ(sanitize_utf8("\xE6\x97"
                          "a"),
            bad + "a");
  EXPECT_EQ(sanitize_utf8("\xE6\x97\xC3\xA9"), bad + "\xC3\xA9");
}

TEST(Utf8, CodePointsRoundTrip) {
  for (const char32_t c : {U'\0', U'a', U'\u007F', U'\u0080', U'\u07FF', U'\u0800', U'\uFFFD',
                           U'\U00010000', U'\U0010FFFF'}) {
    std::string text;
    append_utf8(c, text);
    EXPECT_EQ(sanitize_utf8(text), text);
    std::string_view rest = text;
    EXPECT_EQ(pop_utf8(rest), c);
    EXPECT_TRUE(rest.empty());
  }
}

}  // namespace
}  // namespace quire::llm
