// The subcommands of `quire`, one file each. Each function adds its subcommand with options and a
// callback. A callback that fails throws: std::exception for an error to be told in one line
// (exit code 1), CLI::RuntimeError(code) where everything has been said already.
#pragma once

#include <CLI/CLI.hpp>

namespace quire::cli {

void add_info_command(CLI::App& app);
void add_verify_command(CLI::App& app);
void add_bench_command(CLI::App& app);

}  // namespace quire::cli
