#include "bench/workload.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace quire::bench {
namespace {

using Json = nlohmann::json;

// Bounds that keep every product below in 63 bits and catch typing errors.
constexpr std::int64_t kMaxSequences = 1 << 20;
constexpr std::int64_t kMaxLength = 1 << 26;
constexpr std::int64_t kMaxHeads = 1 << 12;
constexpr std::int64_t kMaxHeadSize = 1 << 12;

// Up to this many query rows a sequence counts as decoding (speculative decoding included) when a
// batch is scaled: its cost is its length, not the square of it.
constexpr std::int64_t kMaxDecodeQueryLen = 16;

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw std::runtime_error(where + ": " + what);
}

const Json& member(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) fail(where, "expected an object");
  const auto found = object.find(key);
  if (found == object.end()) fail(where, std::string("\"") + key + "\" is missing");
  return *found;
}

std::int64_t to_integer(const Json& value, std::int64_t lowest, std::int64_t highest,
                        const std::string& where) {
  if (!value.is_number_integer()) fail(where, "expected an integer, got " + value.dump());
  // Through double: an unsigned number past 2^63 must not wrap into the range.
  const double number = value.get<double>();
  if (!(number >= static_cast<double>(lowest) && number <= static_cast<double>(highest))) {
    fail(where, "expected " + std::to_string(lowest) + " to " + std::to_string(highest) + ", got " +
                    value.dump());
  }
  return value.get<std::int64_t>();
}

std::int64_t integer_member(const Json& object, const char* key, std::int64_t lowest,
                            std::int64_t highest, const std::string& where) {
  return to_integer(member(object, key, where), lowest, highest, where + "." + key);
}

std::string string_member(const Json& object, const char* key, const std::string& where) {
  const Json& value = member(object, key, where);
  if (!value.is_string()) fail(where + "." + key, "expected a string, got " + value.dump());
  return value.get<std::string>();
}

Model parse_model(const std::string& name, const Json& json, const std::string& where) {
  Model model;
  model.name = name;
  model.num_heads = integer_member(json, "num_heads", 1, kMaxHeads, where);
  model.num_kv_heads = integer_member(json, "num_kv_heads", 1, kMaxHeads, where);
  model.head_size = integer_member(json, "head_size", 1, kMaxHeadSize, where);
  if (model.num_heads % model.num_kv_heads != 0) {
    fail(where + ".num_kv_heads", "expected a divisor of num_heads " +
                                      std::to_string(model.num_heads) + ", got " +
                                      std::to_string(model.num_kv_heads));
  }
  if (!member(json, "sliding_window", where).is_null()) {
    model.sliding_window = integer_member(json, "sliding_window", 1, kMaxLength, where);
  }
  const Json& soft_cap = member(json, "soft_cap", where);
  if (!soft_cap.is_number() || !(soft_cap.get<double>() >= 0.0)) {
    fail(where + ".soft_cap", "expected a number >= 0, got " + soft_cap.dump());
  }
  model.soft_cap = soft_cap.get<float>();
  const Json& sinks = member(json, "sinks", where);
  if (!sinks.is_boolean()) fail(where + ".sinks", "expected true or false, got " + sinks.dump());
  model.sinks = sinks.get<bool>();
  return model;
}

std::vector<Sequence> parse_batch(const Json& json, const std::string& where) {
  if (!json.is_array() || json.empty() || json.size() > kMaxSequences) {
    fail(where, "expected a list of 1 to " + std::to_string(kMaxSequences) + " sequences");
  }
  std::vector<Sequence> batch;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const std::string here = where + "[" + std::to_string(i) + "]";
    if (!json[i].is_array() || json[i].size() != 2) {
      fail(here, "expected [query_len, seq_len], got " + json[i].dump());
    }
    Sequence sequence;
    sequence.seq_len = to_integer(json[i][1], 1, kMaxLength, here + "[1]");
    sequence.query_len = to_integer(json[i][0], 1, sequence.seq_len, here + "[0]");
    batch.push_back(sequence);
  }
  return batch;
}

std::int64_t shortest_context(const std::vector<Sequence>& batch) {
  std::int64_t shortest = kMaxLength;
  for (const Sequence& s : batch) shortest = std::min(shortest, s.seq_len - s.query_len);
  return shortest;
}

void check_stored(const Json& json, const char* key, std::int64_t computed,
                  const std::string& where) {
  const std::int64_t stored = integer_member(json, key, 0, INT64_MAX, where);
  if (stored != computed) {
    fail(where + "." + key,
         "expected " + std::to_string(computed) + " by definition, got " + std::to_string(stored));
  }
}

