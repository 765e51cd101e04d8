// The model file that some tests need.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace quire::llm {

inline std::filesystem::path real_model_path() {
  const char* named = std::getenv("QUIRE_MODEL");
  const std::filesystem::path path = named != nullptr && *named != '\0' ? named
                                                                        : QUIRE_SOURCE_DIR
                                         "/.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error("this test needs " + path.string() +
                             ": run scripts/fetch_model.sh, which fetches it, or set QUIRE_MODEL");
  }
  return path;
}

inline nlohmann::json test_data(const std::string& name) {
  std::ifstream in(QUIRE_SOURCE_DIR "/tests/llm/data/" + name);
  return nlohmann::json::parse(in);
}

}  // namespace quire::llm
