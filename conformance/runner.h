// Runs cases on a backend and judges what it did.
#pragma once

#include <cstdint>
#include <string>

#include "conformance/case.h"
#include "conformance/compare.h"
#include "conformance/expected.h"
#include "quire/quire.h"

namespace quire::conformance {

// A case's tensors on a device, as the library's arguments.
class DeviceCase {
 public:
  DeviceCase(const Case& c, const AttentionBackend& backend);

  AttentionConfig config();
  CommonAttentionMetadata batch();
  PagedKvCache cache();
  AttentionArgs args();
  Context context() const;

  // This step's write into the cache as it was before; "" or what is wrong with the result. The
  // cache holds the case's exact content afterwards.
  std::string write_cache();
  // Plans and runs attention into freshly poisoned outputs.
  Actual attend();
  // Plans and runs the write, into the cache as it was before, and attention: one forward().
  Actual step();
  // Its parts.
  void poison_outputs();
  Actual outputs();
  // Whether all memory but the outputs is as it was.
  std::string damage();

  DeviceBuffers& buffers() { return buffers_; }

 private:
  void undo_write();

  const Case& c_;
  const AttentionBackend& backend_;
  DeviceMemory& memory_;
  DeviceBuffers buffers_;
};

// The backend "reference" on the same inputs, float32 outputs.
Expected reference_attention(const Case& c);

// Runs the case on the backend; "" or what is wrong. Judged by the reference, or the reference by
// literal_attention().
std::string run_case(const Case& c, const AttentionBackend& backend);

// A random case of a seed; a problem ends with the line that reproduces it.
std::string run_random_case(const AttentionBackend& backend, std::uint64_t seed,
                            std::int64_t index);

}  // namespace quire::conformance
