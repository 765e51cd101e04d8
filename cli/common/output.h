// Where subcommands write: standard output, files that an option names, a line of progress.
#pragma once

#include <chrono>
#include <string>
#include <string_view>

namespace quire::cli {

// Throws std::runtime_error if anything printed to stdout until now could not be written.
void flush_stdout();

// Prints a text of any length. Throws std::runtime_error if that fails: of a text longer than stdout's
// buffer nothing is left for flush_stdout() to try, and the reason would be lost.
void print(std::string_view text);

// A file that a command writes at its end. It is opened before the work, so that a mistyped path
// does not cost a run, and whatever it is, a link, a device or a FIFO, stays that. What a regular
// file holds stays until write(). A file that was not there goes away again without a write().
class OutputFile {
 public:
  // `option` is the one that named the file, for errors. Throws std::runtime_error if it cannot be
  // opened for writing. Waits for the reader of a FIFO.
  OutputFile(std::string option, std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // The whole content; once. Throws std::runtime_error if it could not be written. A disk that is
  // full is noticed before what a regular file held is touched.
  void write(std::string_view text);

 private:
  [[noreturn]] void fail(int error) const;
  void reserve(std::size_t bytes) const;

  std::string option_;
  std::string path_;
  std::string created_;  // the file behind path_, if it was not there
  int fd_ = -1;
  bool regular_ = false;
};

// One line on stderr that is overwritten, if that is a terminal; else nothing.
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  // Whether anybody would see another line: a tenth of a second has gone by since the last one.
  bool due() const;
  void show(std::string text);
  // Before anything else is printed.
  void clear();

 private:
  bool terminal_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace quire::cli
