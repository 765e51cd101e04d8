#include "chat_template.h"

#include <string_view>

namespace quire::llm {
namespace {

constexpr std::string_view kStart = "<|im_start|>";
constexpr std::string_view kEnd = "<|im_end|>";

// A ChatML template that supplies a system message has it as a literal
// '<|im_start|>system\nYou are ...<|im_end|>', with a real line break or an escaped one.
std::string find_default_system(std::string_view program) {
  const std::string opening = std::string(kStart) + "system";
  for (std::size_t at = program.find(opening); at != std::string_view::npos;
       at = program.find(opening, at + 1)) {
    std::string_view rest = program.substr(at + opening.size());
    if (rest.starts_with("\n")) {
      rest.remove_prefix(1);
    } else if (rest.starts_with("\\n")) {
      rest.remove_prefix(2);
    } else {
      continue;
    }
    const std::string_view text = rest.substr(0, rest.find(kEnd));
    // Code rather than text: this occurrence is spelled together from variables.
    if (text.size() == rest.size() || text.find_first_of("'\"{}\\") != std::string_view::npos) {
      continue;
    }
    return std::string(text);
  }
  return {};
}

std::string trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\f\v";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(kSpace) - begin + 1));
}

}  // namespace

ChatTemplate::ChatTemplate(const GgufFile& file) {
  const std::string_view program = file.string_or("tokenizer.chat_template", "");
  if (program.find(kStart) != std::string_view::npos) {
    family_ = Family::kChatMl;
    default_system_ = find_default_system(program);
  } else if (program.find("<|start_header_id|>") != std::string_view::npos) {
    family_ = Family::kLlama3;
    // Llama 3.1's template; the date is the one it falls back to, so that answers do not depend on
    // the day.
    if (program.find("Cutting Knowledge Date: December 2023") != std::string_view::npos) {
      system_preamble_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    }
  } else {
    file.fail("key \"tokenizer.chat_template\": expected a ChatML or Llama 3 template, got " +
              std::string(program.empty() ? "none" : "another") +
              " (--raw passes prompts to the model as they are)");
  }
}

std::vector<TextPiece> ChatTemplate::render(std::span<const ChatMessage> messages) const {
  return family_ == Family::kChatMl ? render_chatml(messages) : render_llama3(messages);
}

std::vector<TextPiece> ChatTemplate::render_chatml(std::span<const ChatMessage> messages) const {
  std::vector<TextPiece> pieces;
  const auto add = [&](const std::string& role, const std::string& content) {
    pieces.push_back({std::string(kStart), true});
    pieces.push_back({role + "\n" + content, false});
    pieces.push_back({std::string(kEnd), true});
    pieces.push_back({"\n", false});
  };
  const bool has_system = !messages.empty() && messages.front().role == "system";
  if (!has_system && !default_system_.empty()) add("system", default_system_);
  for (const ChatMessage& message : messages) add(message.role, message.content);
  pieces.push_back({std::string(kStart), true});
  pieces.push_back({"assistant\n", false});
  return pieces;
}

std::vector<TextPiece> ChatTemplate::render_llama3(std::span<const ChatMessage> messages) const {
  std::vector<TextPiece> pieces{{"<|begin_of_text|>", true}};
  const auto open = [&](const std::string& role) {
    pieces.push_back({"<|start_header_id|>", true});
    pieces.push_back({role, false});
    pieces.push_back({"<|end_header_id|>", true});
    pieces.push_back({"\n\n", false});
  };
  const auto add = [&](const std::string& role, const std::string& content) {
    open(role);
    pieces.push_back({content, false});
    pieces.push_back({"<|eot_id|>", true});
  };
  const bool has_system = !messages.empty() && messages.front().role == "system";
  if (!has_system && !system_preamble_.empty()) add("system", system_preamble_);
  for (const ChatMessage& message : messages) {
    add(message.role, (message.role == "system" ? system_preamble_ : "") + trim(message.content));
  }
  open("assistant");
  return pieces;
}

}  // namespace quire::llm
