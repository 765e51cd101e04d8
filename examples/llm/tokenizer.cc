#include "tokenizer.h"

#include <algorithm>
#include <queue>
#include <stdexcept>

#include "utf8.h"

namespace quire::llm {
namespace {

// Values of "tokenizer.ggml.token_type" that matter here.
constexpr std::int64_t kControl = 3;
constexpr std::int64_t kUserDefined = 4;

// GPT-2 spells each byte as one printable character: itself where it is printable, else the next
// free one from U+0100 on.
std::array<char32_t, 256> make_byte_alphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

const std::array<char32_t, 256>& byte_alphabet() {
  static const std::array<char32_t, 256> alphabet = make_byte_alphabet();
  return alphabet;
}

// The bytes that a token of the vocabulary spells; characters outside the alphabet stay.
std::string spelled_bytes(std::string_view token) {
  static const auto bytes = [] {
    std::array<int, 0x180> table{};
    table.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      table[byte_alphabet()[static_cast<std::size_t>(byte)]] = byte;
    }
    return table;
  }();
  const std::string valid = sanitize_utf8(token);
  std::string out;
  for (std::string_view rest = valid; !rest.empty();) {
    const char32_t c = pop_utf8(rest);
    if (c < bytes.size() && bytes[c] >= 0) {
      out += static_cast<char>(bytes[c]);
    } else {
      append_utf8(c, out);
    }
  }
  return out;
}

std::uint64_t merge_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
}

PreTokenizer make_pretokenizer(const GgufFile& file) {
  const std::string_view model = file.string("tokenizer.ggml.model");
  if (model != "gpt2") {
    file.fail("key \"tokenizer.ggml.model\": expected \"gpt2\" (byte-level BPE), got \"" +
              std::string(model) + "\"");
  }
  // Files older than the key have GPT-2's.
  const std::string_view pre = file.string_or("tokenizer.ggml.pre", "gpt-2");
  if (!PreTokenizer::knows(pre)) {
    file.fail("key \"tokenizer.ggml.pre\": expected one of " + PreTokenizer::known_names() +
              ", got \"" + std::string(pre) + "\"");
  }
  return PreTokenizer(pre);
}

}  // namespace

Tokenizer::Tokenizer(const GgufFile& file) : file_(file), pretokenizer_(make_pretokenizer(file)) {
  add_tokens(file_);
  add_merges(file_);
  find_end_tokens(file_);
  if (file_.boolean_or("tokenizer.ggml.add_bos_token", pretokenizer_.ignores_merges())) {
    const std::int64_t bos = file_.integer("tokenizer.ggml.bos_token_id");
    if (bos < 0 || bos >= size()) {
      file_.fail("key \"tokenizer.ggml.bos_token_id\": expected a token below " +
                 std::to_string(size()) + ", got " + std::to_string(bos));
    }
    bos_to_add_ = static_cast<std::int32_t>(bos);
  }
}

void Tokenizer::add_tokens(const GgufFile& file) {
  const auto& tokens = file.strings("tokenizer.ggml.tokens");
  const auto& types = file.integers("tokenizer.ggml.token_type");
  if (tokens.empty() || tokens.size() > (1U << 24) || types.size() != tokens.size()) {
    file.fail("expected 1 to 2^24 tokens, each with a type, got " + std::to_string(tokens.size()) +
              " tokens and " + std::to_string(types.size()) + " types");
  }
  ids_.reserve(tokens.size());
  bytes_.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto id = static_cast<std::int32_t>(i);
    const std::string_view text = tokens[i];
    const bool special = types[i] == kControl || types[i] == kUserDefined;
    ids_.emplace(text, id);
    bytes_.push_back(types[i] == kControl       ? std::string()
                     : types[i] == kUserDefined ? sanitize_utf8(text)
                                                : spelled_bytes(text));
    if (special && !text.empty()) {
      special_[static_cast<unsigned char>(text[0])].push_back({text, id});
    }
    if (!special && pretokenizer_.ignores_merges()) words_.emplace(bytes_.back(), id);
  }
  for (auto& list : special_) {
    std::stable_sort(list.begin(), list.end(), [](const SpecialToken& a, const SpecialToken& b) {
      return a.text.size() > b.text.size();
    });
  }
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::string spelled;
    append_utf8(byte_alphabet()[byte], spelled);
    const auto it = ids_.find(spelled);
    byte_tokens_[byte] = it == ids_.end() ? -1 : it->second;
  }
}

void Tokenizer::add_merges(const GgufFile& file) {
  const auto& merges = file.strings("tokenizer.ggml.merges");
  merges_.reserve(merges.size());
  std::string joined;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const std::size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos) {
      file.fail("key \"tokenizer.ggml.merges\": expected two words in merge " + std::to_string(i) +
                ", got one");
    }
    joined.assign(merge.substr(0, space)).append(merge.substr(space + 1));
    const auto left = ids_.find(merge.substr(0, space));
    const auto right = ids_.find(merge.substr(space + 1));
    const auto result = ids_.find(joined);
    if (left == ids_.end() || right == ids_.end() || result == ids_.end()) {
      file.fail("key \"tokenizer.ggml.merges\": expected tokens of the vocabulary in merge " +
                std::to_string(i) + ", got others");
    }
    merges_.emplace(merge_key(left->second, right->second),
                    Merge{static_cast<std::int32_t>(i), result->second});
  }
}

