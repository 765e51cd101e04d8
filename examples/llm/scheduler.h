// Decides which sequences take part in a step, and with how many tokens: continuous batching (Orca;
// vLLM's v1 scheduler) with chunked prefill (Sarathi-Serve). Knows nothing of the model.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <vector>

#include "block_manager.h"

namespace quire::llm {

// A request that cannot be served however long it waits. `what()` says why.
class RequestError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct Sequence {
  std::int64_t id = 0;
  std::vector<std::int32_t> tokens;  // the prompt, then what was generated
  std::int64_t num_prompt = 0;
  std::int64_t max_tokens = 0;    // of the answer
  std::int64_t num_computed = 0;  // tokens whose K and V are in the cache
  std::int64_t num_reused = 0;    // of the prompt: not computed, but found in the cache
  BlockList blocks;
};

struct SchedulerOptions {
  std::int64_t max_batch_tokens = 512;  // of a step
  std::int64_t max_seqs = 64;           // that run at the same time
};

// `num_tokens` of the sequence, from its num_computed on, are to be computed in this step. If that
// reaches the end of its tokens, the step gives its next one.
struct ScheduledChunk {
  Sequence* sequence = nullptr;
  std::int64_t num_tokens = 0;

  bool completes() const {
    return sequence->num_computed + num_tokens ==
           static_cast<std::int64_t>(sequence->tokens.size());
  }
};

// Requests are admitted first come, first served, when the blocks of their whole prompt are free,
// and wait until then. One that runs grows block by block. When there is no free block left for it
// to grow, the youngest gives its blocks up and waits at the front of the queue; it is computed
// again later, as far as its blocks are not found with their content. The oldest is never stopped,
// so everything ends.
class Scheduler {
 public:
  // Throws std::invalid_argument on sizes below 1, or fewer tokens a step than sequences.
  Scheduler(BlockManager& blocks, const SchedulerOptions& options);

  // Queues a sequence, which must live until finish(). Throws RequestError if it could not fit
  // even alone.
  void add(Sequence& sequence);

  // The next step; empty only if there is nothing to do. Block lists cover the chunks afterwards,
  // and their blocks are published: the caller must compute every chunk, or drop all sequences.
  std::vector<ScheduledChunk> schedule();

  // Ends a sequence, whether it runs or waits, and gives its blocks back.
  void finish(Sequence& sequence);

  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }
  std::int64_t num_waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
  std::int64_t num_preemptions() const { return num_preemptions_; }

 private:
  bool grow(Sequence& sequence, std::int64_t num_tokens);
  void admit(std::int64_t budget, std::vector<ScheduledChunk>& step);
  void preempt_youngest();
  void schedule_chunk(Sequence& sequence, std::int64_t num_tokens,
                      std::vector<ScheduledChunk>& step);

  BlockManager& blocks_;
  SchedulerOptions options_;
  std::vector<Sequence*> running_;  // oldest first
  std::deque<Sequence*> waiting_;   // oldest first, all younger than those that run
  std::int64_t num_preemptions_ = 0;
};

}  // namespace quire::llm
