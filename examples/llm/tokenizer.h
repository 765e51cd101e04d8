// Byte-level byte-pair encoding (Sennrich et al., 2016; GPT-2), set up from the metadata of a GGUF
// file.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gguf.h"
#include "pretokenizer.h"

namespace quire::llm {

// A part of a prompt. Only in `markup` are special tokens such as <|im_end|> recognised: a user who
// types one gets its letters, and cannot end a turn that way.
struct TextPiece {
  std::string text;
  bool markup = false;
};

class Tokenizer {
 public:
  // Throws ModelError if the file's tokenizer is of another kind or damaged.
  explicit Tokenizer(const GgufFile& file);

  // The pieces as one text: merges go across their borders. Invalid UTF-8 becomes U+FFFD.
  std::vector<std::int32_t> encode(std::span<const TextPiece> pieces) const;
  std::vector<std::int32_t> encode(std::string_view text, bool markup = true) const;

  // The bytes of a token, which need not be whole characters: see Utf8Stream. Control tokens such
  // as <|im_end|> stand for nothing that is shown.
  std::string_view bytes(std::int32_t token) const { return bytes_[checked(token)]; }

  // Whether the model says with this token that its answer is complete.
  bool ends_answer(std::int32_t token) const { return ends_answer_[checked(token)]; }

  // The beginning-of-sequence token, if prompts are to start with one; else -1.
  std::int32_t bos_to_add() const { return bos_to_add_; }

  std::int32_t size() const { return static_cast<std::int32_t>(bytes_.size()); }

 private:
  struct Merge {
    std::int32_t rank;
    std::int32_t result;
  };
  struct SpecialToken {
    std::string_view text;
    std::int32_t id;
  };

  void add_tokens(const GgufFile& file);
  void add_merges(const GgufFile& file);
  void find_end_tokens(const GgufFile& file);

  std::size_t checked(std::int32_t token) const;
  const SpecialToken* special_at(std::string_view text) const;
  void encode_plain(const std::string& text, std::vector<std::int32_t>& tokens) const;
  void encode_word(std::string_view word, std::vector<std::int32_t>& tokens) const;

  GgufFile file_;  // keeps alive what the string_views below point into
  PreTokenizer pretokenizer_;
  std::unordered_map<std::string_view, std::int32_t> ids_;  // spelled as in the file
  std::vector<std::string> bytes_;
  std::vector<bool> ends_answer_;
  std::unordered_map<std::uint64_t, Merge> merges_;           // key: left id << 32 | right id
  std::unordered_map<std::string_view, std::int32_t> words_;  // by bytes, for ignores_merges()
  std::array<std::int32_t, 256> byte_tokens_{};
  std::array<std::vector<SpecialToken>, 256> special_;  // by first byte, longest first
  std::int32_t bos_to_add_ = -1;
};

}  // namespace quire::llm
