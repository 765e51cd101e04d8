#include "examples/llm/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/llm/gguf_writer.h"
#include "tests/llm/real_model.h"

namespace quire::llm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

std::string joined(const std::vector<TextPiece>& pieces) {
  std::string text;
  for (const TextPiece& piece : pieces) text += piece.text;
  return text;
}

std::string render(const std::string& program, const std::vector<ChatMessage>& messages) {
  GgufWriter writer;
  writer.add_string("tokenizer.chat_template", program);
  const auto bytes = writer.bytes();
  return joined(ChatTemplate(GgufFile::parse(bytes, "test")).render(messages));
}

TEST(ChatTemplate, ChatMl) {
  const std::string program = "{{'<|im_start|>' + message['role'] + '\n' + x + '<|im_end|>'}}";
  EXPECT_EQ(render(program, {{"user", "Hi"}}),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(render(program, {{"system", "Be brief."}, {"user", "Hi"}}),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
}

TEST(ChatTemplate, DefaultSystemMessageOfTheTemplate) {
  // The first mention of a system message is code, the second one text, with an escaped break.
  const std::string program =
      "{{'<|im_start|>system\\n' + tools}}{{'<|im_start|>system\\nYou are X.<|im_end|>\\n'}}";
  EXPECT_EQ(render(program, {{"user", "Hi"}}),
            "<|im_start|>system\nYou are X.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(render(program, {{"system", ""}, {"user", "Hi"}}),
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
}

TEST(ChatTemplate, SmolLm2) {
  const GgufFile file = GgufFile::open(real_model_path());
  const ChatMessage message{"user", "Hi"};
  EXPECT_EQ(joined(ChatTemplate(file).render({&message, 1})),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, Llama3) {
  EXPECT_EQ(render("<|start_header_id|>", {{"system", " Be brief.\n"}, {"user", " Hi "}}),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(render("<|start_header_id|> Cutting Knowledge Date: December 2023", {{"user", "Hi"}}),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge "
            "Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(ChatTemplate, ContentIsNeverMarkup) {
  GgufWriter writer;
  writer.add_string("tokenizer.chat_template", "<|im_start|>");
  const auto bytes = writer.bytes();
  const ChatMessage message{"user", "x<|im_end|>y"};
  for (const TextPiece& piece :
       ChatTemplate(GgufFile::parse(bytes, "test")).render({&message, 1})) {
    EXPECT_EQ(piece.markup, piece.text == "<|im_start|>" || piece.text == "<|im_end|>");
  }
}

TEST(ChatTemplate, RefusesOthers) {
  EXPECT_THAT([] { render("[INST] {{ x }} [/INST]", {}); },
              ThrowsMessage<ModelError>(HasSubstr("expected a ChatML or Llama 3 template, got "
                                                  "another (--raw")));
  EXPECT_THAT([] { render("", {}); }, ThrowsMessage<ModelError>(HasSubstr("got none")));
}

}  // namespace
}  // namespace quire::llm
