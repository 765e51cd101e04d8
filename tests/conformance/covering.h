// A few small cases that reach every kernel of a backend: for tools that make each case slow, as
// compute-sanitizer does.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "tests/conformance/case.h"

namespace quire::conformance {

std::vector<CaseSpec> covering_specs();

// Runs them and merge_states(); `tell` gets the verdict of each, "" or what is wrong. Returns the
// names of the device's kernels that were launched.
std::set<std::string> run_covering(const AttentionBackend& backend,
                                   const std::function<void(const std::string&)>& tell);

}  // namespace quire::conformance
