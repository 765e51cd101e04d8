// What a case must give, in float64: by a literal transcription of semantics.md that shares nothing
// with src/, and by the library's own backend "reference".
#pragma once

#include <cstdint>
#include <vector>

#include "conformance/case.h"

namespace quire::conformance {

struct Expected {
  std::int64_t num_rows = 0, num_heads = 0, head_size_v = 0;
  std::vector<bool> written;   // [num_rows]: belongs to a sequence and is < num_actual_tokens
  std::vector<double> output;  // [num_rows, num_heads, head_size_v], before output quantisation
  std::vector<double> lse;     // [num_heads, num_rows]

  double* out(std::int64_t row, std::int64_t head) {
    return output.data() + (row * num_heads + head) * head_size_v;
  }
  const double* out(std::int64_t row, std::int64_t head) const {
    return output.data() + (row * num_heads + head) * head_size_v;
  }
};

// Rows that belong to a sequence and are < num_actual_tokens.
std::vector<bool> written_rows(const Case& c);

// Zero results of the right size, and which rows are written.
Expected empty_expected(const Case& c);

// Whether row i of sequence s sees the sequence's key j < seq_len (step 3 of the score).
bool is_visible(const Case& c, std::int64_t s, std::int64_t i, std::int64_t j);

// Heads [first_head, first_head + count), all of one kv head, of row i of sequence s.
struct RowOfHeads {
  std::vector<double> output;  // [count, head_size_v], before output quantisation
  std::vector<double> lse;     // [count]
};
struct RowPlace {
  std::int64_t s, i, first_head, count;
};
// One row of literal_attention(), which reads nothing but the keys that the row sees: what a test
// of a batch with more keys than float64 could attend to all of compares samples with.
RowOfHeads literal_row(const Case& c, const RowPlace& place);

// semantics.md, transcribed.
Expected literal_attention(const Case& c);

}  // namespace quire::conformance
