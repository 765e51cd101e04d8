// Cuts text into the pieces within which byte-pair merges happen, by the regular expressions of the
// tokenizer that a GGUF file names in "tokenizer.ggml.pre".
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace quire::llm {

class PreTokenizer {
 public:
  // Whether `name` is one of the tokenizers known here, and their names for an error message.
  static bool knows(std::string_view name);
  static std::string known_names();

  // `name` must be known.
  explicit PreTokenizer(std::string_view name);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;

  // The pieces, in order; together they are the text. `text` must be valid UTF-8.
  std::vector<std::string_view> split(std::string_view text) const;

  // A word that is itself in the vocabulary becomes that token, whatever the merges say (Llama 3).
  bool ignores_merges() const { return ignores_merges_; }

 private:
  class Regex;
  std::vector<Regex> regexes_;  // each splits the pieces of the one before
  bool ignores_merges_ = false;
};

}  // namespace quire::llm
