// The scheduler alone, with a pretended model that always answers with token 7.
#include "examples/llm/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

namespace quire::llm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

class Simulation {
 public:
  Simulation(std::int64_t num_blocks, std::int64_t block_size, const SchedulerOptions& options)
      : blocks_(num_blocks, block_size), scheduler_(blocks_, options) {}

  Sequence& add(std::vector<std::int32_t> prompt, std::int64_t max_tokens) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = static_cast<std::int64_t>(sequences_.size());
    sequence->num_prompt = static_cast<std::int64_t>(prompt.size());
    sequence->tokens = std::move(prompt);
    sequence->max_tokens = max_tokens;
    scheduler_.add(*sequence);
    sequences_.push_back(std::move(sequence));
    return *sequences_.back();
  }
  Sequence& add(std::size_t prompt, std::int64_t max_tokens) {
    // Prompts without common blocks.
    return add(std::vector<std::int32_t>(prompt, 100 + static_cast<int>(sequences_.size())),
               max_tokens);
  }

  // One step: (sequence, tokens) of each chunk.
  std::vector<std::pair<std::int64_t, std::int64_t>> step() {
    std::vector<std::pair<std::int64_t, std::int64_t>> result;
    for (const ScheduledChunk& chunk : scheduler_.schedule()) {
      Sequence& sequence = *chunk.sequence;
      result.emplace_back(sequence.id, chunk.num_tokens);
      EXPECT_GE(static_cast<std::int64_t>(sequence.blocks.blocks.size()) * blocks_.block_size(),
                sequence.num_computed + chunk.num_tokens);
      const bool completes = chunk.completes();
      sequence.num_computed += chunk.num_tokens;
      if (!completes) continue;
      sequence.tokens.push_back(7);
      if (answer_length(sequence) == sequence.max_tokens) {
        scheduler_.finish(sequence);
        finished_.push_back(sequence.id);
      }
    }
    return result;
  }

  // Steps until all is done; returns how many.
  int run() {
    int steps = 0;
    while (scheduler_.num_running() + scheduler_.num_waiting() > 0) {
      EXPECT_FALSE(step().empty());
      if (++steps > 10000) {
        ADD_FAILURE() << "no end";
        break;
      }
    }
    return steps;
  }

  static std::int64_t answer_length(const Sequence& sequence) {
    return static_cast<std::int64_t>(sequence.tokens.size()) - sequence.num_prompt;
  }

  BlockManager& blocks() { return blocks_; }
  Scheduler& scheduler() { return scheduler_; }
  const std::vector<std::int64_t>& finished() const { return finished_; }
  const std::vector<std::unique_ptr<Sequence>>& sequences() const { return sequences_; }

 private:
  BlockManager blocks_;
  Scheduler scheduler_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<std::int64_t> finished_;
};

using Chunks = std::vector<std::pair<std::int64_t, std::int64_t>>;

TEST(Scheduler, CutsPromptsIntoChunksAndMixesThemWithDecodes) {
  Simulation simulation(64, 4, {.max_batch_tokens = 10, .max_seqs = 4});
  simulation.add(6, 8);
  simulation.add(21, 2);
  EXPECT_EQ(simulation.step(), (Chunks{{0, 6}, {1, 4}}));
  EXPECT_EQ(simulation.step(), (Chunks{{0, 1}, {1, 9}}));
  EXPECT_EQ(simulation.step(), (Chunks{{0, 1}, {1, 8}}));
  EXPECT_EQ(simulation.step(), (Chunks{{0, 1}, {1, 1}}));
}

TEST(Scheduler, ALongPromptStopsNoAnswer) {
  Simulation simulation(64, 4, {.max_batch_tokens = 4, .max_seqs = 4});
  simulation.add(20, 4);  // the oldest, prefilled while the others already answer
  simulation.add(1, 4);
  simulation.step();
  for (int i = 0; i < 4; ++i) simulation.step();
  simulation.run();
  EXPECT_EQ(simulation.finished().size(), 2U);

  Simulation second(64, 4, {.max_batch_tokens = 4, .max_seqs = 4});
  second.add(1, 30);
  second.step();
  second.add(40, 4);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(second.step(), (Chunks{{0, 1}, {1, 3}}));
}

