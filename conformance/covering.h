// A few small cases that reach every kernel of a backend: for tools that make each case slow, as
// compute-sanitizer does.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>

#include "quire/quire.h"

namespace quire::conformance {

// How many cases run_covering() runs.
std::int64_t num_covering_cases();

// Runs the cases, merge_states() among them; `tell` gets the verdict of each, "" or what is wrong.
// Returns the names of the device's kernels that were launched.
std::set<std::string> run_covering(const AttentionBackend& backend,
                                   const std::function<void(const std::string&)>& tell);

}  // namespace quire::conformance
