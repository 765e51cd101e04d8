// The table of attention kernels of a build with CUDA. What the rows claim is tested on a GPU, by the
// conformance suite; here, that each can be planned for and that no layer is left without a kernel.
#include "cuda/kernel_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

namespace quire::cuda {
namespace {

TEST(KernelTable, RowsCanBePlannedFor) {
  std::set<std::string> names;
  for (const AttentionKernel* kernel : kernel_table()) {
    SCOPED_TRACE(kernel->name);
    EXPECT_TRUE(names.insert(kernel->name).second) << "twice";
    const TilePolicy& policy = kernel->policy;
    EXPECT_GT(policy.rows, 0);
    EXPECT_LE(policy.rows, kernel->key.max_rows);
    EXPECT_GT(policy.kv_tile, 0);
    EXPECT_GT(policy.v_columns, 0);
    EXPECT_GT(policy.min_range_cost, policy.item_overhead) << "a range without a kv tile";
    EXPECT_GT(policy.min_chunk, 0);
    EXPECT_TRUE(kernel->key.plain || kernel->key.score_mod) << "takes no call";
    EXPECT_NE(kernel->prepare, nullptr);
    EXPECT_NE(kernel->launch, nullptr);
  }
}

// Both forms of a tile have the same plan: a family that lacks one is not used at all.
TEST(KernelTable, EveryKernelIsOfACompleteFamily) {
  for (const AttentionKernel* kernel : kernel_table()) {
    SCOPED_TRACE(kernel->name);
    for (bool KernelKey::*form : {&KernelKey::plain, &KernelKey::score_mod}) {
      EXPECT_TRUE(std::any_of(kernel_table().begin(), kernel_table().end(), [&](const auto* other) {
        return other->key.*form && other->takes == nullptr && other->policy == kernel->policy &&
               other->key.compute == kernel->key.compute && other->key.kv8 == kernel->key.kv8 &&
               other->key.max_rows == kernel->key.max_rows &&
               other->whole_items == kernel->whole_items &&
               other->shared_prefix == kernel->shared_prefix &&
               other->kv_chunks == kernel->kv_chunks;
      })) << "is the other form left out by QUIRE_CUDA_INSTANCES?";
    }
  }
}

TEST(KernelTable, TheLastRowTakesEveryLayer) {
  ASSERT_FALSE(kernel_table().empty());
  const KernelKey& key = kernel_table().back()->key;
  EXPECT_EQ(key.compute, DType::kFloat32);
  EXPECT_LE(key.min_capability, 80);
  EXPECT_GE(key.max_capability, 120);
  EXPECT_EQ(key.max_head_size, 576);
  EXPECT_EQ(key.min_head_size_v, 0);
  EXPECT_EQ(key.max_rows, kAnyRows);
  EXPECT_TRUE(key.plain && key.score_mod);
}

}  // namespace
}  // namespace quire::cuda
