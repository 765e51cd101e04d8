#include "scheduler.h"

#include <algorithm>
#include <string>

namespace quire::llm {
namespace {

std::int64_t length(const Sequence& sequence) {
  return static_cast<std::int64_t>(sequence.tokens.size());
}

}  // namespace

Scheduler::Scheduler(BlockManager& blocks, const SchedulerOptions& options)
    : blocks_(blocks), options_(options) {
  if (options.max_seqs < 1) {
    throw std::invalid_argument("max_seqs: expected at least 1, got " +
                                std::to_string(options.max_seqs));
  }
  if (options.max_batch_tokens < options.max_seqs) {
    throw std::invalid_argument("max_batch_tokens: expected at least max_seqs (" +
                                std::to_string(options.max_seqs) + "), got " +
                                std::to_string(options.max_batch_tokens));
  }
}

void Scheduler::add(Sequence& sequence) {
  if (sequence.num_prompt < 1 || sequence.max_tokens < 1) {
    throw RequestError("request " + std::to_string(sequence.id) +
                       ": expected at least one token of prompt and of answer, got " +
                       std::to_string(sequence.num_prompt) + " and " +
                       std::to_string(sequence.max_tokens));
  }
  // The last token of an answer is never computed.
  const std::int64_t most = sequence.num_prompt + sequence.max_tokens - 1;
  if (blocks_.blocks_for(most) > blocks_.num_blocks()) {
    throw RequestError(
        "request " + std::to_string(sequence.id) + ": a prompt of " +
        std::to_string(sequence.num_prompt) + " tokens with an answer of up to " +
        std::to_string(sequence.max_tokens) + " needs " + std::to_string(blocks_.blocks_for(most)) +
        " blocks of " + std::to_string(blocks_.block_size()) + ", but the cache has " +
        std::to_string(blocks_.num_blocks()) + ": ask for more blocks or a shorter answer");
  }
  waiting_.push_back(&sequence);
}

std::vector<ScheduledChunk> Scheduler::schedule() {
  std::vector<ScheduledChunk> step;
  std::int64_t budget = options_.max_batch_tokens;
  const std::int64_t preemptions_before = num_preemptions_;
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    // A token is kept for each sequence still to come, so that a long prompt stops no one's answer.
    const auto others = static_cast<std::int64_t>(running_.size() - i - 1);
    const std::int64_t count = std::min(length(sequence) - sequence.num_computed, budget - others);
    if (!grow(sequence, sequence.num_computed + count)) break;
    schedule_chunk(sequence, count, step);
    budget -= count;
  }
  // While some had to stop, nobody new starts.
  if (num_preemptions_ == preemptions_before) admit(budget, step);
  return step;
}

// Makes room by stopping younger sequences. Their chunks are not scheduled yet, so no block is
// given away that was published in this step and not computed. False if `sequence` itself had to
// stop, which is then the youngest.
bool Scheduler::grow(Sequence& sequence, std::int64_t num_tokens) {
  while (!blocks_.grow(sequence.blocks, num_tokens)) {
    const bool itself = running_.back() == &sequence;
    preempt_youngest();
    if (itself) return false;
  }
  return true;
}

void Scheduler::preempt_youngest() {
  Sequence& sequence = *running_.back();
  running_.pop_back();
  blocks_.release(sequence.blocks);
  sequence.num_computed = 0;
  waiting_.push_front(&sequence);
  ++num_preemptions_;
}

void Scheduler::admit(std::int64_t budget, std::vector<ScheduledChunk>& step) {
  while (!waiting_.empty() && budget > 0 && num_running() < options_.max_seqs) {
    Sequence& sequence = *waiting_.front();
    const BlockManager::Prefix prefix = blocks_.find_prefix(sequence.tokens);
    const std::int64_t needed =
        blocks_.blocks_for(length(sequence)) - prefix.num_blocks + prefix.num_unused;
    // One block is kept for each that runs: else the newcomer would soon have to stop again.
    if (needed + num_running() > blocks_.num_free()) return;
    sequence.num_computed = blocks_.take_prefix(sequence.tokens, sequence.blocks);
    sequence.num_reused =
        std::max(sequence.num_reused, std::min(sequence.num_computed, sequence.num_prompt));
    blocks_.grow(sequence.blocks, length(sequence));
    waiting_.pop_front();
    running_.push_back(&sequence);
    const std::int64_t count = std::min(length(sequence) - sequence.num_computed, budget);
    schedule_chunk(sequence, count, step);
    budget -= count;
  }
}

void Scheduler::schedule_chunk(Sequence& sequence, std::int64_t num_tokens,
                               std::vector<ScheduledChunk>& step) {
  step.push_back({&sequence, num_tokens});
  // At once, so that others admitted in this very step find the prefix: a layer writes the K and V
  // of the whole batch before it attends.
  blocks_.publish(sequence.blocks, sequence.tokens, sequence.num_computed + num_tokens);
}

void Scheduler::finish(Sequence& sequence) {
  std::erase(running_, &sequence);
  std::erase(waiting_, &sequence);
  blocks_.release(sequence.blocks);
}

}  // namespace quire::llm
