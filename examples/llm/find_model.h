// Where the model file is, if the command line does not say.
#pragma once

#include <filesystem>
#include <string>

namespace quire::llm {

// The file `given`; if that is empty, the one that the environment variable QUIRE_MODEL names; else
// the one that scripts/fetch_model.sh puts below the repository's root, looked for from the current
// folder and from the program's own folder upwards. Throws std::runtime_error if there is none,
// saying how to get it.
std::filesystem::path find_model(const std::string& given);

}  // namespace quire::llm
