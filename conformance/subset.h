// Other batches of a case's sequences over the same cache: what neighbours, places and padding must
// not change, and what a graph must serve.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "conformance/case.h"
#include "conformance/compare.h"
#include "conformance/random.h"

namespace quire::conformance {

struct SubsetPadding {
  std::int64_t sequences = 0;
  std::int64_t rows = 0;          // behind the last sequence's
  std::int64_t counted_rows = 0;  // of these
  std::int64_t leading_rows = 0;
};

// The sequences `chosen` of `c`, in that order. Shares the caches and the layer's tensors; outputs
// are new.
Case subset_of(const Case& c, const std::vector<std::int64_t>& chosen,
               const SubsetPadding& padding);

// Some of the sequences of `c` in another order, padded to the same shapes: what the buffers of a
// captured graph may hold. Its outputs are those of `c`.
Case shuffled(const Case& c, Rng* rng);

// The tensors that differ between batches of equal shapes, and what they hold in the other batch.
std::vector<std::pair<const Tensor*, const Tensor*>> batch_tensors(const Case& c,
                                                                   const Case& other);

// "" if the rows of the subset's sequences have the same bits in both results.
std::string same_rows(const Case& c, const Actual& whole, const Case& subset, const Actual& part,
                      const std::vector<std::int64_t>& chosen);

// "" if the elements of two results of a case are equal within twice the tolerance, and the same
// are NaN.
std::string compare_elements(const Case& c, const Actual& a, const Actual& b);

}  // namespace quire::conformance
