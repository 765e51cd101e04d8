// Compares what a backend wrote with what it should have written, in the tolerances of
// semantics.md.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "conformance/case.h"
#include "conformance/expected.h"

namespace quire::conformance {

// As a == b, at the speed of memcmp(), which vectors of std::byte do not have.
inline bool same_bytes(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

// The bytes of the output buffers after a call.
struct Actual {
  std::vector<std::byte> output;
  std::vector<std::byte> lse;
  std::vector<std::byte> output_block_scale;
  bool operator==(const Actual& other) const {
    return same_bytes(output, other.output) && same_bytes(lse, other.lse) &&
           same_bytes(output_block_scale, other.output_block_scale);
  }
};

// Relative Frobenius error that the case's dtypes grant.
double tolerance_of(const CaseSpec& spec);

// Empty if all is well, else what differs first and worst. `tolerance` 0: the case's own.
std::string compare(const Case& c, const Actual& actual, const Expected& expected,
                    double tolerance = 0);

// Samples of a large output: some heads of one row, its lse and block scales.
std::string compare_row(const Case& c, const Actual& actual, const RowPlace& place,
                        const RowOfHeads& wanted);
// Whether everything but the rows that are `written` still holds the poison.
std::string compare_untouched(const Case& c, const Actual& actual,
                              const std::vector<bool>& written);

// Bytes from the start of the buffer to a row's head.
std::int64_t output_offset(const Case& c, std::int64_t row, std::int64_t head);
std::int64_t lse_offset(const Case& c, std::int64_t row, std::int64_t head);

// Empty if `now` equals `wanted`, but for NaN of float tensors in `views`, which may differ in sign
// and payload; else the first difference.
std::string compare_bytes(const std::vector<const Tensor*>& views,
                          const std::vector<std::byte>& now, const std::vector<std::byte>& wanted);

}  // namespace quire::conformance
