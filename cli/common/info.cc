#include "cli/common/info.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace quire::cli {
namespace {

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

std::string join(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) {
    line += (line.empty() ? "" : ", ") + word;
  }
  return line;
}

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
  std::string text() const {
    std::string text;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      text += row_text(rows_[r], ' ');
      if (r == 0) {
        text += row_text(std::vector<std::string>(widths_.size()), '-');
      }
    }
    return text;
  }

 private:
  std::string row_text(const std::vector<std::string>& cells, char fill) const {
    std::string text;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      text += "| " + cells[i] + std::string(widths_[i] - cells[i].size(), fill) + " ";
    }
    return text + "|\n";
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

std::string head_text() {
  const int num_threads = default_thread_pool().num_threads();
  const int asked_for = default_num_threads();
  std::string text = "quire " QUIRE_VERSION_STRING ", " + std::to_string(num_threads) + " threads";
  if (num_threads < asked_for) {
    text += " (asked for " + std::to_string(asked_for) + ", which the system does not start)";
  }
  text += "\n";
  for (const AttentionBackend* backend : attention_backends()) {
    const std::string runs_on = backend->instruction_set();
    text += std::string("backend ") + backend->name() + ": " +
            (backend->available() ? runs_on : "not available (" + runs_on + "): the CPU serves") +
            "\n";
  }
  return text;
}

// For builds with CUDA.
std::string block_advice() {
  const auto& backends = attention_backends();
  const bool has_cuda = std::any_of(backends.begin(), backends.end(), [](const auto* backend) {
    return backend->device_type() == DeviceType::kCuda;
  });
  if (!has_cuda) return "";
  return "\nOn an H100 cache blocks at distances that are multiples of 320 KiB are read at 0.8 of "
         "the\n"
         "bandwidth, on an H200 those of 3,008 KiB at 0.7 (a half, a fourth: 0.85, 0.91): pad "
         "them, as\n"
         "advised_block_bytes() of quire/backend.h says.\n";
}

}  // namespace

std::span<const Feature> features() { return kFeatures; }

std::string info_text() {
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
  for (const Feature& feature : features()) {
    add_property(table, feature.name, [&feature](const auto& b) {
      return std::string(b.capabilities().*feature.member ? "yes" : "-");
    });
  }
  return head_text() + "\n" + table.text() + block_advice();
}

std::string kernels_text() {
  Table table;
  table.add_row({"backend", "kernel", "serves"});
  for (const AttentionBackend* backend : attention_backends()) {
    for (const KernelInfo& kernel : backend->kernel_table()) {
      table.add_row({backend->name(), kernel.name, kernel.serves});
    }
  }
  return table.text();
}

}  // namespace quire::cli
