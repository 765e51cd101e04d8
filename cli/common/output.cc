#include "cli/common/output.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace quire::cli {

namespace {

[[noreturn]] void fail_on_stdout(int error) {
  throw std::runtime_error("cannot write to standard output" +
                           (error != 0 ? std::string(": ") + std::strerror(error) : ""));
}

}  // namespace

void flush_stdout() {
  errno = 0;
  const bool written = std::fflush(stdout) == 0;
  if (written && std::ferror(stdout) == 0) return;
  fail_on_stdout(errno);  // 0 of an earlier print: its reason is not known any more
}

void print(std::string_view text) {
  errno = 0;
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) fail_on_stdout(errno);
}

OutputFile::OutputFile(std::string option, std::string path)
    : option_(std::move(option)), path_(std::move(path)) {
  struct stat status {};
  const bool exists = ::stat(path_.c_str(), &status) == 0;
  // Without O_CREAT where it exists: Linux may refuse that in folders that all may write to.
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY | (exists ? 0 : O_CREAT), 0666);
  if (fd_ < 0) fail(errno);
  if (!exists) {
    std::error_code error;
    created_ = std::filesystem::canonical(path_, error);  // of a link its target
  }
  if (::fstat(fd_, &status) != 0) fail(errno);
  regular_ = S_ISREG(status.st_mode);
  struct stat out {};
  if (regular_ && ::fstat(STDOUT_FILENO, &out) == 0 && out.st_dev == status.st_dev &&
      out.st_ino == status.st_ino) {
    // /dev/stdout, redirected to a file: after what has been printed, not over it.
    ::close(std::exchange(fd_, ::dup(STDOUT_FILENO)));
    regular_ = false;
  }
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!created_.empty()) ::unlink(created_.c_str());
}

void OutputFile::write(std::string_view text) {
  flush_stdout();
  if (regular_) reserve(text.size());
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t count = ::write(fd_, rest.data(), rest.size());
    if (count < 0 && errno != EINTR) fail(errno);
    if (count > 0) rest.remove_prefix(static_cast<std::size_t>(count));
  }
  if (regular_ && ::ftruncate(fd_, static_cast<off_t>(text.size())) != 0) fail(errno);
  if (::close(std::exchange(fd_, -1)) != 0) fail(errno);
  created_.clear();
}

void OutputFile::reserve(std::size_t bytes) const {
  struct stat status {};
  if (::fstat(fd_, &status) != 0) fail(errno);
  const int error = ::posix_fallocate(fd_, 0, static_cast<off_t>(bytes));
  if (error != ENOSPC && error != EDQUOT && error != EFBIG) return;  // done, or not known there
  if (::ftruncate(fd_, status.st_size) != 0) fail(errno);
  fail(error);
}

void OutputFile::fail(int error) const {
  throw std::runtime_error(option_ + ": cannot write " + path_ + ": " + std::strerror(error));
}

ProgressLine::ProgressLine() : terminal_(isatty(STDERR_FILENO) == 1) {}

bool ProgressLine::due() const {
  return terminal_ && std::chrono::steady_clock::now() - last_ >= std::chrono::milliseconds(100);
}

void ProgressLine::show(std::string text) {
  if (!terminal_) return;
  last_ = std::chrono::steady_clock::now();
  // A line that wraps cannot be overwritten.
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 &&
      text.size() >= size.ws_col) {
    text.resize(size.ws_col - 1U);
  }
  std::fprintf(stderr, "\r\x1b[K%s", text.c_str());
  std::fflush(stderr);
  shown_ = true;
}

void ProgressLine::clear() {
  if (!shown_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
  shown_ = false;
}

}  // namespace quire::cli
