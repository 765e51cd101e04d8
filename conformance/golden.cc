#include "conformance/golden.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <utility>

#include "conformance/int4.h"
#include "conformance/number_format.h"
#include "conformance/runner.h"
#include "conformance/safetensors.h"

namespace quire::conformance {
namespace {

using nlohmann::json;

// One entry of the metadata's list and its tensors.
class Reader {
 public:
  Reader(const json& entry, const Safetensors& file)
      : entry_(entry), file_(file), prefix_(entry.at("case").get<std::string>() + ".") {}

  // Throw if the case has a field or a tensor that is not read here.
  void expect_known_fields() const {
    static const std::set<std::string> fields{
        "case",           "feature",        "dtype",
        "num_heads",      "num_kv_heads",   "head_size",
        "block_size",     "softmax_scale",  "soft_cap",
        "sliding_window", "chunk_lookback", "use_alibi_sqrt",
        "causal",         "per_seq_causal", "mm_prefix_clamp_sliding_window",
        "rswa_window",    "kv_cache_dtype", "k_scale",
        "v_scale",        "q_scale",        "output_scale",
        "fp8_bytes"};
    for (const auto& [name, value] : entry_.items()) {
      if (fields.count(name) == 0) throw std::runtime_error("unknown field " + name);
    }
  }
  void expect_known_tensors() const {
    static const std::set<std::string> tensors{
        "query",        "key",    "value",   "kv_cache",        "k_scale_cache",    "v_scale_cache",
        "block_table",  "sinks",  "qq_bias", "query_start_loc", "rswa_prefix_lens", "seq_lens",
        "alibi_slopes", "causal", "output",  "mm_prefix_range", "rht_signs"};
    for (auto found = file_.tensors.lower_bound(prefix_);
         found != file_.tensors.end() && found->first.compare(0, prefix_.size(), prefix_) == 0;
         ++found) {
      const std::string name = found->first.substr(prefix_.size());
      if (tensors.count(name) == 0) throw std::runtime_error("unknown tensor " + name);
    }
  }

  bool has(const std::string& name) const { return file_.tensors.count(prefix_ + name) > 0; }

  Tensor tensor(const std::string& name) const {
    const auto found = file_.tensors.find(prefix_ + name);
    if (found == file_.tensors.end()) {
      throw std::runtime_error(prefix_ + name + ": missing");
    }
    Tensor tensor = found->second;
    const auto bytes = entry_.at("fp8_bytes").get<std::vector<std::string>>();
    const bool fp8 = std::find(bytes.begin(), bytes.end(), name) != bytes.end();
    const bool int4 = value<std::string>("kv_cache_dtype") == "int4_pth";
    if (fp8 || (name == "kv_cache" && tensor.dtype == DType::kUInt8 && !int4)) {
      tensor.dtype = DType::kFloat8E4M3;
    }
    return tensor;
  }

  Tensor optional(const std::string& name) const { return has(name) ? tensor(name) : Tensor{}; }

  Tensor optional_float32(const std::string& name) const {
    Tensor stored = optional(name);
    if (!stored || stored.dtype == DType::kFloat32) return stored;
    std::vector<float> values;
    for (std::int64_t i = 0; i < stored.shape[0]; ++i) {
      values.push_back(static_cast<float>(stored.get({i})));
    }
    return make_float32(values);
  }

  template <class T>
  T value(const char* name) const {
    return entry_.at(name).get<T>();
  }

  // Of a field that is null, or that older files do not have.
  template <class T>
  T value_or(const char* name, T fallback) const {
    const auto found = entry_.find(name);
    return found == entry_.end() || found->is_null() ? fallback : found->get<T>();
  }

