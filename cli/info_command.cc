// quire info: what this build can do on this machine, printed from the arrays that the library
// itself dispatches by.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/common/output.h"
#include "quire/quire.h"

namespace quire::cli {
namespace {

using Json = nlohmann::ordered_json;
// A yes-or-no property of a backend: its key in JSON, its name for people, where it is stored.
struct Feature {
  const char* key;
  const char* name;
  bool BackendCapabilities::*member;
};

constexpr Feature kFeatures[] = {
    {"sinks", "attention sinks", &BackendCapabilities::sinks},
    {"alibi", "ALiBi", &BackendCapabilities::alibi},
    {"soft_cap", "logits soft cap", &BackendCapabilities::soft_cap},
    {"sliding_window", "sliding window", &BackendCapabilities::sliding_window},
    {"chunked", "chunked with lookback", &BackendCapabilities::chunked},
    {"bidirectional_ranges", "bidirectional ranges", &BackendCapabilities::bidirectional_ranges},
    {"visible_prefix", "visible prefix plus window", &BackendCapabilities::visible_prefix},
    {"qq_bias", "query-query bias", &BackendCapabilities::qq_bias},
    {"cross_attention", "cross attention", &BackendCapabilities::cross_attention},
    {"encoder_attention", "encoder attention", &BackendCapabilities::encoder_attention},
    {"cascade", "cascade", &BackendCapabilities::cascade},
    {"lse", "lse", &BackendCapabilities::lse},
    {"fp8_output", "fp8 output, static scale", &BackendCapabilities::fp8_output},
    {"block_scale_output", "fp8 output, block scales", &BackendCapabilities::block_scale_output},
    {"batch_invariant", "batch invariance", &BackendCapabilities::batch_invariant},
    {"graph_capture", "graph capture", &BackendCapabilities::graph_capture},
};

template <class Enum>
std::vector<std::string> names_of(const std::vector<Enum>& values) {
  std::vector<std::string> names;
  names.reserve(values.size());
  for (const Enum value : values) {
    names.emplace_back(to_string(value));
  }
  return names;
}

std::string join(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) {
    line += (line.empty() ? "" : ", ") + word;
  }
  return line;
}

Json to_json(const AttentionBackend& backend) {
  const BackendCapabilities& c = backend.capabilities();
  Json features = Json::object();
  for (const Feature& feature : kFeatures) {
    features[feature.key] = c.*feature.member;
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
      {"features", features},
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

// The supported table: one line a property, one column a backend. The same on every machine;
// README.md shows it, and a test compares the two.
class Table {
 public:
  void add_row(std::vector<std::string> cells) {
    widths_.resize(std::max(widths_.size(), cells.size()));
    for (std::size_t i = 0; i < cells.size(); ++i) {
      widths_[i] = std::max(widths_[i], cells[i].size());
    }
    rows_.push_back(std::move(cells));
  }

  // As a Markdown table; the first row is its head.
  void print() const {
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      print_row(rows_[r], ' ');
      if (r == 0) {
        print_row(std::vector<std::string>(widths_.size()), '-');
      }
    }
  }

 private:
  void print_row(const std::vector<std::string>& cells, char fill) const {
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::string padding(widths_[i] - cells[i].size(), fill);
      std::printf("| %s%s ", cells[i].c_str(), padding.c_str());
    }
    std::printf("|\n");
  }

  std::vector<std::vector<std::string>> rows_;
  std::vector<std::size_t> widths_;
};

template <class Cell>
void add_property(Table& table, const char* name, const Cell& cell) {
  std::vector<std::string> cells = {name};
  for (const AttentionBackend* backend : attention_backends()) {
    cells.push_back(cell(*backend));
  }
  table.add_row(std::move(cells));
}

void print_text() {
  const int num_threads = default_thread_pool().num_threads();
  std::printf("quire %s, %d threads", QUIRE_VERSION_STRING, num_threads);
  if (num_threads < default_num_threads()) {
    std::printf(" (asked for %d, which the system does not start)", default_num_threads());
  }
  std::printf("\n");
  for (const AttentionBackend* backend : attention_backends()) {
    const std::string text = backend->instruction_set();
    std::printf("backend %s: %s\n", backend->name(),
                backend->available() ? text.c_str()
                                     : ("not available (" + text + "): the CPU serves").c_str());
  }
  std::printf("\n");

  Table table;
  add_property(table, "backend", [](const auto& b) { return std::string(b.name()); });
  add_property(table, "device", [](const auto& b) {
    return to_string(Device{b.device_type(), 0});
  });
  add_property(table, "query dtypes",
               [](const auto& b) { return join(names_of(b.capabilities().dtypes)); });
  add_property(table, "cache dtypes",
               [](const auto& b) { return join(names_of(b.capabilities().kv_cache_dtypes)); });
  add_property(table, "output dtypes",
               [](const auto& b) { return join(names_of(b.capabilities().output_dtypes)); });
  add_property(table, "head sizes", [](const auto& b) {
    const BackendCapabilities& c = b.capabilities();
    std::string cell = std::to_string(c.min_head_size) + " to " + std::to_string(c.max_head_size);
    return c.head_size_multiple == 1
               ? cell
               : cell + ", multiples of " + std::to_string(c.head_size_multiple);
  });
  add_property(table, "block sizes", [](const auto& b) {
    const BackendCapabilities& c = b.capabilities();
    const std::string cell = "1 to " + std::to_string(c.max_block_size);
    return c.block_size_multiple == 1
               ? cell
               : cell + ", multiples of " + std::to_string(c.block_size_multiple);
  });
  for (const Feature& feature : kFeatures) {
    add_property(table, feature.name, [&feature](const auto& b) {
      return std::string(b.capabilities().*feature.member ? "yes" : "-");
    });
  }
  table.print();
}

void print_kernels() {
  Table table;
  table.add_row({"backend", "kernel", "serves"});
  for (const AttentionBackend* backend : attention_backends()) {
    for (const KernelInfo& kernel : backend->kernel_table()) {
      table.add_row({backend->name(), kernel.name, kernel.serves});
    }
  }
  table.print();
}

struct Options {
  bool json = false;
  bool kernels = false;
};

void run(const Options& options) {
  if (options.json) {
    print_json();
  } else if (options.kernels) {
    print_kernels();
  } else {
    print_text();
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
