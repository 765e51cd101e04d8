// What `quire generate` shows: answers as they come, progress, the closing table, JSON.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cli/common/output.h"
#include "engine.h"
#include "tokenizer.h"
#include "utf8.h"

namespace quire::llm {

// One request as the user sees it.
struct Answer {
  std::string prompt;
  std::string text;
  FinishReason finish = FinishReason::kNone;
  Utf8Stream stream;
};

// Everything about a run that is told at its end.
struct RunReport {
  std::string model_path;
  std::string model_name;
  std::string device;
  std::string backend;
  std::string kv_cache_dtype;
  int num_threads = 0;
  std::int64_t block_size = 0;
  std::int64_t num_blocks = 0;
  std::int64_t cache_bytes = 0;
  double load_seconds = 0.0;
  double total_seconds = 0.0;  // from the first step to the last
  EngineStats engine;
  BlockStats blocks;
};

// Writes answers to stdout, and throws as soon as that fails. A single one appears token by token. Of several, each appears whole
// when it is complete; meanwhile a line on stderr, if that is a terminal, says how far they are.
class AnswerPrinter {
 public:
  AnswerPrinter(std::vector<Answer>& answers, const Tokenizer& tokenizer, bool quiet);

  void add(const NewToken& token);
  void show_progress(const Engine& engine);

 private:
  void print_whole(std::size_t index);

  std::vector<Answer>& answers_;
  const Tokenizer& tokenizer_;
  bool quiet_;
  cli::ProgressLine progress_;
  std::int64_t num_tokens_ = 0;
  std::size_t num_complete_ = 0;
  std::chrono::steady_clock::time_point start_;
};

void print_table(const RunReport& report);

// Everything of the run as a JSON document.
std::string to_json(const RunReport& report, const std::vector<Answer>& answers,
                    const Engine& engine);

}  // namespace quire::llm
