#include "cli/common/options.h"

#include <charconv>
#include <cstdio>
#include <string_view>
#include <system_error>

namespace quire::cli {
namespace {

// All of `text` as a number.
template <class T>
bool parse(std::string_view text, T* value) {
  const char* end = text.data() + text.size();
  const std::from_chars_result result = std::from_chars(text.data(), end, *value);
  return result.ec == std::errc() && result.ptr == end;
}

std::string shortest(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

CLI::Option* add_seed_option(CLI::App& command, std::uint64_t& seed, const std::string& text) {
  const auto read = [&seed](const std::string& given) {
    if (!parse(given, &seed)) {
      throw CLI::ValidationError(
          "--seed",
          "expected a whole number from 0 to 18446744073709551615, got \"" + given + "\"");
    }
  };
  return command.add_option_function<std::string>("--seed", read, text)
      ->type_name("UINT")
      ->default_str(std::to_string(seed));
}

CLI::Validator not_empty() {
  return {[](std::string& text) { return std::string(text.empty() ? "empty" : ""); }, ""};
}

CLI::Validator number_in(double low, double high) {
  const std::string range = shortest(low) + " to " + shortest(high);
  return {[=](std::string& text) {
            double value = 0.0;
            const bool fits = parse(text, &value) && value >= low && value <= high;
            return fits ? std::string() : "expected a number from " + range + ", got " + text;
          },
          "in [" + shortest(low) + " - " + shortest(high) + "]"};
}

CLI::Validator kv_cache_dtype_name() {
  return CLI::IsMember({"auto", "float16", "bfloat16", "float32", "fp8_e4m3", "fp8_e5m2",
                        "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"});
}

}  // namespace quire::cli
