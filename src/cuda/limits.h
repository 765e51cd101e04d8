// Bounds that host and device code share.
#pragma once

namespace quire::cuda {

inline constexpr int kMaxGrid = 1024;  // CTAs of an attention kernel

}  // namespace quire::cuda
