// The `quire` command: an application with a subcommand for each job. What a subcommand throws
// becomes one line on stderr and exit code 1; mistakes in the command line give 2.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common/output.h"
#include "quire/version.h"

#ifdef QUIRE_WITH_GENERATE
#include "examples/llm/generate_command.h"
#endif

namespace {

constexpr int kFailure = 1;
constexpr int kUsage = 2;

// A descriptor that the caller closed would be given to the next file opened, and what is printed
// would end up in that. Opened so, printing to it fails.
void open_closed_streams() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) < 0) return;
  }
}

// "" unless the command line begins with a word that is no subcommand's name.
std::string unknown_subcommand(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return "";
  std::string known;
  for (const CLI::App* command : app.get_subcommands(nullptr)) {
    if (command->get_name() == argv[1]) return "";
    known += (known.empty() ? "" : ", ") + command->get_name();
  }
  return "unknown subcommand '" + std::string(argv[1]) + "'; one of " + known;
}

int run(int argc, char** argv) {
  CLI::App app("Quire: paged attention for language-model serving", "quire");
  app.set_version_flag("--version", "quire " QUIRE_VERSION_STRING);
  app.require_subcommand(1);

  quire::cli::add_info_command(app);
#ifdef QUIRE_WITH_GENERATE
  quire::llm::add_generate_command(app);
#endif
  quire::cli::add_verify_command(app);
  quire::cli::add_bench_command(app);

  if (const std::string error = unknown_subcommand(app, argc, argv); !error.empty()) {
    std::fprintf(stderr, "quire: error: %s\n", error.c_str());
    return kUsage;
  }
  try {
    app.parse(argc, argv);
    quire::cli::flush_stdout();
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();
  } catch (const CLI::RequiredError& error) {
    // Rather than that a subcommand is missing beside it.
    const std::vector<std::string> unknown = app.remaining();
    if (unknown.empty()) {
      app.exit(error);
    } else {
      app.exit(CLI::ExtrasError(unknown));
    }
    return kUsage;
  } catch (const CLI::ParseError& error) {
    std::ostringstream out;
    const bool asked_for = app.exit(error, out) == 0;  // --help, --version
    quire::cli::print(out.str());
    quire::cli::flush_stdout();
    return asked_for ? 0 : kUsage;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  open_closed_streams();
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "quire: error: %s\n", error.what());
  }
  return kFailure;
}
