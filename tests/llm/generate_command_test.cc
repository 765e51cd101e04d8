// `quire generate` from its command line to its JSON, over a small random model.
#include "examples/llm/generate_command.h"

#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/llm/devices.h"
#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

namespace fs = std::filesystem;

class GenerateCommand : public testing::Test {
 protected:
  void SetUp() override {
    // ctest runs tests of one program side by side.
    const std::string test = testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = fs::path(testing::TempDir()) / ("quire_generate_" + test);
    fs::create_directories(folder_);
    GgufWriter writer = tiny_model_writer({}, kTinyTokenizerVocab);
    add_tiny_tokenizer(writer);
    const std::vector<std::byte> bytes = writer.bytes();
    std::ofstream(folder_ / "model.gguf", std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  void TearDown() override { fs::remove_all(folder_); }

  nlohmann::json run(const std::string& device) {
    const std::string json = (folder_ / (device + ".json")).string();
    std::vector<std::string> arguments = {
        "generate", "--model",    (folder_ / "model.gguf").string(),
        "--raw",    "--quiet",    "--max-tokens",
        "40",       "--threads",  "2",
        "--device", device,       "--json",
        json,       "--prompt",   "hello",
        "--prompt", "good day",   "--prompt",
        "hell",     "--max-seqs", "2"};
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants a vector
    fs::create_symlink(device + ".target.json", json);
    CLI::App app;
    add_generate_command(app);
    testing::internal::CaptureStdout();  // random bytes, for the most part
    app.parse(arguments);
    EXPECT_NE(testing::internal::GetCapturedStdout().find("[1/3] hello\n"), std::string::npos);
    EXPECT_TRUE(fs::is_symlink(json)) << "written to what it leads to";
    std::ifstream in(json);
    return nlohmann::json::parse(in);
  }

  static std::vector<std::vector<std::int32_t>> tokens(const nlohmann::json& result) {
    std::vector<std::vector<std::int32_t>> all;
    for (const auto& request : result.at("requests")) {
      all.push_back(request.at("tokens").get<std::vector<std::int32_t>>());
    }
    return all;
  }

  fs::path folder_;
};

TEST_F(GenerateCommand, GivesTheSameTokensByFloat64Attention) {
  const nlohmann::json cpu = run("cpu");
  const nlohmann::json reference = run("reference");
  EXPECT_EQ(cpu.at("backend"), "cpu");
  EXPECT_EQ(reference.at("backend"), "reference");
  ASSERT_EQ(tokens(cpu).size(), 3U);
  EXPECT_EQ(tokens(cpu), tokens(reference));
}

TEST_F(GenerateCommand, EndsWhereItsAnswersCannotBeWritten) {
  const std::string json = (folder_ / "old.json").string();
  std::ofstream(json) << "old";
  // Of the many tokens only the first would be computed.
  std::vector<std::string> arguments = {json,          "--json",  "hello",
                                        "--prompt",    "2000",    "--max-tokens",
                                        "--threads=1", "--raw",   (folder_ / "model.gguf").string(),
                                        "--model",     "generate"};
  EXPECT_EXIT(
      {
        CLI::App app;
        add_generate_command(app);
        std::string error;
        if (std::freopen("/dev/full", "w", stdout) != nullptr) {
          try {
            app.parse(arguments);
          } catch (const std::runtime_error& thrown) {
            error = thrown.what();
          }
        }
        std::_Exit(error == "cannot write to standard output: No space left on device" ? 0 : 1);
      },
      testing::ExitedWithCode(0), "");
  std::ifstream in(json);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "old");
}

#if QUIRE_CUDA
TEST_F(GenerateCommand, GivesTheSameTokensOnCuda) {
  if (const std::string reason = missing(DeviceType::kCuda); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const nlohmann::json cuda = run("cuda");
  EXPECT_EQ(cuda.at("device"), "cuda");
  EXPECT_EQ(cuda.at("backend"), "cuda");
  EXPECT_GT(cuda.at("figures").at("attention_seconds"), 0.0);
  EXPECT_EQ(tokens(cuda), tokens(run("cpu")));
}
#endif

}  // namespace
}  // namespace quire::llm
