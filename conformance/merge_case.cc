#include "conformance/merge_case.h"

#include <cmath>
#include <limits>

#include "conformance/number_format.h"

namespace quire::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void fill_row(const Tensor& o, std::int64_t token, std::int64_t head, double value) {
  for (std::int64_t d = 0; d < o.shape[2]; ++d) o.set({token, head, d}, value);
}

}  // namespace

MergeCase::MergeCase(const Spec& spec, DeviceMemory* memory)
    : spec_(spec), memory_(memory), buffers_(memory) {
  const Sizes shape{spec.tokens, spec.heads, spec.size};
  Layout padded;
  padded.padding = {0, 1, 3};
  o_a_ = make_tensor(spec.dtype, shape, padded);
  o_b_ = make_tensor(spec.dtype, shape);
  own_output_ = make_tensor(spec.dtype, shape, padded);
  for (Tensor* lse : {&lse_a_, &lse_b_, &own_lse_}) {
    *lse = make_tensor(DType::kFloat32, {spec.heads, spec.tokens});
  }
  Rng rng(42);
  for (const Tensor* tensor : {&o_a_, &lse_a_, &o_b_, &lse_b_}) fill_normal(*tensor, &rng);
  if (spec.tokens < 5 || spec.heads < 3) return;
  // Parts that contribute nothing, whatever they hold; parts that dwarf the other.
  lse_a_.set({0, 0}, -kInfinity);
  fill_row(o_a_, 0, 0, std::nan(""));
  lse_b_.set({1, 1}, -kInfinity);
  fill_row(o_b_, 1, 1, kInfinity);
  lse_a_.set({2, 2}, -kInfinity);
  lse_b_.set({2, 2}, -kInfinity);
  fill_row(o_b_, 2, 2, std::nan(""));
  lse_a_.set({0, 3}, 1e30);
  lse_b_.set({0, 4}, 5000.0);
  if (spec.tokens < 9 || spec.heads < 4) return;
  // NaN in a part makes the row NaN, beside a part without keys too.
  lse_a_.set({3, 4}, std::nan(""));
  lse_b_.set({3, 5}, std::nan(""));
  lse_a_.set({3, 6}, std::nan(""));
  lse_b_.set({3, 6}, -kInfinity);
  lse_a_.set({3, 7}, -kInfinity);
  lse_b_.set({3, 7}, std::nan(""));
  fill_row(o_a_, 8, 3, std::nan(""));
}

const Tensor& MergeCase::output() const {
  if (spec_.target == Target::kOwn) return own_output_;
  return spec_.target == Target::kPartA ? o_a_ : o_b_;
}

const Tensor& MergeCase::lse() const {
  if (spec_.target == Target::kOwn) return own_lse_;
  return spec_.target == Target::kPartA ? lse_a_ : lse_b_;
}

void MergeCase::merge(const Context& context) {
  merge_states(buffers_.view(o_a_), buffers_.view(lse_a_), buffers_.view(o_b_),
               buffers_.view(lse_b_), buffers_.view(output()),
               spec_.lse ? buffers_.view(lse()) : TensorView{}, context);
}

std::string MergeCase::problem() {
  memory_->synchronize();
  const std::string damage = buffers_.damage({&output(), spec_.lse ? &lse() : &output()});
  if (!damage.empty()) return damage;
  const std::vector<std::byte> output_bytes = buffers_.download(output());
  const std::vector<std::byte> lse_bytes = buffers_.download(lse());
  for (std::int64_t token = 0; token < spec_.tokens; ++token) {
    for (std::int64_t head = 0; head < spec_.heads; ++head) {
      const std::string problem = problem_of_row(output_bytes, lse_bytes, token, head);
      if (problem.empty()) continue;
      return "token " + std::to_string(token) + ", head " + std::to_string(head) + ": " + problem;
    }
  }
  return {};
}

std::string MergeCase::problem_of_row(const std::vector<std::byte>& output_bytes,
                                      const std::vector<std::byte>& lse_bytes, std::int64_t token,
                                      std::int64_t head) const {
  const double a = lse_a_.get({head, token});
  const double b = lse_b_.get({head, token});
  const double highest = std::max(a, b);
  const bool none = std::isinf(highest) && !std::isnan(b);
  const double wanted_lse =
      none ? highest : highest + std::log(std::exp(a - highest) + std::exp(b - highest));
  const auto differs = [](double got, double wanted, double tolerance) {
    if (std::isnan(wanted)) return !std::isnan(got);
    return !(std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted)));
  };
  for (std::int64_t d = 0; d < spec_.size; ++d) {
    double wanted = 0;
    if (!std::isinf(a)) wanted += o_a_.get({token, head, d}) * std::exp(a - wanted_lse);
    if (!std::isinf(b)) wanted += o_b_.get({token, head, d}) * std::exp(b - wanted_lse);
    const std::int64_t at = output().at({token, head, d}) - output().buffer->bytes.data();
    const double got = decode(spec_.dtype, &output_bytes[at]);
    if (differs(got, wanted, tolerance_of(spec_.dtype))) {
      return "element " + std::to_string(d) + " is " + std::to_string(got) + ", not " +
             std::to_string(wanted);
    }
  }
  if (!spec_.lse) return {};
  const double got = decode(DType::kFloat32, &lse_bytes[(head * spec_.tokens + token) * 4]);
  if (none ? got == wanted_lse : !differs(got, wanted_lse, 1e-5)) return {};
  return "lse is " + std::to_string(got) + ", not " + std::to_string(wanted_lse);
}

}  // namespace quire::conformance
