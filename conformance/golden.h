// Stored cases of vLLM's Triton kernel: they pin the meaning of semantics.md to the system that
// this project re-creates. tests/golden/README.md describes the files.
#pragma once

#include <string>
#include <vector>

#include "conformance/case.h"
#include "conformance/expected.h"
#include "quire/quire.h"

namespace quire::conformance {

struct GoldenCase {
  std::string name;     // "triton_seed101_0.safetensors/009 fp8_kv"
  std::string problem;  // why it cannot be run ("unknown field X"); then the rest is not there
  Case inputs;          // key and value, if stored: row i was written to slot i
  Expected expected;
  double tolerance = 0;   // of elements, and of the whole output
  double most_error = 0;  // > 0: of the whole output, as relative Frobenius error
};

// Throws std::runtime_error on files that are not what they should be. A case with a field, a
// tensor or a dtype that this reader does not know has a `problem`: run without it, it would be
// another case.
std::vector<GoldenCase> read_golden(const std::string& path);

// Runs the stored cache write, where there is one, and attention. "" or what is wrong, `problem`
// first.
std::string run_golden(const GoldenCase& golden, const AttentionBackend& backend);

}  // namespace quire::conformance