 private:
  const json& entry_;
  const Safetensors& file_;
  std::string prefix_;
};

void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

KvCacheDType cache_dtype_of(const std::string& name) {
  if (name == "int8_pth") return KvCacheDType::kInt8PerTokenHead;
  if (name == "fp8_pth") return KvCacheDType::kFp8E4M3PerTokenHead;
  if (name == "int4_pth") return KvCacheDType::kInt4PerTokenHead;
  try {
    return parse_kv_cache_dtype(name);
  } catch (const Error&) {
    throw std::runtime_error("unknown kv_cache_dtype " + name);
  }
}

DType model_dtype_of(const std::string& name) {
  if (name == "fp16") return DType::kFloat16;
  if (name == "bf16") return DType::kBFloat16;
  require(name == "fp32", "unknown dtype " + name);
  return DType::kFloat32;
}

void read_config(const Reader& reader, CaseSpec* spec) {
  AttentionConfig& config = spec->config;
  spec->model_dtype = model_dtype_of(reader.value<std::string>("dtype"));
  config.num_heads = reader.value<std::int64_t>("num_heads");
  config.num_kv_heads = reader.value<std::int64_t>("num_kv_heads");
  config.head_size = reader.value<std::int64_t>("head_size");
  config.block_size = reader.value<std::int64_t>("block_size");
  config.kv_cache_dtype = cache_dtype_of(reader.value<std::string>("kv_cache_dtype"));
  config.score.softmax_scale = reader.value<float>("softmax_scale");
  config.score.soft_cap = reader.value<float>("soft_cap");
  config.score.alibi_sqrt = reader.value<bool>("use_alibi_sqrt");
  const auto sliding = reader.value_or<std::int64_t>("sliding_window", 0);
  const auto around_prefix = reader.value_or<std::int64_t>("rswa_window", 0);
  require(sliding == 0 || around_prefix == 0, "both sliding_window and rswa_window");
  require((around_prefix > 0) == reader.has("rswa_prefix_lens"),
          "only one of rswa_window and rswa_prefix_lens");
  const std::int64_t window = sliding > 0 ? sliding : around_prefix;
  const auto lookback = reader.value<std::int64_t>("chunk_lookback");
  if (window > 0 && lookback >= 0) {
    config.mask = Mask::chunked(window / (lookback + 1), lookback);
  } else if (window > 0) {
    config.mask = Mask::sliding_window(window);
  }
  config.mask.causal = reader.value_or("causal", true);
  config.mask.clamp_ranges = reader.value_or("mm_prefix_clamp_sliding_window", false);
  require(reader.value_or("per_seq_causal", false) == reader.has("causal"),
          "only one of per_seq_causal and the tensor causal");
}

// Of the rotation of int4 caches, which are fixed.
void check_signs(const Tensor& signs) {
  for (std::int64_t i = 0; i < signs.shape[0]; ++i) {
    require(i < static_cast<std::int64_t>(rotation_signs().size()) &&
                signs.get({i}) == rotation_signs()[i],
            "rht_signs: are not those of int4_per_token_head");
  }
}

void read_tensors(const Reader& reader, Case* c) {
  CaseSpec& spec = c->spec;
  c->query = reader.tensor("query");
  spec.config.dtype = c->query.dtype;
  c->query_start_loc = reader.tensor("query_start_loc");
  c->seq_lens = reader.tensor("seq_lens");
  c->block_table = reader.tensor("block_table");
  c->combined = reader.tensor("kv_cache");
  const Tensor& whole = c->combined;
  require(whole.shape.size() == 5 && whole.shape[1] == 2, "kv_cache: not of five dimensions");
  require(whole.dtype == spec.cache_storage(), "kv_cache: dtype is not kv_cache_dtype's");
  const Sizes shape{whole.shape[0], whole.shape[2], whole.shape[3], whole.shape[4]};
  const Sizes strides{whole.strides[0], whole.strides[2], whole.strides[3], whole.strides[4]};
  c->key_cache = view_of(whole.buffer, whole.dtype, shape, strides, 0);
  c->value_cache =
      view_of(whole.buffer, whole.dtype, shape, strides, whole.strides[1] * size_of(whole.dtype));
  c->k_scale_cache = reader.optional("k_scale_cache");
  c->v_scale_cache = reader.optional("v_scale_cache");
  c->key = reader.optional("key");
  c->value = reader.optional("value");
  c->alibi_slopes = reader.optional_float32("alibi_slopes");
  c->sinks = reader.optional_float32("sinks");
  c->qq_bias = reader.optional("qq_bias");
  if (c->qq_bias) spec.qq_bias_size = c->qq_bias.shape[0];
  if (reader.has("rht_signs")) check_signs(reader.tensor("rht_signs"));
  c->mm_prefix_range = reader.optional("mm_prefix_range");
  c->visible_prefix_lens = reader.optional("rswa_prefix_lens");
  c->causal = reader.optional("causal");
  c->scales = make_float32({reader.value_or("q_scale", 1.0F), reader.value<float>("k_scale"),
                            reader.value<float>("v_scale"), reader.value_or("output_scale", 1.0F)});
}

// num_rows() and num_actual_tokens() come from the sequences.
void read_lengths(Case* c) {
  for (std::int64_t s = 0; s < c->num_seqs(); ++s) {
    SequenceSpec sequence;
    sequence.query_len =
        static_cast<std::int64_t>(c->query_start_loc.get({s + 1}) - c->query_start_loc.get({s}));
    sequence.seq_len = static_cast<std::int64_t>(c->seq_lens.get({s}));
    c->spec.sequences.push_back(sequence);
  }
  require(c->spec.num_rows() == c->query.shape[0], "query: rows are not query_start_loc's");
}

void read_output(const Reader& reader, GoldenCase* golden) {
  Case& c = golden->inputs;
  const Tensor stored = reader.tensor("output");
  c.spec.output_dtype = stored.dtype;
  c.spec.output_3d = true;
  c.spec.output_scale = reader.value_or("output_scale", 1.0F);
  c.spec.lse = false;
  const double scale = is_float8(stored.dtype) ? c.spec.output_scale : 1.0;
  golden->expected = empty_expected(c);
  require(stored.num_elements() == static_cast<std::int64_t>(golden->expected.output.size()),
          "output: shape is not the query's");
  decode_row(stored.dtype, stored.buffer->bytes.data(), stored.num_elements(),
             golden->expected.output.data());
  for (double& x : golden->expected.output) x *= scale;
  c.output = make_tensor(stored.dtype, stored.shape);

  const bool any_fp8 = is_float8(stored.dtype) || is_float8(c.query.dtype);
  const bool brain = c.spec.model_dtype == DType::kBFloat16;
  golden->tolerance = any_fp8 ? 6e-2 : (brain ? 1.2e-2 : 3e-3);
  if (c.spec.config.kv_cache_dtype == KvCacheDType::kInt4PerTokenHead) {
    // Triton rounds weights to tf32, where all codes of a vector, none below 0, lose alike. Rotated
    // back, that loss comes together in the first element of each block: up to 0.065 of a row's
    // scale, in outputs that as a whole are good to 5e-3.
    golden->tolerance = 7e-2;
    golden->most_error = 6e-3;
  }
}

double relative_error(const GoldenCase& golden, const Actual& actual) {
  const Expected& expected = golden.expected;
  double error = 0;
  double norm = 0;
  std::vector<double> got(expected.head_size_v);
  for (std::int64_t row = 0; row < expected.num_rows; ++row) {
    for (std::int64_t head = 0; head < expected.num_heads; ++head) {
      const std::byte* from = &actual.output[output_offset(golden.inputs, row, head)];
      decode_row(golden.inputs.output.dtype, from, expected.head_size_v, got.data());
      for (std::int64_t d = 0; d < expected.head_size_v; ++d) {
        const double wanted = expected.out(row, head)[d];
        error += (got[d] - wanted) * (got[d] - wanted);
        norm += wanted * wanted;
      }
    }
  }
  return std::sqrt(error / norm);
}

// The cache as the write left it, against the stored one, bit for bit: fp8 codes too. But Triton
// truncates to int8 where we round: an int8 code may be off by one.
std::string compare_cache(const Case& c, const std::vector<std::byte>& now) {
  const Tensor& whole = c.combined;
  const bool is_int8 = c.spec.config.kv_cache_dtype == KvCacheDType::kInt8PerTokenHead;
  std::string problem;
  whole.for_each_element([&](std::int64_t offset) {
    const std::byte* wanted = whole.buffer->bytes.data() + offset;
    if (std::equal(wanted, wanted + size_of(whole.dtype), now.begin() + offset)) return;
    const double got = decode(whole.dtype, &now[offset]);
    const double stored = decode(whole.dtype, wanted);
    if (problem.empty() && !(is_int8 && std::abs(got - stored) <= 1)) {
      problem = "write_kv_cache: byte " + std::to_string(offset) + " of the cache reads " +
                std::to_string(got) + ", not " + std::to_string(stored);
    }
  });
  return problem;
}

// Bit for bit.
std::string compare_scales(const Tensor& stored, const std::vector<std::byte>& now) {
  std::string problem;
  if (!stored) return problem;
  stored.for_each_element([&](std::int64_t offset) {
    const std::byte* wanted = stored.buffer->bytes.data() + offset;
    if (problem.empty() && !std::equal(wanted, wanted + sizeof(float), now.begin() + offset)) {
      char text[96];
      std::snprintf(text, sizeof text, "write_kv_cache: a scale is %.9g, not %.9g",
                    decode(DType::kFloat32, &now[offset]), decode(DType::kFloat32, wanted));
      problem = text;
    }
  });
  return problem;
}

// int4: steps bit for bit. Triton divides with an approximate instruction: where a zero point or a
// code lies next to halfway between two numbers it may be the other one, seen in 1 code of 500.
constexpr double kOtherInt4Codes = 0.005;

std::string compare_int4(const Case& c, const std::vector<std::byte>& codes,
                         const std::vector<std::byte>& k_scales,
                         const std::vector<std::byte>& v_scales) {
  std::int64_t total = 0;
  std::int64_t other = 0;
  for (const bool is_key : {true, false}) {
    const Tensor& rows = is_key ? c.key_cache : c.value_cache;
    const Tensor& scales = is_key ? c.k_scale_cache : c.v_scale_cache;
    const std::byte* now_scales = (is_key ? k_scales : v_scales).data();
    const std::int64_t count = rows.shape[3];
    std::string problem;
    scales.for_each_element([&](std::int64_t offset) {
      const std::int64_t vector = offset / 4;  // scales are contiguous
      const std::int64_t head = vector % scales.shape[2];
      const std::int64_t slot = vector / scales.shape[2];
      const std::byte* wanted = rows.at({slot / rows.shape[1], slot % rows.shape[1], head, 0});
      const std::byte* now = codes.data() + (wanted - rows.buffer->bytes.data());
      const auto scale_of = [](const std::byte* scale) {
        return parts_of_int4_scale(static_cast<float>(decode(DType::kFloat32, scale)));
      };
      const Int4Parts stored = scale_of(scales.buffer->bytes.data() + offset);
      const Int4Parts written = scale_of(now_scales + offset);
      const int moved = written.zero - stored.zero;
      bool close = stored.step == written.step && std::abs(moved) <= 1;
      for (std::int64_t i = 0; i < 2 * count; ++i) {
        const auto code = [&](const std::byte* row) {
          const int byte = std::to_integer<int>(row[i / 2]);
          return i % 2 == 0 ? byte % 16 : byte / 16;
        };
        const int difference = code(now) - code(wanted);
        ++total;
        other += difference != 0 ? 1 : 0;
        close &= std::abs(difference - moved) <= 1;
      }
      if (!close && problem.empty()) {
        problem = std::string("write_kv_cache: ") + (is_key ? "K" : "V") + " of slot " +
                  std::to_string(slot) + ", head " + std::to_string(head) +
                  ": other codes, or another scale, than vLLM's";
      }
    });
    if (!problem.empty()) return problem;
  }
  if (static_cast<double>(other) <= kOtherInt4Codes * static_cast<double>(total)) return {};
  return "write_kv_cache: " + std::to_string(other) + " of " + std::to_string(total) +
         " codes are not vLLM's";
}

// Writes the stored key and value into a poisoned copy of the cache.
std::string check_write(const Case& stored, const AttentionBackend& backend) {
  Case c = stored;
  std::vector<const Tensor*> written{&c.combined, &c.k_scale_cache, &c.v_scale_cache};
  c.slot_mapping = make_tensor(DType::kInt64, {c.key.shape[0]});
  for (std::int64_t row = 0; row < c.key.shape[0]; ++row) c.slot_mapping.set_int64(row, row);
  DeviceCase on_device(c, backend);
  DeviceBuffers& buffers = on_device.buffers();
  const PagedKvCache cache = on_device.cache();
  for (const Tensor* tensor : written) {
    if (!*tensor) continue;
    std::vector<std::byte> poison(tensor->buffer->bytes.size());
    fill_poison(tensor->dtype, poison.data(), tensor->num_elements());
    buffers.store(*tensor, poison);
  }
  write_kv_cache(buffers.view(c.key), buffers.view(c.value), cache, buffers.view(c.slot_mapping));
  if (c.spec.config.kv_cache_dtype == KvCacheDType::kInt4PerTokenHead) {
    return compare_int4(c, buffers.download(c.combined), buffers.download(c.k_scale_cache),
                        buffers.download(c.v_scale_cache));
  }
  std::string problem = compare_cache(c, buffers.download(c.combined));
  for (const Tensor* scales : {&c.k_scale_cache, &c.v_scale_cache}) {
    if (problem.empty() && *scales) problem = compare_scales(*scales, buffers.download(*scales));
  }
  return problem;
}

}  // namespace

namespace {

void read_case(const Reader& reader, GoldenCase* golden) {
  reader.expect_known_fields();
  golden->inputs.spec.write = false;
  read_config(reader, &golden->inputs.spec);
  reader.expect_known_tensors();
  read_tensors(reader, &golden->inputs);
  read_lengths(&golden->inputs);
  read_output(reader, golden);
}

}  // namespace

std::vector<GoldenCase> read_golden(const std::string& path) {
  const Safetensors file = read_safetensors(path);
  const std::string short_name = path.substr(path.find_last_of('/') + 1);
  std::vector<GoldenCase> cases;
  try {
    const json list = json::parse(file.metadata.at("cases").get<std::string>());
    for (const json& entry : list) {
      const Reader reader(entry, file);
      GoldenCase golden;
      golden.name = short_name + "/" + entry.at("case").get<std::string>() + " " +
                    entry.at("feature").get<std::string>();
      try {
        read_case(reader, &golden);
      } catch (const std::exception& error) {
        golden.inputs = {};
        golden.problem = error.what();
      }
      cases.push_back(std::move(golden));
    }
  } catch (const json::exception& error) {
    throw std::runtime_error(path + ": bad list of cases: " + error.what());
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  return cases;
}

std::string run_golden(const GoldenCase& golden, const AttentionBackend& backend) {
  if (!golden.problem.empty()) return golden.problem;
  try {
    std::string problem;
    if (golden.inputs.key) problem = check_write(golden.inputs, backend);
    if (!problem.empty()) return problem;
    DeviceCase on_device(golden.inputs, backend);
    const Actual actual = on_device.attend();
    problem = on_device.damage();
    if (!problem.empty()) return "attention " + problem;
    problem = compare(golden.inputs, actual, golden.expected, golden.tolerance);
    if (!problem.empty() || golden.most_error == 0) return problem;
    const double error = relative_error(golden, actual);
    return error <= golden.most_error ? ""
                                      : "output: relative Frobenius error " + std::to_string(error);
  } catch (const std::exception& error) {
    return std::string("threw: ") + error.what();
  }
}

}  // namespace quire::conformance
