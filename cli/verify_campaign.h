// The part of `quire verify` that runs the campaign of conformance/campaign.h.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "quire/quire.h"

namespace quire::cli {

struct CampaignOptions {
  bool campaign = false;
  std::string mode;  // "": drawn for each case
  std::string size = "large";
  int large_share = 10;
  std::int64_t first = 0;
  double seconds = 0;

  bool wanted() const { return campaign || !mode.empty(); }
};

void add_campaign_options(CLI::App* command, CampaignOptions* options);

// Memory that the cases lie in; before a backend is used.
void prepare_campaign(const CampaignOptions& options);

// Cases [first, first + cases), or the one case, of a seed. Prints failures as they come, and how
// many cases of each kind ran. Throws CLI::RuntimeError if one failed.
void verify_campaign(const AttentionBackend& backend, const CampaignOptions& options,
                     std::uint64_t seed, std::int64_t cases, std::int64_t only_case);

}  // namespace quire::cli
