#include "generate_output.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string_view>

namespace quire::llm {
namespace {

using Clock = std::chrono::steady_clock;

double rate(std::int64_t count, double seconds) {
  return seconds > 0.0 ? static_cast<double>(count) / seconds : 0.0;
}

double attention_share(const RunReport& report) {
  const double total = report.engine.prefill_seconds + report.engine.decode_seconds;
  return total > 0.0 ? report.engine.attention_seconds / total : 0.0;
}

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone: return "none";
    case FinishReason::kEndToken: return "stop";
    case FinishReason::kLength: return "length";
  }
  return "?";
}

void put(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

}  // namespace

AnswerPrinter::AnswerPrinter(std::vector<Answer>& answers, const Tokenizer& tokenizer, bool quiet)
    : answers_(answers), tokenizer_(tokenizer), quiet_(quiet), start_(Clock::now()) {}

void AnswerPrinter::add(const NewToken& token) {
  const auto index = static_cast<std::size_t>(token.request);
  Answer& answer = answers_[index];
  ++num_tokens_;
  std::string text = answer.stream.push(tokenizer_.bytes(token.token));
  answer.finish = token.finish;
  const bool complete = token.finish != FinishReason::kNone;
  if (complete) {
    text += answer.stream.finish();
    ++num_complete_;
  }
  answer.text += text;
  if (answers_.size() == 1) {
    put(text);
    if (complete) put("\n");
    cli::flush_stdout();
  } else if (complete) {
    print_whole(index);
  }
}

void AnswerPrinter::print_whole(std::size_t index) {
  const Answer& answer = answers_[index];
  progress_.clear();
  put("[" + std::to_string(index + 1) + "/" + std::to_string(answers_.size()) + "] " +
      sanitize_utf8(answer.prompt) + "\n");
  put(answer.text);
  put(answer.finish == FinishReason::kLength ? " [...]\n\n" : "\n\n");
  cli::flush_stdout();
}

void AnswerPrinter::show_progress(const Engine& engine) {
  if (quiet_ || answers_.size() == 1 || !progress_.due()) return;
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  char line[256];
  std::snprintf(line, sizeof line,
                "%zu of %zu answered, %lld running, %lld waiting; %lld tokens, %.0f/s; "
                "%lld blocks used",
                num_complete_, answers_.size(), static_cast<long long>(engine.num_running()),
                static_cast<long long>(engine.num_waiting()), static_cast<long long>(num_tokens_),
                rate(num_tokens_, seconds), static_cast<long long>(engine.block_stats().used));
  progress_.show(line);
}

void print_table(const RunReport& report) {
  const EngineStats& engine = report.engine;
  const BlockStats& blocks = report.blocks;
  const std::int64_t tokens_reused = blocks.reused * report.block_size;
  std::printf("%-10s %10s %10s %10s\n", "", "tokens", "seconds", "tokens/s");
  const auto row = [](const char* name, std::int64_t tokens, double seconds) {
    std::printf("%-10s %10lld %10.2f %10.1f\n", name, static_cast<long long>(tokens), seconds,
                rate(tokens, seconds));
  };
  row("prefill", engine.prefill_tokens, engine.prefill_seconds);
  row("decode", engine.decode_tokens, engine.decode_seconds);
  std::printf(
      "blocks     %lld of %lld used at most, %lld of them shared at most; a prefix block "
      "was found %lld times (%lld tokens not computed)\n",
      static_cast<long long>(blocks.peak_used), static_cast<long long>(report.num_blocks),
      static_cast<long long>(blocks.peak_shared), static_cast<long long>(blocks.reused),
      static_cast<long long>(tokens_reused));
  std::printf("cache      %s, blocks of %lld tokens, %.1f MiB; %lld preemptions\n",
              report.kv_cache_dtype.c_str(), static_cast<long long>(report.block_size),
              static_cast<double>(report.cache_bytes) / (1 << 20),
              static_cast<long long>(engine.num_preemptions));
  const std::string threads =
      report.device == "cuda" ? "" : ", " + std::to_string(report.num_threads) + " threads";
  std::printf("attention  %.1f %% of the model's time (backend %s%s)\n",
              100.0 * attention_share(report), report.backend.c_str(), threads.c_str());
  std::printf("total      %.2f s in %lld steps, after %.2f s of loading\n", report.total_seconds,
              static_cast<long long>(engine.num_steps), report.load_seconds);
}

std::string to_json(const RunReport& report, const std::vector<Answer>& answers,
                    const Engine& engine) {
  using Json = nlohmann::ordered_json;
  Json requests = Json::array();
  for (std::size_t i = 0; i < answers.size(); ++i) {
    const Sequence& sequence = engine.sequence(static_cast<std::int64_t>(i));
    const auto middle = sequence.tokens.begin() + sequence.num_prompt;
    requests.push_back({{"prompt", sanitize_utf8(answers[i].prompt)},
                        {"text", answers[i].text},
                        {"finish_reason", to_string(answers[i].finish)},
                        {"prompt_tokens", std::vector(sequence.tokens.begin(), middle)},
                        {"tokens", std::vector(middle, sequence.tokens.end())},
                        {"prompt_tokens_reused", sequence.num_reused}});
  }
  const EngineStats& stats = report.engine;
  const Json document = {
      {"model", {{"file", sanitize_utf8(report.model_path)}, {"name", report.model_name}}},
      {"device", report.device},
      {"backend", report.backend},
      {"threads", report.num_threads},
      {"kv_cache_dtype", report.kv_cache_dtype},
      {"block_size", report.block_size},
      {"num_blocks", report.num_blocks},
      {"requests", requests},
      {"figures",
       {{"load_seconds", report.load_seconds},
        {"total_seconds", report.total_seconds},
        {"steps", stats.num_steps},
        {"preemptions", stats.num_preemptions},
        {"prefill_tokens", stats.prefill_tokens},
        {"prefill_seconds", stats.prefill_seconds},
        {"prefill_tokens_per_second", rate(stats.prefill_tokens, stats.prefill_seconds)},
        {"decode_tokens", stats.decode_tokens},
        {"decode_seconds", stats.decode_seconds},
        {"decode_tokens_per_second", rate(stats.decode_tokens, stats.decode_seconds)},
        {"sampling_seconds", stats.sampling_seconds},
        {"attention_seconds", stats.attention_seconds},
        {"attention_share", attention_share(report)},
        {"blocks_used_peak", report.blocks.peak_used},
        {"blocks_shared_peak", report.blocks.peak_shared},
        {"blocks_reused", report.blocks.reused},
        {"cache_bytes", report.cache_bytes}}},
  };
  return document.dump(2) + '\n';
}

}  // namespace quire::llm
