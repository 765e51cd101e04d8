#include "pretokenizer.h"

#include <array>
#include <memory>
#include <stdexcept>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace quire::llm {
namespace {

constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3 =
    R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kSingleDigits = R"(\p{N})";

struct Definition {
  const char* name;
  std::array<const char*, 2> patterns;  // null: none
  bool ignores_merges;
};

constexpr Definition kDefinitions[] = {
    {"smollm", {kSingleDigits, kGpt2}, false}, {"gpt-2", {kGpt2, nullptr}, false},
    {"llama-bpe", {kLlama3, nullptr}, true},   {"llama3", {kLlama3, nullptr}, true},
    {"qwen2", {kQwen2, nullptr}, false},
};

const Definition* find(std::string_view name) {
  for (const Definition& definition : kDefinitions) {
    if (name == definition.name) return &definition;
  }
  return nullptr;
}

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 128> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

}  // namespace

class PreTokenizer::Regex {
 public:
  explicit Regex(const char* pattern) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    // UCP: \s means what Unicode calls white space, as the original tokenizers have it.
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    if (!code_) throw std::runtime_error("pre-tokenizer: " + pcre2_message(error));
  }

  // Appends the matches in `text`, and what lies between them, to `pieces`.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const {
    const std::unique_ptr<pcre2_match_data, MatchDataDeleter> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    std::size_t done = 0;
    while (done < text.size()) {
      const int result =
          pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), done,
                      PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, match.get(), nullptr);
      if (result == PCRE2_ERROR_NOMATCH) break;
      if (result < 0) throw std::runtime_error("pre-tokenizer: " + pcre2_message(result));
      if (range[0] > done) pieces.push_back(text.substr(done, range[0] - done));
      pieces.push_back(text.substr(range[0], range[1] - range[0]));
      done = range[1];
    }
    if (done < text.size()) pieces.push_back(text.substr(done));
  }

 private:
  struct CodeDeleter {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  struct MatchDataDeleter {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  std::unique_ptr<pcre2_code, CodeDeleter> code_;
};

bool PreTokenizer::knows(std::string_view name) { return find(name) != nullptr; }

std::string PreTokenizer::known_names() {
  std::string names;
  for (const Definition& definition : kDefinitions) {
    names += (names.empty() ? "" : ", ") + std::string(definition.name);
  }
  return names;
}

PreTokenizer::PreTokenizer(std::string_view name) {
  const Definition* definition = find(name);
  if (definition == nullptr) {
    throw std::invalid_argument("pre-tokenizer: expected one of " + known_names() + ", got \"" +
                                std::string(name) + "\"");
  }
  for (const char* pattern : definition->patterns) {
    if (pattern != nullptr) regexes_.emplace_back(pattern);
  }
  ignores_merges_ = definition->ignores_merges;
}

PreTokenizer::~PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  for (const Regex& regex : regexes_) {
    std::vector<std::string_view> finer;
    for (const std::string_view piece : pieces) regex.split(piece, finer);
    pieces = std::move(finer);
  }
  return pieces;
}

}  // namespace quire::llm
