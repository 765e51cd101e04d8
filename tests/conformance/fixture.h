// Runs hand-made cases on every backend of this machine, judged by literal_attention(): the
// transcription of semantics.md that shares nothing with src/.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "conformance/number_format.h"
#include "conformance/runner.h"

namespace quire::conformance {

inline std::vector<const AttentionBackend*> available_backends() {
  std::vector<const AttentionBackend*> available;
  for (const AttentionBackend* backend : attention_backends()) {
    if (backend->available()) available.push_back(backend);
  }
  return available;
}

// The backends that serve the devices of this machine, one for each kind of device.
inline std::vector<const AttentionBackend*> best_backends() {
  std::vector<const AttentionBackend*> best;
  for (const AttentionBackend* backend : attention_backends()) {
    const bool served = std::any_of(best.begin(), best.end(), [&](const AttentionBackend* other) {
      return other->device_type() == backend->device_type();
    });
    if (backend->available() && !served) best.push_back(backend);
  }
  return best;
}

inline std::string backend_name(const testing::TestParamInfo<const AttentionBackend*>& info) {
  return info.param->name();
}

// A decoder layer with everything plain: four heads over two kv heads, two short sequences.
inline CaseSpec small_spec(std::vector<SequenceSpec> sequences = {}) {
  CaseSpec spec;
  spec.seed = 7;
  spec.config.dtype = DType::kFloat32;
  spec.config.num_heads = 4;
  spec.config.num_kv_heads = 2;
  spec.config.head_size = 16;
  spec.config.block_size = 4;
  spec.sequences = std::move(sequences);
  if (spec.sequences.empty()) spec.sequences = {{3, 10}, {1, 7}};
  return spec;
}

// Where the cache holds key j of sequence s: its block and its place in that block.
inline Sizes slot_of(const Case& c, std::int64_t s, std::int64_t j) {
  const std::int64_t block_size = c.spec.config.block_size;
  return {static_cast<std::int64_t>(c.block_table.get({s, j / block_size})), j % block_size};
}

class ConformanceTest : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  const AttentionBackend& backend() const { return *GetParam(); }

  // Runs write and attention, compares with the transcription.
  void check(const Case& c) {
    DeviceCase on_device(c, backend());
    if (c.spec.has_cache() && c.spec.write) {
      EXPECT_EQ(on_device.write_cache(), "");
    }
    actual_ = on_device.attend();
    expected_ = literal_attention(c);
    EXPECT_EQ(on_device.damage(), "");
    EXPECT_EQ(compare(c, actual_, expected_), "") << describe(c.spec);
  }
  void check(const CaseSpec& spec) { check(build_case(spec)); }

  // An output element of the last check() (2-D or 3-D contiguous output).
  double out(const Case& c, std::int64_t row, std::int64_t head, std::int64_t d) const {
    const std::int64_t at =
        (row * c.spec.config.num_heads + head) * c.spec.config.value_head_size() + d;
    return decode(c.output.dtype, &actual_.output[at * size_of(c.output.dtype)]);
  }
  double lse(const Case& c, std::int64_t row, std::int64_t head) const {
    const std::int64_t at = head * c.lse.strides[0] + row;
    return decode(DType::kFloat32, &actual_.lse[at * 4]);
  }

  Actual actual_;
  Expected expected_;
};

}  // namespace quire::conformance

#define QUIRE_ON_EVERY_BACKEND(suite)                                                   \
  INSTANTIATE_TEST_SUITE_P(Backends, suite,                                             \
                           testing::ValuesIn(quire::conformance::available_backends()), \
                           quire::conformance::backend_name)

// For what names a device, not a backend: merge_states(), write_kv_cache().
#define QUIRE_ON_EVERY_DEVICE(suite)                                                               \
  INSTANTIATE_TEST_SUITE_P(Devices, suite, testing::ValuesIn(quire::conformance::best_backends()), \
                           quire::conformance::backend_name)
