// The campaign: random cases of every size in every mode, as many as there is time for. One case is
// named by its mode, its size, a seed and an index, on one backend.
#pragma once

#include <cstdint>
#include <string>

#include "conformance/case.h"
#include "quire/quire.h"

namespace quire::conformance {

enum class Mode : std::uint8_t {
  kPlain,      // attention against float64, twice
  kInvariant,  // batch-invariant: a sequence alone and in other company has the same bits
  kCascade,    // shared prefixes, announced and found, against float64 and against plain attention
  kGraph,      // a captured graph, or a plan used again, serves batches of other compositions
  kStreams,    // two plans at the same time give what each gives alone
  kWrite,      // cache writes of many tokens, some with one slot for two of them
  kWild,       // index tensors full of garbage: nothing outside the outputs is touched
};
enum class Size : std::uint8_t {
  kSmall,  // some million multiply-adds
  kLarge,  // what fills the device; samples are compared, everything is scanned
};

inline constexpr Mode kModes[] = {Mode::kPlain,   Mode::kInvariant, Mode::kCascade, Mode::kGraph,
                                  Mode::kStreams, Mode::kWrite,     Mode::kWild};
const char* to_string(Mode mode);
const char* to_string(Size size);

struct CampaignCase {
  Mode mode = Mode::kPlain;
  Size size = Size::kSmall;
  std::uint64_t seed = 1;
  std::int64_t index = 0;
};

// Draws mode and size of case `index`: `large_share` in a hundred are large. Small cases are the
// plain ones of random_spec() nine times out of ten.
CampaignCase draw_campaign_case(std::uint64_t seed, std::int64_t index, int large_share);

// draw_large.cc: what a large case, or a small one of another mode than plain, is made of.
CaseSpec campaign_spec(const CampaignCase& which, const AttentionBackend& backend);

// Runs it; "" or what is wrong, ending with the line that reproduces it.
std::string run_campaign_case(const CampaignCase& which, const AttentionBackend& backend);

// A case by hand, judged like a large one: samples of the rows against float64, everything scanned,
// `repeats` more runs of the same bits.
std::string run_sampled(Case c, const AttentionBackend& backend, int repeats);

}  // namespace quire::conformance
