// The parts that build_case() is made of. Internal to the suite.
#pragma once

#include "conformance/case.h"

namespace quire::conformance {

// Standard deviations of the entries; for Data::kExtreme the one non-zero entry.
struct Amplitude {
  double query;
  double key;
  double value;
};
Amplitude amplitude_of(const CaseSpec& spec);
Layout query_layout(const CaseSpec& spec, Rng* rng);
void make_outputs(Case* c, Rng* rng);

// case_random.cc: what random cases of every size draw; draw_features() needs the batch.
void draw_type(CaseSpec* spec, Rng* rng);
void draw_dtypes(CaseSpec* spec, Rng* rng);
void draw_head_sizes(CaseSpec* spec, Rng* rng);
void draw_heads(CaseSpec* spec, Rng* rng);
void draw_features(CaseSpec* spec, Rng* rng);
double work_of(const CaseSpec& spec);  // multiply-adds

// case_cache.cc: numbers that name no block, and the caches with the layout of the spec, poisoned.
std::int32_t wild_block(std::int64_t num_blocks, Rng* rng);
std::int32_t table_padding(std::int64_t num_blocks, Rng* rng);
void lay_out_cache(Case* c, std::int64_t num_blocks);

// case_large.cc: the same tensors for large cases.
void make_large_query(Case* c, Rng* rng);
void make_pooled_cache(Case* c, Rng* rng);
void make_large_encoder_keys(Case* c, Rng* rng);

// case_cache.cc: which block holds what, and K and V in them.
void make_block_table(Case* c, Rng* rng);
void make_cache(Case* c, Rng* rng);
void make_encoder_keys(Case* c, Rng* rng);

}  // namespace quire::conformance
