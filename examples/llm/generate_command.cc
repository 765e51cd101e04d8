#include "generate_command.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "chat_template.h"
#include "cli/common/options.h"
#include "cli/common/output.h"
#include "device_ops.h"
#include "engine.h"
#include "find_model.h"
#include "generate_output.h"
#include "gguf.h"
#include "model.h"
#include "tokenizer.h"

namespace quire::llm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Used when the command line names no prompt: a system prompt of several blocks, which the
// requests share.
constexpr const char* kBuiltInSystem =
    "You are a helpful assistant. Answer each question clearly and briefly, in a few sentences of "
    "plain English. When the user asks for code, write the code and explain it in one sentence. "
    "When the user asks for a list, write a short list.";
constexpr const char* kBuiltInPrompts[] = {
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "What is photosynthesis?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the difference between a virus and a bacterium?",
    "Why do cats purr?",
};

struct Options {
  std::string model;
  std::vector<std::string> prompts;
  std::string prompts_file;
  std::string system;
  bool has_system = false;
  bool raw = false;
  std::int64_t max_tokens = 128;
  SamplingParams sampling;
  std::int64_t block_size = 16;
  std::int64_t num_blocks = 512;
  std::int64_t max_batch_tokens = 512;
  std::int64_t max_seqs = 32;
  std::string kv_cache_dtype = "auto";
  int threads = 0;
  std::string device = "cpu";
  std::string json;
  bool quiet = false;
};

void read_prompts_file(const std::string& path, std::vector<std::string>& prompts) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("--prompts-file: cannot open " + path);
  const std::size_t before = prompts.size();
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (!line.empty()) prompts.push_back(line);
  }
  if (in.bad()) throw std::runtime_error("--prompts-file: cannot read " + path);
  if (prompts.size() == before) {
    throw std::runtime_error("--prompts-file: expected a prompt on each line, got none in " + path);
  }
}

void choose_prompts(Options& options) {
  if (!options.prompts_file.empty()) read_prompts_file(options.prompts_file, options.prompts);
  if (options.prompts.empty()) {
    options.prompts.assign(std::begin(kBuiltInPrompts), std::end(kBuiltInPrompts));
    if (!options.has_system && !options.raw) {
      options.system = kBuiltInSystem;
      options.has_system = true;
    }
  }
}

// Spells prompts for the model and turns them into tokens.
class PromptEncoder {
 public:
  PromptEncoder(const GgufFile& file, const Tokenizer& tokenizer, const Options& options)
      : tokenizer_(tokenizer), options_(options) {
    if (!options.raw) template_ = std::make_unique<ChatTemplate>(file);
  }

  std::vector<std::int32_t> encode(const std::string& prompt) const {
    if (template_) {
      std::vector<ChatMessage> messages;
      if (options_.has_system) messages.push_back({"system", options_.system});
      messages.push_back({"user", prompt});
      return tokenizer_.encode(template_->render(messages));
    }
    std::vector<std::int32_t> tokens = tokenizer_.encode(prompt);
    const std::int32_t bos = tokenizer_.bos_to_add();
    if (bos >= 0 && (tokens.empty() || tokens.front() != bos)) tokens.insert(tokens.begin(), bos);
    return tokens;
  }

 private:
  const Tokenizer& tokenizer_;
  const Options& options_;
  std::unique_ptr<ChatTemplate> template_;
};

ModelOptions model_options(const Options& options) {
  ModelOptions result;
  result.num_blocks = options.num_blocks;
  result.block_size = options.block_size;
  result.kv_cache_dtype = parse_kv_cache_dtype(options.kv_cache_dtype);
  result.backend = options.device == "reference" ? "reference" : "";
  result.max_batch_tokens = options.max_batch_tokens;
  // Each sequence of a step needs at least one of its tokens.
  result.max_seqs = std::min(options.max_seqs, options.max_batch_tokens);
  return result;
}

void check_vocabulary(const GgufFile& file, const Tokenizer& tokenizer, const Model& model) {
  if (tokenizer.size() != model.config().vocab_size) {
    file.fail("expected an embedding for each of the " + std::to_string(tokenizer.size()) +
              " tokens, got " + std::to_string(model.config().vocab_size));
  }
}

std::vector<Answer> add_requests(const Options& options, const PromptEncoder& encoder,
                                 Engine& engine) {
  std::vector<Answer> answers;
  for (std::size_t i = 0; i < options.prompts.size(); ++i) {
    Request request{encoder.encode(options.prompts[i]), options.max_tokens, options.sampling};
    // Each its own stream of random numbers, the same whichever prompts come after it.
    request.sampling.seed += i;
    engine.add(request);
    answers.push_back({options.prompts[i], {}, FinishReason::kNone, {}});
  }
  return answers;
}

