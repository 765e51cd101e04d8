// merge_states() against its formula, on every device.
#include "conformance/merge_case.h"

#include <gtest/gtest.h>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class MergeStates : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  static void check(const MergeCase::Spec& spec) {
    MergeCase merge(spec, &memory_of(GetParam()->device_type()));
    merge.merge({});
    EXPECT_EQ(merge.problem(), "") << to_string(spec.dtype);
  }
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

TEST_P(MergeStates, FollowsTheFormula) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t size : {1, 20, 128, 576}) {
      check({.dtype = dtype, .tokens = 7, .heads = 3, .size = size});
    }
  }
}

TEST_P(MergeStates, MayWriteOverEitherPart) {
  for (const DType dtype : kDTypes) {
    for (const auto target : {MergeCase::Target::kPartA, MergeCase::Target::kPartB}) {
      for (const bool lse : {true, false}) check({.dtype = dtype, .target = target, .lse = lse});
    }
  }
}

TEST_P(MergeStates, NothingToMerge) { check({.tokens = 0}); }

TEST_P(MergeStates, ManyRows) { check({.tokens = 3000, .heads = 5, .size = 8}); }

QUIRE_ON_EVERY_DEVICE(MergeStates);

}  // namespace
}  // namespace quire::conformance
