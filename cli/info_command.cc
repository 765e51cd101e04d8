// quire info: what this build can do on this machine.
#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/common/info.h"
#include "cli/common/output.h"
#include "quire/quire.h"

namespace quire::cli {
namespace {

using Json = nlohmann::ordered_json;

Json to_json(const AttentionBackend& backend) {
  const BackendCapabilities& c = backend.capabilities();
  Json flags = Json::object();
  for (const Feature& feature : features()) {
    flags[feature.key] = c.*feature.member;
  }
  Json kernels = Json::array();
  for (const KernelInfo& kernel : backend.kernel_table()) {
    kernels.push_back({{"name", kernel.name}, {"serves", kernel.serves}});
  }
  return {
      {"name", backend.name()},
      {"device", to_string(Device{backend.device_type(), 0})},
      {"available", backend.available()},
      {"instruction_set", backend.instruction_set()},
      {"dtypes", names_of(c.dtypes)},
      {"kv_cache_dtypes", names_of(c.kv_cache_dtypes)},
      {"output_dtypes", names_of(c.output_dtypes)},
      {"head_size",
       {{"min", c.min_head_size}, {"max", c.max_head_size}, {"multiple", c.head_size_multiple}}},
      {"block_size_multiple", c.block_size_multiple},
      {"max_block_size", c.max_block_size},
      {"features", flags},
      {"kernels", kernels},
  };
}

void print_json() {
  Json backends = Json::array();
  for (const AttentionBackend* backend : attention_backends()) {
    backends.push_back(to_json(*backend));
  }
  const Json info = {{"version", QUIRE_VERSION_STRING},
                     {"threads", default_thread_pool().num_threads()},
                     {"threads_asked_for", default_num_threads()},
                     {"backends", backends}};
  print(info.dump(2) + "\n");
}

struct Options {
  bool json = false;
  bool kernels = false;
};

void run(const Options& options) {
  if (options.json) {
    print_json();
  } else if (options.kernels) {
    print(kernels_text());
  } else {
    print(info_text());
  }
}

}  // namespace

void add_info_command(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("info", "Version, backends, devices and what each backend supports");
  const auto options = std::make_shared<Options>();
  command->add_flag("--json", options->json, "Print JSON, everything included");
  command->add_flag("--kernels", options->kernels,
                    "Print the CUDA kernels in this build instead, and which calls each serves");
  command->callback([options] { run(*options); });
}

}  // namespace quire::cli