TEST(Scheduler, RequestsWaitForBlocksInOrder) {
  Simulation simulation(6, 4, {.max_batch_tokens = 64, .max_seqs = 8});
  simulation.add(12, 4);
  simulation.add(12, 4);
  simulation.add(2, 4);  // would fit, but does not overtake
  EXPECT_EQ(simulation.step(), (Chunks{{0, 12}}));
  EXPECT_EQ(simulation.scheduler().num_waiting(), 2);
  simulation.run();
  EXPECT_EQ(simulation.finished(), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(simulation.blocks().stats().used, 0);
}

TEST(Scheduler, MaxSeqsHolds) {
  Simulation simulation(64, 4, {.max_batch_tokens = 64, .max_seqs = 2});
  for (int i = 0; i < 5; ++i) simulation.add(3, 3);
  EXPECT_EQ(simulation.step().size(), 2U);
  EXPECT_EQ(simulation.scheduler().num_waiting(), 3);
  simulation.run();
  EXPECT_EQ(simulation.finished().size(), 5U);
}

TEST(Scheduler, TheYoungestMakesRoomAndComesBack) {
  Simulation simulation(8, 4, {.max_batch_tokens = 64, .max_seqs = 8});
  simulation.add(10, 16);
  simulation.add(10, 16);
  EXPECT_EQ(simulation.step(), (Chunks{{0, 10}, {1, 10}}));
  bool stopped = false;
  for (int i = 0; i < 12 && !stopped; ++i) {
    simulation.step();
    stopped = simulation.scheduler().num_preemptions() > 0;
  }
  ASSERT_TRUE(stopped);
  const Sequence& youngest = *simulation.sequences()[1];
  EXPECT_EQ(youngest.num_computed, 0);
  EXPECT_TRUE(youngest.blocks.blocks.empty());
  EXPECT_GT(Simulation::answer_length(youngest), 0);  // what it has said is kept
  simulation.run();
  EXPECT_EQ(simulation.finished(), (std::vector<std::int64_t>{0, 1}));
  for (const auto& sequence : simulation.sequences()) {
    EXPECT_EQ(Simulation::answer_length(*sequence), 16);
  }
}

TEST(Scheduler, SharesAPrefixWithinOneStep) {
  Simulation simulation(64, 4, {.max_batch_tokens = 64, .max_seqs = 8});
  std::vector<std::int32_t> prompt(18, 5);
  simulation.add(prompt, 4);
  prompt.back() = 6;
  simulation.add(prompt, 4);
  EXPECT_EQ(simulation.step(), (Chunks{{0, 18}, {1, 2}}));
  EXPECT_EQ(simulation.blocks().stats().shared, 4);
  EXPECT_EQ(simulation.sequences()[1]->num_reused, 16);
  simulation.run();
}

TEST(Scheduler, RefusesWhatNeverFits) {
  Simulation simulation(4, 4, {.max_batch_tokens = 64, .max_seqs = 8});
  EXPECT_THAT([&] { simulation.add(10, 8); },
              ThrowsMessage<RequestError>(
                  HasSubstr("a prompt of 10 tokens with an answer of up to 8 needs 5 blocks of 4, "
                            "but the cache has 4")));
  simulation.add(10, 7);  // the 17th token is never computed
  simulation.run();
  EXPECT_EQ(simulation.finished().size(), 1U);
  EXPECT_THROW(simulation.add(std::size_t{0}, 1), RequestError);
  EXPECT_THROW(simulation.add(1, 0), RequestError);
}

TEST(Scheduler, RefusesBadOptions) {
  BlockManager blocks(4, 4);
  EXPECT_THROW(Scheduler(blocks, {.max_batch_tokens = 4, .max_seqs = 0}), std::invalid_argument);
  EXPECT_THROW(Scheduler(blocks, {.max_batch_tokens = 4, .max_seqs = 5}), std::invalid_argument);
}

// Whatever the load, everything ends, in bounded time, and every block comes back.
TEST(Scheduler, RandomLoadsEnd) {
  unsigned state = 1;
  const auto random = [&](unsigned below) {
    state = state * 1664525U + 1013904223U;
    return (state >> 16) % below;
  };
  std::int64_t preemptions = 0;
  for (int round = 0; round < 60; ++round) {
    const std::int64_t block_size = 1 + random(5);
    Simulation simulation(4 + random(30), block_size,
                          {.max_batch_tokens = 6 + random(20), .max_seqs = 1 + random(6)});
    std::size_t accepted = 0;
    for (unsigned i = 0; i < 12; ++i) {
      std::vector<std::int32_t> prompt(1 + random(20));
      for (auto& token : prompt) token = static_cast<std::int32_t>(random(2));
      try {
        simulation.add(prompt, 1 + random(20));
        ++accepted;
      } catch (const RequestError&) {
        continue;
      }
      if (random(2) == 0) simulation.step();
    }
    simulation.run();
    EXPECT_EQ(simulation.finished().size(), accepted);
    EXPECT_EQ(simulation.blocks().num_free(), simulation.blocks().num_blocks());
    preemptions += simulation.scheduler().num_preemptions();
  }
  EXPECT_GT(preemptions, 10);
}

}  // namespace
}  // namespace quire::llm
