// The `quire` command: an application with a subcommand for each job. What a subcommand throws
// becomes one line on stderr and exit code 1; mistakes in the command line give 2.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "cli/commands.h"
#include "quire/version.h"

#ifdef QUIRE_WITH_GENERATE
#include "examples/llm/generate_command.h"
#endif

namespace {

constexpr int kFailure = 1;
constexpr int kUsage = 2;

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

  try {
    app.parse(argc, argv);
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "quire: error: %s\n", error.what());
  }
  return kFailure;
}