void run(Options options) {
  choose_prompts(options);
  check(options.sampling);  // now rather than after loading the model
  std::optional<cli::OutputFile> json;
  if (!options.json.empty()) json.emplace("--json", options.json);
  const auto load_start = Clock::now();
  const DeviceType device = options.device == "cuda" ? DeviceType::kCuda : DeviceType::kCpu;
  const std::unique_ptr<DeviceOps> ops = make_ops(device, options.threads);
  const std::filesystem::path path = find_model(options.model);
  const GgufFile file = GgufFile::open(path);
  const Tokenizer tokenizer(file);
  const PromptEncoder encoder(file, tokenizer, options);
  Model model(file, *ops, model_options(options));
  check_vocabulary(file, tokenizer, model);
  Engine engine(model, [&](std::int32_t token) { return tokenizer.ends_answer(token); });

  RunReport report;
  report.load_seconds = seconds_since(load_start);
  report.model_path = path.string();
  report.model_name = file.string_or("general.name", path.filename().string());
  std::vector<Answer> answers = add_requests(options, encoder, engine);
  if (!options.quiet) {
    std::fprintf(stderr, "%s: %lld layers, %lld heads, %lld kv heads of %lld; loaded in %.2f s\n",
                 sanitize_utf8(report.model_name).c_str(),
                 static_cast<long long>(model.config().num_layers),
                 static_cast<long long>(model.config().num_heads),
                 static_cast<long long>(model.config().num_kv_heads),
                 static_cast<long long>(model.config().head_size), report.load_seconds);
  }

  const auto start = Clock::now();
  AnswerPrinter printer(answers, tokenizer, options.quiet);
  while (!engine.done()) {
    for (const NewToken& token : engine.step()) printer.add(token);
    printer.show_progress(engine);
  }
  report.total_seconds = seconds_since(start);
  report.device = options.device;
  report.backend = model.backend_name();
  const KvCacheDType cache = model.options().kv_cache_dtype;
  report.kv_cache_dtype =
      cache == KvCacheDType::kAuto ? quire::to_string(ops->dtype()) : quire::to_string(cache);
  report.num_threads = ops->context().threads->num_threads();
  report.block_size = options.block_size;
  report.num_blocks = options.num_blocks;
  report.cache_bytes = model.cache_bytes();
  report.engine = engine.stats();
  report.blocks = engine.block_stats();
  if (!options.quiet) {
    if (answers.size() == 1) std::printf("\n");
    print_table(report);
  }
  if (json) json->write(to_json(report, answers, engine));
}

CLI::Validator whole_number_from_1() { return CLI::Range(std::int64_t{1}, std::int64_t{1} << 40); }

void add_prompt_options(CLI::App& command, Options& options) {
  command
      .add_option("--model", options.model,
                  "GGUF file of a Llama-architecture model (default: $QUIRE_MODEL, else what "
                  "scripts/fetch_model.sh fetched)")
      ->check(cli::not_empty());
  command.add_option("--prompt", options.prompts, "A prompt; may be given several times")
      ->take_all()
      ->expected(1);
  command.add_option("--prompts-file", options.prompts_file, "A file with a prompt on each line")
      ->check(cli::not_empty());
  CLI::Option* system = command.add_option_function<std::string>(
      "--system",
      [&options](const std::string& text) {
        options.system = text;
        options.has_system = true;
      },
      "System prompt (default: the model's own)");
  command.add_flag("--raw", options.raw, "Pass prompts as they are, without a chat template")
      ->excludes(system);
  command.add_option("--max-tokens", options.max_tokens, "Tokens of each answer at most")
      ->check(whole_number_from_1())
      ->capture_default_str();
  command
      .add_option("--temperature", options.sampling.temperature, "0: always the likeliest token")
      ->capture_default_str();
  command
      .add_option("--top-p", options.sampling.top_p,
                  "Sample from the likeliest tokens that hold this probability together")
      ->capture_default_str();
  cli::add_seed_option(command, options.sampling.seed, "Seed; request i has seed + i");
}

void add_engine_options(CLI::App& command, Options& options) {
  const auto count = [&](const char* name, std::int64_t& value, const char* text) {
    command.add_option(name, value, text)->check(whole_number_from_1())->capture_default_str();
  };
  count("--block-size", options.block_size, "Tokens of a cache block");
  count("--num-blocks", options.num_blocks, "Blocks of the paged cache");
  count("--max-batch-tokens", options.max_batch_tokens, "Tokens of a step at most");
  count("--max-seqs", options.max_seqs, "Requests that run at the same time at most");
  command
      .add_option("--kv-cache-dtype", options.kv_cache_dtype,
                  "Of the paged cache; auto: that of the model's computations")
      ->check(cli::kv_cache_dtype_name())
      ->capture_default_str();
  command.add_option("--threads", options.threads, "CPU threads (0: one for each CPU)")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command
      .add_option("--device", options.device,
                  "cpu; cuda: the whole model on the GPU; or reference: attention in float64 by "
                  "plain loops")
      ->check(CLI::IsMember({"cpu", "cuda", "reference"}))
      ->capture_default_str();
  command.add_option("--json", options.json, "Write token ids, texts and figures to this file")
      ->check(cli::not_empty());
  command.add_flag("--quiet", options.quiet, "Print the answers only");
}

}  // namespace

void add_generate_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "generate", "Answer prompts with a language model that runs on Quire's paged attention");
  const auto options = std::make_shared<Options>();
  add_prompt_options(*command, *options);
  add_engine_options(*command, *options);
  command->callback([options] { run(*options); });
}

}  // namespace quire::llm
