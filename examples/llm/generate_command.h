// quire generate: a language model answers prompts through Quire's paged attention.
#pragma once

#include <CLI/CLI.hpp>

namespace quire::llm {

// Adds the subcommand to the application. Its callback throws std::exception on errors.
void add_generate_command(CLI::App& app);

}  // namespace quire::llm