Json parse_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail(path, "cannot be opened");
  try {
    return Json::parse(file);
  } catch (const std::exception& error) {  // of JSON, or of reading, as a directory is
    fail(path, error.what());
  }
}

}  // namespace

std::int64_t Workload::num_tokens() const {
  return std::accumulate(batch.begin(), batch.end(), std::int64_t{0},
                         [](std::int64_t sum, const Sequence& s) { return sum + s.query_len; });
}

std::int64_t Workload::max_query_len() const {
  std::int64_t longest = 0;
  for (const Sequence& s : batch) longest = std::max(longest, s.query_len);
  return longest;
}

std::int64_t Workload::max_seq_len() const {
  std::int64_t longest = 0;
  for (const Sequence& s : batch) longest = std::max(longest, s.seq_len);
  return longest;
}

std::int64_t visible_pairs(const Sequence& sequence, std::int64_t sliding_window) {
  // The row at position p sees p + 1 keys, the window cuts that to its size.
  const std::int64_t first = sequence.seq_len - sequence.query_len + 1;
  const std::int64_t last = sequence.seq_len;
  const auto sum = [](std::int64_t begin, std::int64_t end) {  // of the integers [begin, end]
    return begin > end ? 0 : (begin + end) * (end - begin + 1) / 2;
  };
  if (sliding_window == 0 || last <= sliding_window) return sum(first, last);
  const std::int64_t first_cut = std::max(first, sliding_window + 1);
  return sum(first, sliding_window) + (last - first_cut + 1) * sliding_window;
}

std::int64_t needed_keys(const Sequence& sequence, std::int64_t sliding_window) {
  if (sliding_window == 0) return sequence.seq_len;
  return std::min(sequence.seq_len, sequence.query_len + sliding_window - 1);
}

std::int64_t flops(const Workload& workload) {
  std::int64_t pairs = 0;
  for (const Sequence& s : workload.batch) pairs += visible_pairs(s, workload.model.sliding_window);
  return 4 * pairs * workload.model.num_heads * workload.model.head_size;
}

std::int64_t bytes(const Workload& workload, const ElementSizes& sizes) {
  const Model& model = workload.model;
  std::int64_t keys = 0;
  for (const Sequence& s : workload.batch) {
    keys += needed_keys(s, model.sliding_window) - workload.shared_prefix;
  }
  keys += workload.shared_prefix;
  const std::int64_t query_row = model.head_size * sizes.query;
  return 2 * keys * model.num_kv_heads * sizes.kv_row(model.head_size) +
         2 * workload.num_tokens() * model.num_heads * query_row;
}

std::int64_t write_bytes(const Workload& workload, const ElementSizes& sizes) {
  const Model& model = workload.model;
  const std::int64_t row = model.head_size * sizes.query + sizes.kv_row(model.head_size);
  return 2 * workload.num_tokens() * model.num_kv_heads * row;
}

std::vector<Workload> load_workloads(const std::string& path) {
  const Json file = parse_file(path);
  std::map<std::string, Model> models;
  for (const auto& [name, json] : member(file, "models", path).items()) {
    models[name] = parse_model(name, json, path + ": models." + name);
  }
  const Json& list = member(file, "workloads", path);
  if (!list.is_array() || list.empty()) fail(path + ": workloads", "expected a list");
  std::vector<Workload> workloads;
  for (std::size_t i = 0; i < list.size(); ++i) {
    Workload workload;
    workload.name = string_member(list[i], "name", path + ": workloads[" + std::to_string(i) + "]");
    const std::string where = path + ": " + workload.name;
    for (const Workload& other : workloads) {
      if (other.name == workload.name) fail(where, "two workloads have this name");
    }
    const std::string model = string_member(list[i], "model", where);
    const auto found = models.find(model);
    if (found == models.end()) fail(where + ".model", "no model has the name \"" + model + "\"");
    workload.model = found->second;
    workload.batch = parse_batch(member(list[i], "batch", where), where + ".batch");
    if (list[i].contains("shared_prefix")) {
      if (workload.model.sliding_window > 0) {
        fail(where + ".shared_prefix", "expected a model without a sliding window");
      }
      workload.shared_prefix =
          integer_member(list[i], "shared_prefix", 0, shortest_context(workload.batch), where);
    }
    check_stored(list[i], "flops", flops(workload), where);
    check_stored(list[i], "bytes", bytes(workload), where);
    workloads.push_back(std::move(workload));
  }
  return workloads;
}

