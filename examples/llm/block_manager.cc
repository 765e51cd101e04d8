#include "block_manager.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace quire::llm {

BlockManager::BlockManager(std::int64_t num_blocks, std::int64_t block_size)
    : block_size_(block_size) {
  if (num_blocks < 1 || num_blocks > std::numeric_limits<BlockId>::max()) {
    throw std::invalid_argument("num_blocks: expected 1 to 2^31 - 1, got " +
                                std::to_string(num_blocks));
  }
  if (block_size < 1) {
    throw std::invalid_argument("block_size: expected at least 1, got " +
                                std::to_string(block_size));
  }
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  for (BlockId id = 0; id < num_blocks; ++id) {
    Block& block = blocks_[static_cast<std::size_t>(id)];
    block.free_position = free_.insert(free_.end(), id);
  }
}

std::size_t BlockManager::ContentHash::operator()(const ContentKey& key) const {
  std::uint64_t hash = key.previous * 0x9E3779B97F4A7C15U;
  for (const std::int32_t token : key.tokens) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 0xFF51AFD7ED558CCDU;
    hash ^= hash >> 32;
  }
  return static_cast<std::size_t>(hash);
}

BlockManager::ContentKey BlockManager::key_of(std::uint64_t previous,
                                              std::span<const std::int32_t> tokens,
                                              std::int64_t index) const {
  const auto part = tokens.subspan(static_cast<std::size_t>(index * block_size_),
                                   static_cast<std::size_t>(block_size_));
  return {previous, {part.begin(), part.end()}};
}

template <class Visit>
void BlockManager::visit_prefix(std::span<const std::int32_t> tokens, Visit visit) const {
  const std::int64_t full = (static_cast<std::int64_t>(tokens.size()) - 1) / block_size_;
  std::uint64_t previous = 0;
  for (std::int64_t i = 0; i < full; ++i) {
    const auto it = contents_.find(key_of(previous, tokens, i));
    if (it == contents_.end()) return;
    previous = it->second.number;
    visit(it->second);
  }
}

BlockManager::Prefix BlockManager::find_prefix(std::span<const std::int32_t> tokens) const {
  Prefix prefix;
  visit_prefix(tokens, [&](const Content& content) {
    ++prefix.num_blocks;
    if (blocks_[static_cast<std::size_t>(content.block)].references == 0) ++prefix.num_unused;
  });
  return prefix;
}

std::int64_t BlockManager::take_prefix(std::span<const std::int32_t> tokens, BlockList& list) {
  visit_prefix(tokens, [&](const Content& content) {
    take(content.block);
    list.blocks.push_back(content.block);
    list.last_content = content.number;
  });
  list.num_published = static_cast<std::int64_t>(list.blocks.size());
  stats_.reused += list.num_published;
  return list.num_published * block_size_;
}

bool BlockManager::grow(BlockList& list, std::int64_t num_tokens) {
  const std::int64_t needed =
      blocks_for(num_tokens) - static_cast<std::int64_t>(list.blocks.size());
  if (needed > num_free()) return false;
  for (std::int64_t i = 0; i < needed; ++i) {
    const BlockId id = free_.front();
    Block& block = blocks_[static_cast<std::size_t>(id)];
    if (block.content != nullptr) {
      contents_.erase(contents_.find(*block.content));
      block.content = nullptr;
    }
    take(id);
    list.blocks.push_back(id);
  }
  return true;
}

void BlockManager::publish(BlockList& list, std::span<const std::int32_t> tokens,
                           std::int64_t num_computed) {
  while ((list.num_published + 1) * block_size_ <= num_computed) {
    const BlockId id = list.blocks[static_cast<std::size_t>(list.num_published)];
    const auto [it, added] = contents_.try_emplace(
        key_of(list.last_content, tokens, list.num_published), Content{id, next_content_});
    if (added) {
      blocks_[static_cast<std::size_t>(id)].content = &it->first;
      ++next_content_;
    }
    // If another block has the same content already, this one stays private.
    list.last_content = it->second.number;
    ++list.num_published;
  }
}

void BlockManager::release(BlockList& list) {
  // Back to front: the end of a prefix is handed out, and so forgotten, before its start.
  for (auto it = list.blocks.rbegin(); it != list.blocks.rend(); ++it) give_back(*it);
  list = BlockList{};
}

void BlockManager::take(BlockId id) {
  Block& block = blocks_[static_cast<std::size_t>(id)];
  if (++block.references == 1) {
    free_.erase(block.free_position);
    stats_.peak_used = std::max(stats_.peak_used, ++stats_.used);
  } else if (block.references == 2) {
    stats_.peak_shared = std::max(stats_.peak_shared, ++stats_.shared);
  }
}

void BlockManager::give_back(BlockId id) {
  Block& block = blocks_[static_cast<std::size_t>(id)];
  if (--block.references == 1) --stats_.shared;
  if (block.references > 0) return;
  --stats_.used;
  // Blocks without content are of no use to anyone: handed out first.
  const bool known = block.content != nullptr;
  block.free_position = free_.insert(known ? free_.end() : free_.begin(), id);
}

}  // namespace quire::llm
