// How a conversation is spelled for a model. GGUF files carry a Jinja program for it; here its
// family is recognised and the same text is written directly.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "gguf.h"
#include "tokenizer.h"

namespace quire::llm {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

class ChatTemplate {
 public:
  // Reads "tokenizer.chat_template". Throws ModelError if there is none or it is neither ChatML nor
  // Llama 3's.
  explicit ChatTemplate(const GgufFile& file);

  // The conversation, up to where the assistant's next answer starts. Without a system message the
  // model's own default one is put first, if its template has one.
  std::vector<TextPiece> render(std::span<const ChatMessage> messages) const;

  const char* name() const { return family_ == Family::kChatMl ? "ChatML" : "Llama 3"; }

 private:
  enum class Family { kChatMl, kLlama3 };

  std::vector<TextPiece> render_chatml(std::span<const ChatMessage> messages) const;
  std::vector<TextPiece> render_llama3(std::span<const ChatMessage> messages) const;

  Family family_ = Family::kChatMl;
  std::string default_system_;   // ChatML; empty: none
  std::string system_preamble_;  // Llama 3.1 and later: stands before every system message
};

}  // namespace quire::llm
