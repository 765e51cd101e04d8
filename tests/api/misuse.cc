#include "tests/api/misuse.h"

#include <fstream>
#include <regex>

namespace quire {
namespace {

// The public C++ headers, their comments taken out.
std::string read_headers() {
  std::string text;
  for (const char* name :
       {"types", "kv_cache", "mask", "score", "metadata", "attention", "backend"}) {
    std::ifstream header(std::string(QUIRE_SOURCE_DIR "/include/quire/") + name + ".h");
    for (std::string line; std::getline(header, line);) {
      text += line.substr(0, line.find("//")) + "\n";
    }
  }
  return text;
}

// The rule at quire::Error: an identifier of the headers, "kv_cache." ahead of the cache's members
// and of nothing else, an index behind.
bool is_spelled_as_in_the_headers(const std::string& argument) {
  static const std::string headers = read_headers();
  static const std::regex rule(R"((kv_cache\.)?([A-Za-z_]+)(\[[0-9]+\])*)");
  std::smatch parts;
  if (!std::regex_match(argument, parts, rule)) return false;
  return std::regex_search(headers, std::regex("\\b" + parts[2].str() + "\\b"));
}

}  // namespace

std::string argument_named_by(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_TRUE(is_spelled_as_in_the_headers(error.argument())) << what;
    EXPECT_EQ(what.rfind(error.argument() + ": expected ", 0), 0U) << what;
    EXPECT_NE(what.find(", got "), std::string::npos) << what;
    return error.argument();
  }
  return "(no error)";
}

}  // namespace quire
