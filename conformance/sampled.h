// Judging outputs too large to compute in float64: samples of the rows are, and all of it is
// scanned.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "conformance/case.h"
#include "conformance/compare.h"
#include "conformance/random.h"

namespace quire::conformance {

// No written row holds NaN (the poison of what was not written is NaN), everything else is
// untouched, and sampled rows are what literal_row() says: the ends and the middle of random
// sequences, and always some of the last sequence. "" or what is wrong.
std::string check_sampled(const Case& c, const Actual& actual, Rng* rng);

// What is promised of a slot that two tokens share.
enum class SharedSlot : std::uint8_t { kLastWins, kAnything };

// What this step's write must have made of the cache, given the cache's buffers as they are after
// it (in the order of cache_buffers()). The case's own buffers take over the written rows, so that
// attention is judged by what the cache holds.
std::string adopt_written(Case* c, const std::vector<std::vector<std::byte>>& after,
                          SharedSlot promise, Rng* rng);
// The views of the cache, one for each buffer.
std::vector<const Tensor*> cache_buffers(const Case& c);

}  // namespace quire::conformance
