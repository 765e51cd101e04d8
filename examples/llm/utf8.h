// Turns bytes that arrive in pieces into valid UTF-8. A token of a byte-level vocabulary may end in
// the middle of a character, and a model may also produce bytes that are no UTF-8 at all.
#pragma once

#include <string>
#include <string_view>

namespace quire::llm {

class Utf8Stream {
 public:
  // Returns what is complete by now. Each longest invalid part becomes one U+FFFD, as in Python's
  // errors="replace" and in browsers. An incomplete sequence at the end is held back.
  std::string push(std::string_view bytes);

  // Ends the stream: what was held back becomes one U+FFFD.
  std::string finish();

 private:
  std::string held_;          // the bytes so far of a sequence that is not complete
  int missing_ = 0;           // continuation bytes still to come
  unsigned char lowest_ = 0;  // range of the next continuation byte
  unsigned char highest_ = 0;
};

// The whole text at once.
std::string sanitize_utf8(std::string_view text);

// Appends the character; `code_point` is a valid one.
void append_utf8(char32_t code_point, std::string& out);

// Takes the first character off valid, non-empty UTF-8.
char32_t pop_utf8(std::string_view& text);

}  // namespace quire::llm
