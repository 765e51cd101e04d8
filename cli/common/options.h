// Options that several subcommands have, and checks that CLI11 lacks.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

namespace quire::cli {

// A whole number from 0 to 2^64 - 1 in decimal, and nothing else: CLI11 reads -1 as 2^64 - 1.
CLI::Option* add_seed_option(CLI::App& command, std::uint64_t& seed, const std::string& text);

// Refuses "": mostly a shell variable that is not set, which must not mean the default.
CLI::Validator not_empty();

// CLI::Range lets NaN through.
CLI::Validator number_in(double low, double high);

// All values of --kv-cache-dtype.
CLI::Validator kv_cache_dtype_name();

}  // namespace quire::cli
