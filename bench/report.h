// A benchmark's report as a table for people and as JSON for programs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "bench/bench.h"

namespace quire::bench {

// The header lines with machine and limits, a line for each workload, geometric means.
std::string to_table(const Report& report);

// Everything, all samples included; bench/compare/README.md describes it.
nlohmann::ordered_json to_json(const Report& report);

}  // namespace quire::bench