namespace {

std::int64_t total_pairs(const std::vector<Sequence>& sequences, std::int64_t sliding_window) {
  std::int64_t pairs = 0;
  for (const Sequence& s : sequences) pairs += visible_pairs(s, sliding_window);
  return pairs;
}

// `count` of the indices, taken evenly over the sequences in order of length, in batch order.
std::vector<std::size_t> thin_out(const std::vector<Sequence>& batch,
                                  std::vector<std::size_t> indices, std::size_t count) {
  std::stable_sort(indices.begin(), indices.end(), [&](std::size_t a, std::size_t b) {
    return batch[a].seq_len < batch[b].seq_len;
  });
  std::vector<std::size_t> kept;
  for (std::size_t i = 0; i < count; ++i) {
    kept.push_back(indices[(2 * i + 1) * indices.size() / (2 * count)]);  // middles of parts
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

// The sequence with `factor` of its length; of a prefill, with `factor` of its query rows too. Not
// shorter than two windows, or another workload would come out.
Sequence shortened(const Sequence& sequence, double factor, std::int64_t sliding_window) {
  const auto shrink = [&](std::int64_t length, std::int64_t lowest) {
    const std::int64_t length_now = std::llround(static_cast<double>(length) * factor);
    return std::max(length_now, std::min(length, lowest));
  };
  Sequence out = sequence;
  if (sequence.query_len > kMaxDecodeQueryLen) out.query_len = shrink(sequence.query_len, 16);
  out.seq_len = shrink(sequence.seq_len, std::max(out.query_len, 2 * sliding_window));
  if (sequence.query_len == sequence.seq_len) out.query_len = out.seq_len;
  return out;
}

// Shortens all sequences by one factor until they have at most `pairs` (query, key) pairs.
std::vector<Sequence> shorten_to(const std::vector<Sequence>& sequences, double pairs,
                                 std::int64_t sliding_window) {
  const auto at = [&](double factor) {
    std::vector<Sequence> out;
    out.reserve(sequences.size());
    for (const Sequence& s : sequences) out.push_back(shortened(s, factor, sliding_window));
    return out;
  };
  double low = 0.0;
  double high = 1.0;
  for (int step = 0; step < 40; ++step) {  // bisection far below one token
    const double middle = 0.5 * (low + high);
    (static_cast<double>(total_pairs(at(middle), sliding_window)) <= pairs ? low : high) = middle;
  }
  return at(low);
}

// Replaces the sequences at `indices` by fewer or shorter ones with `scale` of their pairs.
void scale_kind(const Workload& workload, const std::vector<std::size_t>& indices, double scale,
                std::vector<std::pair<std::size_t, Sequence>>* out) {
  if (indices.empty()) return;
  const std::int64_t window = workload.model.sliding_window;
  std::vector<Sequence> all;
  all.reserve(indices.size());
  for (const std::size_t i : indices) all.push_back(workload.batch[i]);
  const double pairs = scale * static_cast<double>(total_pairs(all, window));

  const double wanted = std::ceil(scale * static_cast<double>(indices.size()) - 1e-9);
  const auto count = static_cast<std::size_t>(std::max(wanted, 1.0));
  const std::vector<std::size_t> kept = thin_out(workload.batch, indices, count);
  std::vector<Sequence> sequences;
  sequences.reserve(kept.size());
  for (const std::size_t i : kept) sequences.push_back(workload.batch[i]);
  // A few per cent too much are as good, and whole lengths are the better likeness.
  if (static_cast<double>(total_pairs(sequences, window)) > 1.1 * pairs) {
    sequences = shorten_to(sequences, pairs, window);
  }
  for (std::size_t i = 0; i < kept.size(); ++i) out->emplace_back(kept[i], sequences[i]);
}

}  // namespace

Workload scaled(const Workload& workload, double scale) {
  if (!(scale > 0.0 && scale <= 1.0)) {
    throw std::runtime_error("scale: expected a number in (0, 1], got " + std::to_string(scale));
  }
  if (scale == 1.0) return workload;
  std::vector<std::size_t> decodes;
  std::vector<std::size_t> prefills;
  for (std::size_t i = 0; i < workload.batch.size(); ++i) {
    (workload.batch[i].query_len <= kMaxDecodeQueryLen ? decodes : prefills).push_back(i);
  }
  std::vector<std::pair<std::size_t, Sequence>> kept;
  scale_kind(workload, decodes, scale, &kept);
  scale_kind(workload, prefills, scale, &kept);
  std::sort(kept.begin(), kept.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });

  Workload out = workload;
  out.scale = scale;
  out.batch.clear();
  for (const auto& [index, sequence] : kept) out.batch.push_back(sequence);
  out.shared_prefix = std::min(workload.shared_prefix * out.max_seq_len() / workload.max_seq_len(),
                               shortest_context(out.batch));
  return out;
}

}  // namespace quire::bench
