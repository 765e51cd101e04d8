#include "examples/llm/block_manager.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>

namespace quire::llm {
namespace {

std::vector<std::int32_t> iota(std::size_t count, std::int32_t first = 0) {
  std::vector<std::int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// What the scheduler does with a prompt: takes what is there, grows, computes, publishes.
BlockList load(BlockManager& manager, const std::vector<std::int32_t>& tokens) {
  BlockList list;
  manager.take_prefix(tokens, list);
  const auto size = static_cast<std::int64_t>(tokens.size());
  EXPECT_TRUE(manager.grow(list, size));
  manager.publish(list, tokens, size);
  return list;
}

TEST(BlockManager, GrowsByWholeBlocks) {
  BlockManager manager(4, 8);
  BlockList list;
  EXPECT_TRUE(manager.grow(list, 1));
  EXPECT_EQ(list.blocks.size(), 1U);
  EXPECT_TRUE(manager.grow(list, 8));
  EXPECT_EQ(list.blocks.size(), 1U);
  EXPECT_TRUE(manager.grow(list, 9));
  EXPECT_EQ(list.blocks.size(), 2U);
  EXPECT_EQ(manager.num_free(), 2);
  EXPECT_EQ(manager.stats().used, 2);
}

TEST(BlockManager, ExhaustionChangesNothing) {
  BlockManager manager(3, 4);
  BlockList a;
  BlockList b;
  EXPECT_TRUE(manager.grow(a, 8));
  EXPECT_FALSE(manager.grow(b, 8));
  EXPECT_TRUE(b.blocks.empty());
  EXPECT_EQ(manager.num_free(), 1);
  manager.release(a);
  EXPECT_TRUE(manager.grow(b, 12));
  EXPECT_EQ(manager.num_free(), 0);
  EXPECT_EQ(manager.stats().peak_used, 3);
}

TEST(BlockManager, SharesFullBlocksOfAPrefix) {
  BlockManager manager(16, 4);
  const BlockList a = load(manager, iota(10));  // two full blocks and a half one
  BlockList b;
  EXPECT_EQ(manager.take_prefix(iota(10), b), 8);
  EXPECT_EQ(b.blocks, (std::vector<BlockId>{a.blocks[0], a.blocks[1]}));
  EXPECT_EQ(manager.stats().shared, 2);
  EXPECT_EQ(manager.stats().reused, 2);
  EXPECT_TRUE(manager.grow(b, 10));
  EXPECT_NE(b.blocks[2], a.blocks[2]);  // the half block is never shared
}

TEST(BlockManager, LeavesATokenToCompute) {
  BlockManager manager(16, 4);
  const BlockList a = load(manager, iota(8));
  EXPECT_EQ(manager.find_prefix(iota(8)).num_blocks, 1);
  EXPECT_EQ(manager.find_prefix(iota(9)).num_blocks, 2);
  EXPECT_EQ(manager.find_prefix(iota(1)).num_blocks, 0);
}

TEST(BlockManager, SameTokensAfterOthersAreOtherContent) {
  BlockManager manager(16, 4);
  load(manager, iota(8));
  std::vector<std::int32_t> other = iota(12);
  other[0] = 99;  // the second block has the same tokens, but what precedes it differs
  EXPECT_EQ(manager.find_prefix(other).num_blocks, 0);
  std::vector<std::int32_t> tail = iota(8, 4);  // the second block's tokens at the start
  EXPECT_EQ(manager.find_prefix(tail).num_blocks, 0);
}

TEST(BlockManager, ReleasedContentIsFoundUntilItsMemoryIsNeeded) {
  BlockManager manager(4, 4);
  BlockList a = load(manager, iota(9));
  manager.release(a);
  EXPECT_EQ(manager.num_free(), 4);
  EXPECT_EQ(manager.stats().used, 0);
  const BlockManager::Prefix prefix = manager.find_prefix(iota(9));
  EXPECT_EQ(prefix.num_blocks, 2);
  EXPECT_EQ(prefix.num_unused, 2);
  // Unknown blocks go first, then the end of the prefix.
  BlockList b;
  EXPECT_TRUE(manager.grow(b, 12));
  EXPECT_EQ(manager.find_prefix(iota(9)).num_blocks, 1);
  BlockList c;
  EXPECT_TRUE(manager.grow(c, 4));
  EXPECT_EQ(manager.find_prefix(iota(9)).num_blocks, 0);
}

TEST(BlockManager, ReferencesAreCounted) {
  BlockManager manager(8, 4);
  BlockList a = load(manager, iota(9));
  BlockList b = load(manager, iota(9));
  EXPECT_EQ(manager.stats().used, 4);
  manager.release(a);
  EXPECT_EQ(manager.stats().used, 3);  // the shared ones stay, a's own last one goes
  EXPECT_EQ(manager.stats().shared, 0);
  EXPECT_EQ(manager.find_prefix(iota(9)).num_unused, 0);
  manager.release(b);
  EXPECT_EQ(manager.stats().used, 0);
  EXPECT_EQ(manager.num_free(), 8);
}

TEST(BlockManager, RefusesBadSizes) {
  EXPECT_THROW(BlockManager(0, 16), std::invalid_argument);
  EXPECT_THROW(BlockManager(-1, 16), std::invalid_argument);
  EXPECT_THROW(BlockManager(1, 0), std::invalid_argument);
  EXPECT_THROW(BlockManager(std::int64_t{1} << 31, 16), std::invalid_argument);
}

// Random sequences from a small alphabet come and go. After each action: no block is both free and
// held, and blocks shared by two sequences stand for the same tokens.
TEST(BlockManager, RandomUseKeepsItsPromises) {
  constexpr std::int64_t kBlocks = 24;
  constexpr std::int64_t kBlockSize = 3;
  BlockManager manager(kBlocks, kBlockSize);
  std::mt19937 random(3);
  struct Live {
    std::vector<std::int32_t> tokens;
    BlockList list;
  };
  std::vector<Live> live;
  for (int action = 0; action < 3000; ++action) {
    if (live.size() < 6 && random() % 2 == 0) {
      Live item;
      for (unsigned i = 0; i < 1 + random() % 20; ++i) {
        item.tokens.push_back(static_cast<std::int32_t>(random() % 2));
      }
      manager.take_prefix(item.tokens, item.list);
      const auto size = static_cast<std::int64_t>(item.tokens.size());
      if (manager.grow(item.list, size)) {
        manager.publish(item.list, item.tokens, size);
        live.push_back(item);
      } else {
        manager.release(item.list);
      }
    } else if (!live.empty()) {
      const std::size_t victim = random() % live.size();
      manager.release(live[victim].list);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(victim));
    }
    std::map<BlockId, std::vector<std::int32_t>> content;
    for (const Live& item : live) {
      for (std::size_t i = 0; i < item.list.blocks.size(); ++i) {
        const std::size_t end = std::min(item.tokens.size(), (i + 1) * kBlockSize);
        const std::vector<std::int32_t> prefix(
            item.tokens.begin(), item.tokens.begin() + static_cast<std::ptrdiff_t>(end));
        const auto [it, added] = content.emplace(item.list.blocks[i], prefix);
        ASSERT_TRUE(added || (it->second == prefix && end == (i + 1) * kBlockSize));
      }
    }
    ASSERT_EQ(manager.stats().used, static_cast<std::int64_t>(content.size()));
    ASSERT_EQ(manager.num_free(), kBlocks - manager.stats().used);
  }
  EXPECT_GT(manager.stats().reused, 100);
}

}  // namespace
}  // namespace quire::llm
