// Who owns which block of the paged KV cache.
//
// Blocks are reference-counted. A full block is known by its content: its tokens and, through the
// block before it, all tokens that precede them. Sequences that start with the same tokens share
// the blocks that hold them. A block that nobody uses keeps its content until its memory is needed,
// longest unused first, so a later request can still find a prefix. (vLLM's automatic prefix
// caching has the same rules.)
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

namespace quire::llm {

using BlockId = std::int32_t;

struct BlockStats {
  std::int64_t used = 0;         // blocks that a sequence holds now
  std::int64_t peak_used = 0;    // the most of them at any time
  std::int64_t shared = 0;       // blocks that two or more sequences hold now
  std::int64_t peak_shared = 0;  // the most of them at any time
  std::int64_t reused = 0;       // times a sequence took a block with its content, instead of
                                 // computing it
};

// The blocks of one sequence. Only BlockManager changes it; release() it before it goes.
struct BlockList {
  std::vector<BlockId> blocks;
  // Of the leading full blocks whose content is known by now: see BlockManager::publish.
  std::int64_t num_published = 0;
  std::uint64_t last_content = 0;
};

class BlockManager {
 public:
  // Throws std::invalid_argument on sizes below 1.
  BlockManager(std::int64_t num_blocks, std::int64_t block_size);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
  std::int64_t block_size() const { return block_size_; }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t blocks_for(std::int64_t num_tokens) const {
    return (num_tokens + block_size_ - 1) / block_size_;
  }
  const BlockStats& stats() const { return stats_; }

  // How many leading blocks of `tokens` are there with their content, and how many of those nobody
  // holds: taking them makes free blocks fewer. The last token is never counted as there, so that
  // a sequence has something left to compute its next token from.
  struct Prefix {
    std::int64_t num_blocks = 0;
    std::int64_t num_unused = 0;
  };
  Prefix find_prefix(std::span<const std::int32_t> tokens) const;

  // Puts the blocks that find_prefix() counts into an empty list. Returns how many tokens they
  // hold.
  std::int64_t take_prefix(std::span<const std::int32_t> tokens, BlockList& list);

  // Grows the list to hold `num_tokens`. If there are too few free blocks, does nothing and returns
  // false.
  bool grow(BlockList& list, std::int64_t num_tokens);

  // Says that the list's blocks hold the first `num_computed` of `tokens`, or will before the next
  // attention call reads them: full blocks can be shared from now on.
  void publish(BlockList& list, std::span<const std::int32_t> tokens, std::int64_t num_computed);

  // Gives all blocks of the list back.
  void release(BlockList& list);

 private:
  // What a full block holds: its tokens after the content `previous`, which is 0 at the start of a
  // sequence and else a number given once to each different content. So two keys are equal only if
  // the whole prefixes are: no hash decides.
  struct ContentKey {
    std::uint64_t previous = 0;
    std::vector<std::int32_t> tokens;
    friend bool operator==(const ContentKey&, const ContentKey&) = default;
  };
  struct ContentHash {
    std::size_t operator()(const ContentKey& key) const;
  };
  struct Content {
    BlockId block = 0;
    std::uint64_t number = 0;
  };
  using ContentMap = std::unordered_map<ContentKey, Content, ContentHash>;
  struct Block {
    std::int32_t references = 0;
    std::list<BlockId>::iterator free_position;  // if references == 0
    const ContentKey* content = nullptr;         // a key of contents_; null: unknown
  };

  // Calls visit(content) for each leading block of `tokens` that is there, as find_prefix() says.
  template <class Visit>
  void visit_prefix(std::span<const std::int32_t> tokens, Visit visit) const;
  ContentKey key_of(std::uint64_t previous, std::span<const std::int32_t> tokens,
                    std::int64_t index) const;
  void take(BlockId id);
  void give_back(BlockId id);

  std::int64_t block_size_;
  std::vector<Block> blocks_;
  std::list<BlockId> free_;  // in the order in which they are handed out
  ContentMap contents_;
  std::uint64_t next_content_ = 1;
  BlockStats stats_;
};

}  // namespace quire::llm