// The file's own end tokens, and those that models of these families end a turn with although their
// files do not always say so. (llama.cpp keeps the same list.)
void Tokenizer::find_end_tokens(const GgufFile& file) {
  ends_answer_.assign(bytes_.size(), false);
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const std::int64_t id = file.integer_or(key, -1);
    if (id >= 0 && id < size()) ends_answer_[static_cast<std::size_t>(id)] = true;
  }
  for (const char* text :
       {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}) {
    for (const SpecialToken& token : special_['<']) {
      if (token.text == text) ends_answer_[static_cast<std::size_t>(token.id)] = true;
    }
  }
}

std::size_t Tokenizer::checked(std::int32_t token) const {
  if (token < 0 || token >= size()) {
    throw std::out_of_range("token: expected one below " + std::to_string(size()) + ", got " +
                            std::to_string(token));
  }
  return static_cast<std::size_t>(token);
}

const Tokenizer::SpecialToken* Tokenizer::special_at(std::string_view text) const {
  for (const SpecialToken& token : special_[static_cast<unsigned char>(text[0])]) {
    if (text.starts_with(token.text)) return &token;
  }
  return nullptr;
}

std::vector<std::int32_t> Tokenizer::encode(std::span<const TextPiece> pieces) const {
  std::vector<std::int32_t> tokens;
  std::string plain;
  for (const TextPiece& piece : pieces) {
    if (!piece.markup) {
      plain += piece.text;
      continue;
    }
    const std::string_view text = piece.text;
    for (std::size_t i = 0; i < text.size();) {
      const SpecialToken* special = special_at(text.substr(i));
      if (special == nullptr) {
        plain += text[i++];
        continue;
      }
      encode_plain(plain, tokens);
      plain.clear();
      tokens.push_back(special->id);
      i += special->text.size();
    }
  }
  encode_plain(plain, tokens);
  return tokens;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool markup) const {
  const TextPiece piece{std::string(text), markup};
  return encode(std::span(&piece, 1));
}

void Tokenizer::encode_plain(const std::string& text, std::vector<std::int32_t>& tokens) const {
  const std::string valid = sanitize_utf8(text);
  for (const std::string_view word : pretokenizer_.split(valid)) {
    if (pretokenizer_.ignores_merges()) {
      if (const auto it = words_.find(word); it != words_.end()) {
        tokens.push_back(it->second);
        continue;
      }
    }
    encode_word(word, tokens);
  }
}

// Starts from single bytes and applies the merge of lowest rank, leftmost first, until none is
// left. A queue of possible merges keeps long words at O(n log n).
void Tokenizer::encode_word(std::string_view word, std::vector<std::int32_t>& tokens) const {
  struct Symbol {
    std::int32_t token;  // -1: merged into its left neighbour
    int previous;
    int next;
  };
  struct Candidate {
    std::int32_t rank;
    int left;
    int right;
    std::int32_t left_token;
    std::int32_t right_token;
    std::int32_t result;
    bool operator<(const Candidate& other) const {  // the queue's top is its largest
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  std::vector<Symbol> symbols;
  for (const char c : word) {
    const std::int32_t token = byte_tokens_[static_cast<unsigned char>(c)];
    if (token < 0) continue;  // as other implementations do: such a vocabulary cannot spell it
    const int index = static_cast<int>(symbols.size());
    if (index > 0) symbols.back().next = index;
    symbols.push_back({token, index - 1, -1});
  }
  std::priority_queue<Candidate> queue;
  const auto consider = [&](int left, int right) {
    if (left < 0 || right < 0) return;
    const std::int32_t a = symbols[static_cast<std::size_t>(left)].token;
    const std::int32_t b = symbols[static_cast<std::size_t>(right)].token;
    if (const auto it = merges_.find(merge_key(a, b)); it != merges_.end()) {
      queue.push({it->second.rank, left, right, a, b, it->second.result});
    }
  };
  for (int i = 1; i < static_cast<int>(symbols.size()); ++i) consider(i - 1, i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<std::size_t>(top.left)];
    Symbol& right = symbols[static_cast<std::size_t>(top.right)];
    // Stale if either side has been merged since; tokens only grow, so comparing them is enough.
    if (left.token != top.left_token || right.token != top.right_token) continue;
    left.token = top.result;
    right.token = -1;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<std::size_t>(right.next)].previous = top.left;
    consider(left.previous, top.left);
    consider(top.left, left.next);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.token >= 0) tokens.push_back(symbol.token);
  }
}

}  // namespace quire::llm
