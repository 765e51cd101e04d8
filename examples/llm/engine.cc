#include "engine.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace quire::llm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

bool continues_answer(const ScheduledChunk& chunk) {
  return chunk.num_tokens == 1 && chunk.completes() &&
         chunk.sequence->num_computed >= chunk.sequence->num_prompt;
}

}  // namespace

Engine::Engine(Model& model, std::function<bool(std::int32_t)> ends_answer)
    : model_(model),
      ends_answer_(std::move(ends_answer)),
      blocks_(model.options().num_blocks, model.options().block_size),
      scheduler_(blocks_, {model.options().max_batch_tokens, model.options().max_seqs}) {}

std::int64_t Engine::add(const Request& request) {
  const auto id = static_cast<std::int64_t>(requests_.size());
  const std::string label = "request " + std::to_string(id) + ": ";
  const auto num_prompt = static_cast<std::int64_t>(request.prompt.size());
  const std::int64_t room = model_.config().context_length - num_prompt;
  if (room < 1) {
    throw RequestError(label + "expected a prompt shorter than the model's context of " +
                       std::to_string(model_.config().context_length) + " tokens, got " +
                       std::to_string(num_prompt));
  }
  for (const std::int32_t token : request.prompt) {
    if (token < 0 || token >= model_.config().vocab_size) {
      throw RequestError(label + "expected tokens below " +
                         std::to_string(model_.config().vocab_size) + ", got " +
                         std::to_string(token));
    }
  }
  auto running = std::make_unique<Running>(Running{{}, Sampler(request.sampling)});
  running->sequence.id = id;
  running->sequence.tokens = request.prompt;
  running->sequence.num_prompt = num_prompt;
  running->sequence.max_tokens = std::min(request.max_tokens, room);
  scheduler_.add(running->sequence);
  requests_.push_back(std::move(running));
  return id;
}

std::span<const NewToken> Engine::step() {
  new_tokens_.clear();
  const std::vector<ScheduledChunk> chunks = scheduler_.schedule();
  if (chunks.empty()) return {};
  const auto start = Clock::now();
  build_batch(chunks);
  const std::span<const float> logits = model_.forward(batch_);
  count(chunks, seconds_since(start));

  const auto sampling_start = Clock::now();
  const auto vocab_size = static_cast<std::size_t>(model_.config().vocab_size);
  std::size_t row = 0;
  for (const ScheduledChunk& chunk : chunks) {
    const bool completes = chunk.completes();
    chunk.sequence->num_computed += chunk.num_tokens;
    if (completes) sample(chunk, logits.subspan(row++ * vocab_size, vocab_size));
  }
  stats_.sampling_seconds += seconds_since(sampling_start);
  return new_tokens_;
}

void Engine::build_batch(std::span<const ScheduledChunk> chunks) {
  Batch& batch = batch_;
  batch = Batch{};
  batch.query_start_loc.push_back(0);
  for (const ScheduledChunk& chunk : chunks) {
    batch.max_blocks =
        std::max(batch.max_blocks, static_cast<std::int64_t>(chunk.sequence->blocks.blocks.size()));
  }
  for (const ScheduledChunk& chunk : chunks) {
    const Sequence& sequence = *chunk.sequence;
    const std::int64_t end = sequence.num_computed + chunk.num_tokens;
    for (std::int64_t i = sequence.num_computed; i < end; ++i) {
      const BlockId block =
          sequence.blocks.blocks[static_cast<std::size_t>(i / blocks_.block_size())];
      batch.tokens.push_back(sequence.tokens[static_cast<std::size_t>(i)]);
      batch.positions.push_back(static_cast<std::int32_t>(i));
      batch.slot_mapping.push_back(block * blocks_.block_size() + i % blocks_.block_size());
    }
    batch.query_start_loc.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.seq_lens.push_back(static_cast<std::int32_t>(end));
    batch.block_table.insert(batch.block_table.end(), sequence.blocks.blocks.begin(),
                             sequence.blocks.blocks.end());
    batch.block_table.resize(batch.seq_lens.size() * static_cast<std::size_t>(batch.max_blocks),
                             -1);
    if (chunk.completes()) {
      batch.logit_rows.push_back(static_cast<std::int32_t>(batch.tokens.size()) - 1);
    }
  }
}

void Engine::sample(const ScheduledChunk& chunk, std::span<const float> logits) {
  Sequence& sequence = *chunk.sequence;
  const std::int32_t token =
      requests_[static_cast<std::size_t>(sequence.id)]->sampler.sample(logits);
  sequence.tokens.push_back(token);
  const auto generated = static_cast<std::int64_t>(sequence.tokens.size()) - sequence.num_prompt;
  FinishReason finish = FinishReason::kNone;
  if (ends_answer_(token)) {
    finish = FinishReason::kEndToken;
  } else if (generated >= sequence.max_tokens) {
    finish = FinishReason::kLength;
  }
  if (finish != FinishReason::kNone) scheduler_.finish(sequence);
  new_tokens_.push_back({sequence.id, token, finish});
}

void Engine::count(std::span<const ScheduledChunk> chunks, double seconds) {
  std::int64_t prefill = 0;
  std::int64_t decode = 0;
  for (const ScheduledChunk& chunk : chunks) {
    (continues_answer(chunk) ? decode : prefill) += chunk.num_tokens;
  }
  const double share = static_cast<double>(prefill) / static_cast<double>(prefill + decode);
  stats_.num_steps += 1;
  stats_.prefill_tokens += prefill;
  stats_.decode_tokens += decode;
  stats_.prefill_seconds += seconds * share;
  stats_.decode_seconds += seconds * (1.0 - share);
}

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.num_preemptions = scheduler_.num_preemptions();
  stats.attention_seconds = model_.attention_seconds();
  return stats;
}

}  // namespace quire::llm
