// merge_states() on parts of which some contribute nothing, judged by its formula.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "conformance/tensor.h"
#include "quire/quire.h"

namespace quire::conformance {

class MergeCase {
 public:
  enum class Target : std::uint8_t { kOwn, kPartA, kPartB };

  struct Spec {
    DType dtype = DType::kFloat32;
    std::int64_t tokens = 9;
    std::int64_t heads = 4;
    std::int64_t size = 33;
    Target target = Target::kOwn;  // where the result goes: memory of its own, or over a part
    bool lse = true;
  };

  MergeCase(const Spec& spec, DeviceMemory* memory);

  void merge(const Context& context);
  // After merge(): "" or what is wrong.
  std::string problem();

 private:
  std::string problem_of_row(const std::vector<std::byte>& output,
                             const std::vector<std::byte>& lse, std::int64_t token,
                             std::int64_t head) const;
  const Tensor& output() const;
  const Tensor& lse() const;

  Spec spec_;
  DeviceMemory* memory_;
  DeviceBuffers buffers_;
  Tensor o_a_, lse_a_, o_b_, lse_b_, own_output_, own_lse_;
};

}  // namespace quire::conformance
