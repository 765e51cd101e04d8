// OutputFile: what --json PATH does with what is at PATH.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cli/common/output.h"

namespace quire::cli {
namespace {

namespace fs = std::filesystem;

class OutputFileTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string test = testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = fs::path(testing::TempDir()) / ("quire_output_" + test);
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const char* name) const { return (folder_ / name).string(); }

  std::string make_file(const char* name, const std::string& text) const {
    std::ofstream(path(name)) << text;
    return path(name);
  }

  static std::string content(const std::string& file) {
    std::ifstream in(file);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  static std::string error_of(const std::string& file, const std::string& text) {
    try {
      OutputFile("--json", file).write(text);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(OutputFileTest, ReplacesTheContentOfTheSameFile) {
  const std::string file = make_file("old", std::string(1000, 'x'));  // longer than the new one
  fs::permissions(file, fs::perms::owner_read | fs::perms::owner_write);
  fs::create_hard_link(file, path("other name"));
  fs::create_symlink("old", path("link"));
  for (const std::string& to : {file, path("link"), path("other name")}) {
    OutputFile(std::string("--json"), to).write("new " + to);
    EXPECT_EQ(content(file), "new " + to);
  }
  EXPECT_TRUE(fs::is_symlink(path("link")));
  EXPECT_EQ(fs::hard_link_count(file), 2U);
  EXPECT_EQ(fs::status(file).permissions(), fs::perms::owner_read | fs::perms::owner_write);
}

TEST_F(OutputFileTest, TouchesNothingBeforeTheWrite) {
  const std::string file = make_file("old", "old");
  { const OutputFile output("--json", file); }
  EXPECT_EQ(content(file), "old");
}

TEST_F(OutputFileTest, LeavesNoFileBehindThatWasNeverWritten) {
  fs::create_symlink("target", path("link"));
  for (const char* name : {"new", "link"}) {
    {
      const OutputFile output("--json", path(name));
      EXPECT_TRUE(fs::exists(path(name))) << "opened at once";
    }
    EXPECT_FALSE(fs::exists(path(name))) << name;
  }
  EXPECT_TRUE(fs::is_symlink(path("link")));
  OutputFile("--json", path("link")).write("new");
  EXPECT_EQ(content(path("target")), "new");
}

TEST_F(OutputFileTest, KeepsTheOldContentWhereTheNewOneDoesNotFit) {
  const std::string file = make_file("old", "old");
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limits{1000, 1000};
    const bool limited =
        setrlimit(RLIMIT_FSIZE, &limits) == 0 && std::signal(SIGXFSZ, SIG_IGN) != SIG_ERR;
    const std::string error = error_of(file, std::string(5000, 'x'));
    std::fprintf(stderr, "%s\n", error.c_str());
    _exit(limited && error.find(": cannot write ") != std::string::npos ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(content(file), "old");
}

TEST_F(OutputFileTest, WritesToAFifo) {
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  std::future<std::string> reader =
      std::async(std::launch::async, [&] { return content(path("fifo")); });
  OutputFile("--json", path("fifo")).write("through the FIFO");
  EXPECT_EQ(reader.get(), "through the FIFO");
  EXPECT_TRUE(fs::is_fifo(path("fifo")));
}

// On nodes of its own where it could do harm: a mistake of OutputFile, run by root, would leave the
// machine without its /dev/null.
TEST_F(OutputFileTest, WritesToDevices) {
  std::string null = "/dev/null";
  std::string full = "/dev/full";
  if (geteuid() == 0) {
    null = path("null");
    full = path("full");
    if (mknod(null.c_str(), S_IFCHR | 0600, makedev(1, 3)) != 0 ||
        mknod(full.c_str(), S_IFCHR | 0600, makedev(1, 7)) != 0 || !std::ofstream(null).is_open()) {
      GTEST_SKIP() << "root may not make devices in " << folder_;
    }
  }
  fs::create_symlink(null, path("link"));
  OutputFile("--json", path("link")).write("text");
  OutputFile("--json", null).write("text");
  EXPECT_TRUE(fs::is_symlink(path("link")));
  EXPECT_TRUE(fs::is_character_file(null));
  EXPECT_EQ(error_of(full, "text"), "--json: cannot write " + full + ": No space left on device");
  EXPECT_TRUE(fs::is_character_file(full));
}

// Standard output redirected to a file: what was printed before stays.
TEST_F(OutputFileTest, WritesToStandardOutputAfterWhatWasPrinted) {
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen(path("out").c_str(), "w", stdout) == nullptr) _exit(1);
    OutputFile output("--json", "/proc/self/fd/1");  // what /dev/stdout leads to
    std::fputs("table\n", stdout);
    output.write("{}\n");
    std::fputs("end\n", stdout);
    std::fflush(stdout);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(content(path("out")), "table\n{}\nend\n");
}

TEST_F(OutputFileTest, SaysWhatCannotBeWritten) {
  EXPECT_EQ(error_of(folder_.string(), "text"),
            "--json: cannot write " + folder_.string() + ": Is a directory");
  EXPECT_EQ(error_of(path("no/such/folder"), "text"),
            "--json: cannot write " + path("no/such/folder") + ": No such file or directory");
}

}  // namespace
}  // namespace quire::cli
