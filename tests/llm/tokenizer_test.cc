// Tokens against those of an independent implementation; see data/make_tokenizer_cases.py.
#include "examples/llm/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/llm/gguf_writer.h"
#include "tests/llm/real_model.h"
#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::string decode(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens) {
  std::string text;
  for (const std::int32_t token : tokens) text += tokenizer.bytes(token);
  return text;
}

TEST(PreTokenizer, CutsAsHuggingFaceDoes) {
  const nlohmann::json all = test_data("tokenizer_cases.json").at("pieces");
  EXPECT_EQ(all.size(), 4U);
  for (const auto& [name, cases] : all.items()) {
    const PreTokenizer pre(name);
    for (const auto& item : cases) {
      const auto text = item.at("text").get<std::string>();
      std::vector<std::string> pieces;
      for (const std::string_view piece : pre.split(text)) pieces.emplace_back(piece);
      EXPECT_EQ(pieces, item.at("pieces").get<std::vector<std::string>>()) << name << ": " << text;
    }
  }
}

TEST(Tokenizer, EqualsHuggingFaceOnTheRealVocabulary) {
  const GgufFile file = GgufFile::open(real_model_path());
  const Tokenizer tokenizer(file);
  const nlohmann::json cases = test_data("tokenizer_cases.json").at("tokens");
  EXPECT_GT(cases.size(), 20U);
  for (const auto& item : cases) {
    const auto text = item.at("text").get<std::string>();
    const std::vector<std::int32_t> tokens = tokenizer.encode(text);
    EXPECT_EQ(tokens, item.at("ids").get<std::vector<std::int32_t>>()) << text;
    if (text.find("<|") == std::string::npos) {
      EXPECT_EQ(decode(tokenizer, tokens), text);
    }
  }
  EXPECT_TRUE(tokenizer.ends_answer(2));
  EXPECT_TRUE(tokenizer.ends_answer(0));
  EXPECT_FALSE(tokenizer.ends_answer(1));
  EXPECT_EQ(tokenizer.bos_to_add(), -1);
}

TEST(Tokenizer, MergesWithinAndAcrossPieces) {
  GgufWriter writer;
  add_tiny_tokenizer(writer);
  const auto bytes = writer.bytes();
  const Tokenizer tokenizer(GgufFile::parse(bytes, "tiny"));
  EXPECT_THAT(tokenizer.encode("hello"), ElementsAre(258, 'o'));
  EXPECT_THAT(tokenizer.encode("helhe"), ElementsAre(256, 'l', 256));
  const TextPiece split[] = {{"he", true}, {"ll", false}};
  EXPECT_THAT(tokenizer.encode(split), ElementsAre(258));
  EXPECT_EQ(decode(tokenizer, tokenizer.encode("\xC3\xA9\x01")), "\xC3\xA9\x01");
}

TEST(Tokenizer, UsersCannotWriteSpecialTokens) {
  GgufWriter writer;
  add_tiny_tokenizer(writer);
  const auto bytes = writer.bytes();
  const Tokenizer tokenizer(GgufFile::parse(bytes, "tiny"));
  EXPECT_THAT(tokenizer.encode("a<|im_end|>b"), ElementsAre('a', 260, 'b'));
  const std::vector<std::int32_t> plain = tokenizer.encode("a<|im_end|>b", false);
  EXPECT_EQ(plain.size(), 12U);
  EXPECT_EQ(decode(tokenizer, plain), "a<|im_end|>b");
  EXPECT_EQ(tokenizer.bytes(260), "");
  EXPECT_THROW(tokenizer.bytes(262), std::out_of_range);
  EXPECT_THROW(tokenizer.bytes(-1), std::out_of_range);
}

TEST(Tokenizer, LongWordsTakeNoSquareTime) {
  GgufWriter writer;
  add_tiny_tokenizer(writer);
  const auto bytes = writer.bytes();
  const Tokenizer tokenizer(GgufFile::parse(bytes, "tiny"));
  std::string word;
  for (int i = 0; i < 200000; ++i) word += "hell";
  EXPECT_EQ(tokenizer.encode(word), std::vector<std::int32_t>(200000, 258));
}

TEST(Tokenizer, Llama3AddsItsFirstToken) {
  GgufWriter writer;
  add_tiny_tokenizer(writer, "llama-bpe");
  const auto bytes = writer.bytes();
  EXPECT_EQ(Tokenizer(GgufFile::parse(bytes, "tiny")).bos_to_add(), 261);
}

TEST(Tokenizer, RefusesOtherKinds) {
  GgufWriter pre;
  add_tiny_tokenizer(pre, "deepseek-llm");
  const auto pre_bytes = pre.bytes();
  EXPECT_THAT([&] { Tokenizer(GgufFile::parse(pre_bytes, "tiny")); },
              ThrowsMessage<ModelError>(HasSubstr("\"tokenizer.ggml.pre\": expected one of smollm, "
                                                  "gpt-2, llama-bpe, llama3, qwen2, got "
                                                  "\"deepseek-llm\"")));
  GgufWriter model;
  model.add_string("tokenizer.ggml.model", "llama");
  const auto model_bytes = model.bytes();
  EXPECT_THAT([&] { Tokenizer(GgufFile::parse(model_bytes, "tiny")); },
              ThrowsMessage<ModelError>(HasSubstr("expected \"gpt2\" (byte-level BPE), got "
                                                  "\"llama\"")));
  GgufWriter merges;
  merges.add_string("tokenizer.ggml.model", "gpt2");
  merges.add_strings("tokenizer.ggml.tokens", {"a", "b"});
  merges.add_ints("tokenizer.ggml.token_type", {1, 1});
  merges.add_strings("tokenizer.ggml.merges", {"a b"});
  const auto merges_bytes = merges.bytes();
  EXPECT_THAT([&] { Tokenizer(GgufFile::parse(merges_bytes, "tiny")); },
              ThrowsMessage<ModelError>(HasSubstr("expected tokens of the vocabulary in merge 0")));
}

}  // namespace
}  // namespace quire::llm
