// Serves requests: continuous batching of many sequences over one model and one paged cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "block_manager.h"
#include "model.h"
#include "sampler.h"
#include "scheduler.h"

namespace quire::llm {

struct Request {
  std::vector<std::int32_t> prompt;
  std::int64_t max_tokens = 128;
  SamplingParams sampling;
};

enum class FinishReason { kNone, kEndToken, kLength };

// A token that a step gave a request.
struct NewToken {
  std::int64_t request = 0;
  std::int32_t token = 0;
  FinishReason finish = FinishReason::kNone;  // of the request, with this token
};

struct EngineStats {
  std::int64_t num_steps = 0;
  std::int64_t num_preemptions = 0;
  // Tokens computed to get a request's answer started (or, after a preemption, going again), and
  // tokens computed one by one to continue an answer. A step that does both counts its time for
  // each by its share of the step's tokens.
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_tokens = 0;
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
  double sampling_seconds = 0.0;
  double attention_seconds = 0.0;  // part of the two: in Quire
};

class Engine {
 public:
  // `ends_answer` says which tokens complete an answer. `model` must outlive the engine.
  Engine(Model& model, std::function<bool(std::int32_t)> ends_answer);

  // Queues a request and returns its number: 0, 1, 2, ... Throws RequestError if it can never be
  // served. Answers end at the model's context length at the latest.
  std::int64_t add(const Request& request);

  // Computes one step for all requests whose turn it is. Returns the new tokens, valid until the
  // next call.
  std::span<const NewToken> step();

  bool done() const { return scheduler_.num_running() + scheduler_.num_waiting() == 0; }
  std::int64_t num_running() const { return scheduler_.num_running(); }
  std::int64_t num_waiting() const { return scheduler_.num_waiting(); }
  // The prompt and what was generated for it, the end token included.
  const Sequence& sequence(std::int64_t request) const {
    return requests_.at(static_cast<std::size_t>(request))->sequence;
  }
  EngineStats stats() const;
  const BlockStats& block_stats() const { return blocks_.stats(); }

 private:
  struct Running {
    Sequence sequence;
    Sampler sampler;
  };

  void build_batch(std::span<const ScheduledChunk> chunks);
  void sample(const ScheduledChunk& chunk, std::span<const float> logits);
  void count(std::span<const ScheduledChunk> chunks, double seconds);

  Model& model_;
  std::function<bool(std::int32_t)> ends_answer_;
  BlockManager blocks_;
  Scheduler scheduler_;
  std::vector<std::unique_ptr<Running>> requests_;
  Batch batch_;
  std::vector<NewToken> new_tokens_;
  EngineStats stats_;
};

}  // namespace quire::llm
