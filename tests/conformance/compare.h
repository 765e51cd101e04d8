// Compares what a backend wrote with what it should have written, in the tolerances of semantics.md.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "tests/conformance/case.h"
#include "tests/conformance/expected.h"

namespace quire::conformance {

// The bytes of the output buffers after a call.
struct Actual {
  std::vector<std::byte> output;
  std::vector<std::byte> lse;
  std::vector<std::byte> output_block_scale;
};

// Relative Frobenius error that the case's dtypes grant.
double tolerance_of(const CaseSpec& spec);

// Empty if all is well, else what differs first and worst. `tolerance` 0: the case's own.
std::string compare(const Case& c, const Actual& actual, const Expected& expected,
                    double tolerance = 0);

// Empty if `now` equals `wanted`, but for NaN of float tensors in `views`, which may differ in sign
// and payload; else the first difference.
std::string compare_bytes(const std::vector<const Tensor*>& views,
                          const std::vector<std::byte>& now, const std::vector<std::byte>& wanted);

}  // namespace quire::conformance
