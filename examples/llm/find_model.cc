#include "find_model.h"

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <system_error>

namespace quire::llm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDefaultModel = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";

std::optional<fs::path> find_upwards(fs::path folder) {
  for (;;) {
    std::error_code ignored;
    fs::path candidate = folder / kDefaultModel;
    if (fs::is_regular_file(candidate, ignored)) return candidate;
    if (folder == folder.parent_path()) return std::nullopt;
    folder = folder.parent_path();
  }
}

}  // namespace

fs::path find_model(const std::string& given) {
  if (!given.empty()) return given;
  const char* named = std::getenv("QUIRE_MODEL");
  if (named != nullptr && *named != '\0') return named;
  std::error_code error;
  if (auto found = find_upwards(fs::current_path(error)); !error && found) return *found;
  const fs::path program = fs::canonical("/proc/self/exe", error);
  if (!error) {
    if (auto found = find_upwards(program.parent_path())) return *found;
  }
  throw std::runtime_error(
      "no model: expected --model FILE, the environment variable QUIRE_MODEL, or " +
      std::string(kDefaultModel) +
      " in this folder or above it. `make run` and scripts/fetch_model.sh in the repository fetch "
      "SmolLM2-135M-Instruct (92 MB)");
}

}  // namespace quire::llm
