// The parts that build_case() is made of. Internal to the suite.
#pragma once

#include "tests/conformance/case.h"

namespace quire::conformance {

// Standard deviations of the entries; for Data::kExtreme the one non-zero entry.
struct Amplitude {
  double query;
  double key;
  double value;
};
Amplitude amplitude_of(const CaseSpec& spec);

// case_cache.cc: which block holds what, and K and V in them.
void make_block_table(Case* c, Rng* rng);
void make_cache(Case* c, Rng* rng);
void make_encoder_keys(Case* c, Rng* rng);

}  // namespace quire::conformance
