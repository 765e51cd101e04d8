#include "tests/conformance/compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "tests/conformance/number_format.h"

namespace quire::conformance {
namespace {

template <class... Args>
std::string format(const char* text, Args... args) {
  char line[400];
  std::snprintf(line, sizeof line, text, args...);
  return line;
}

// Of the finite ones.
double root_mean_square(const double* values, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i)
    sum += std::isfinite(values[i]) ? values[i] * values[i] : 0;
  return count > 0 ? std::sqrt(sum / static_cast<double>(count)) : 0.0;
}

// How far into [0, limit) an element's error may go. Errors of P and V average out over the row's
// keys as the row's own values do, so the row's scale bounds them; rounding is relative to the
// element.
double element_bound(double tolerance, double row_scale, double wanted) {
  return tolerance * (2 * row_scale + std::fabs(wanted));
}

// Where NaN is due only NaN will do; where an infinity is, it or NaN: 0 * Inf may have come on the way.
bool is_as_bad(double got, double wanted) {
  return std::isnan(got) || (std::isinf(wanted) && got == wanted);
}

// Reads the written elements of an output, checks them, and remembers which bytes they are.
class OutputCheck {
 public:
  OutputCheck(const Case& c, const Actual& actual, const Expected& expected, double tolerance)
      : c_(c), actual_(actual), expected_(expected), tolerance_(tolerance) {}

  std::string run() {
    const bool is_fp8 = is_float8(c_.output.dtype);
    for (std::int64_t row = 0; row < expected_.num_rows; ++row) {
      if (!expected_.written[row]) continue;
      if (c_.output_block_scale) {
        std::string problem = check_block_scales(row);
        if (!problem.empty()) return problem;
      }
      for (std::int64_t head = 0; head < expected_.num_heads; ++head) {
        const std::string problem = is_fp8 ? check_fp8(row, head) : check_float(row, head);
        if (!problem.empty()) return problem;
      }
    }
    const double relative = std::sqrt(error_ / std::max(norm_, 1e-60));
    const double limit = is_fp8 ? std::max(tolerance_, 5e-2) : tolerance_;
    if (error_ > 0 && relative > limit) {
      return format("output: relative Frobenius error %.3g, allowed %.3g", relative, limit);
    }
    return check_untouched();
  }

 private:
  std::int64_t offset_of(std::int64_t row, std::int64_t head, std::int64_t d) const {
    const Tensor& output = c_.output;
    const std::int64_t position = output.shape.size() == 3
                                      ? row * output.strides[0] + head * output.strides[1] + d
                                      : row * output.strides[0] + head * expected_.head_size_v + d;
    return output.offset + position * size_of(output.dtype);
  }

  void account(double error, double wanted) {
    error_ += error * error;
    norm_ += wanted * wanted;
  }

  std::string check_float(std::int64_t row, std::int64_t head) {
    const double* wanted = expected_.out(row, head);
    const std::int64_t size = expected_.head_size_v;
    const double row_scale = root_mean_square(wanted, size);
    const double step = smallest_step(c_.output.dtype);
    for (std::int64_t d = 0; d < size; ++d) {
      const double got = decode(c_.output.dtype, &actual_.output[offset_of(row, head, d)]);
      if (!std::isfinite(wanted[d]) && is_as_bad(got, wanted[d])) continue;
      const double error = std::fabs(got - wanted[d]);
      if (!(error <= element_bound(tolerance_, row_scale, wanted[d]) + step)) {
        return format("output[%lld][%lld][%lld] is %.9g, not %.9g (row scale %.3g)",
                      static_cast<long long>(row), static_cast<long long>(head),
                      static_cast<long long>(d), got, wanted[d], row_scale);
      }
      account(std::max(error - step, 0.0), wanted[d]);
    }
    return {};
  }

  // The stored code may be a neighbour of the right one (a tie that fell the other way), or as far
  // off as the arithmetic before the rounding may be.
  std::string check_fp8(std::int64_t row, std::int64_t head) {
    const double* wanted = expected_.out(row, head);
    const std::int64_t size = expected_.head_size_v;
    const double row_scale = root_mean_square(wanted, size);
    for (std::int64_t d = 0; d < size; ++d) {
      const double scale = scale_of(row, head * size + d);
      const auto code = static_cast<std::uint8_t>(actual_.output[offset_of(row, head, d)]);
      std::uint8_t right = 0;
      encode(DType::kFloat8E4M3, wanted[d] / scale, &right);
      const double got = decode(DType::kFloat8E4M3, &code) * scale;
      if (std::isnan(wanted[d]) && std::isnan(got)) continue;
      const double nearest = decode(DType::kFloat8E4M3, &right) * scale;
      const double error = std::fabs(got - nearest);
      const bool neighbour =
          !std::isnan(got) && std::abs(ordinal_of_float8(code) - ordinal_of_float8(right)) <= 1;
      if (!neighbour && !(error <= element_bound(tolerance_, row_scale, wanted[d]))) {
        return format("output[%lld][%lld][%lld] is code 0x%02x (%.6g), not 0x%02x (%.6g of %.9g)",
                      static_cast<long long>(row), static_cast<long long>(head),
                      static_cast<long long>(d), code, got, right, nearest, wanted[d]);
      }
      account(error, nearest);
    }
    return {};
  }

  double scale_of(std::int64_t row, std::int64_t element) const {
    if (!c_.output_block_scale) return c_.spec.output_scale;
    const Tensor& scales = c_.output_block_scale;
    const std::int64_t position = row * scales.strides[0] + element / 128 * scales.strides[1];
    return decode(DType::kFloat32, &actual_.output_block_scale[scales.offset + position * 4]);
  }

  std::string check_block_scales(std::int64_t row) const {
    const std::int64_t elements = expected_.num_heads * expected_.head_size_v;
    const double* wanted = expected_.out(row, 0);
    for (std::int64_t begin = 0; begin < elements; begin += 128) {
      const std::int64_t end = std::min(begin + 128, elements);
      double absmax = 0;
      for (std::int64_t e = begin; e < end; ++e) absmax = std::max(absmax, std::fabs(wanted[e]));
      const double got = scale_of(row, begin);
      const double right = absmax / 448;
      // A group of zeros has a tiny scale of the backend's choice.
      const bool ok =
          right == 0 ? got > 0 && got < 1e-6 : std::fabs(got - right) <= 3 * tolerance_ * right;
      if (!ok) {
        return format("output_block_scale[%lld][%lld] is %.9g, not %.9g",
                      static_cast<long long>(row), static_cast<long long>(begin / 128), got, right);
      }
    }
    return {};
  }

  // Everything that no written element covers still holds the poison.
  std::string check_untouched() const {
    std::vector<std::byte> now = actual_.output;
    const std::vector<std::byte>& poison = c_.output.buffer->bytes;
    const std::int64_t size = size_of(c_.output.dtype);
    for (std::int64_t row = 0; row < expected_.num_rows; ++row) {
      if (!expected_.written[row]) continue;
      for (std::int64_t head = 0; head < expected_.num_heads; ++head) {
        const std::int64_t begin = offset_of(row, head, 0);
        const std::int64_t bytes = expected_.head_size_v * size;
        std::copy_n(poison.begin() + begin, bytes, now.begin() + begin);
      }
    }
    if (now == poison) return {};
    const auto place = std::mismatch(now.begin(), now.end(), poison.begin()).first - now.begin();
    return format(
        "output: byte %lld of the buffer belongs to no row to be written, and was written",
        static_cast<long long>(place));
  }

  const Case& c_;
  const Actual& actual_;
  const Expected& expected_;
  double tolerance_;
  double error_ = 0;
  double norm_ = 0;
};

std::string check_lse(const Case& c, const Actual& actual, const Expected& expected,
                      double tolerance) {
  if (!c.lse) return {};
  std::vector<std::byte> now = actual.lse;
  const std::vector<std::byte>& poison = c.lse.buffer->bytes;
  for (std::int64_t head = 0; head < expected.num_heads; ++head) {
    for (std::int64_t row = 0; row < expected.num_rows; ++row) {
      if (!expected.written[row]) continue;
      const std::int64_t at = c.lse.offset + (head * c.lse.strides[0] + row * c.lse.strides[1]) * 4;
      const double got = decode(DType::kFloat32, &actual.lse[at]);
      const double wanted = expected.lse[head * expected.num_rows + row];
      const bool ok = !std::isfinite(wanted)
                          ? got == wanted || (std::isnan(wanted) && std::isnan(got))
                          : std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted));
      if (!ok) {
        return format("lse[%lld][%lld] is %.9g, not %.9g", static_cast<long long>(head),
                      static_cast<long long>(row), got, wanted);
      }
      std::copy_n(poison.begin() + at, 4, now.begin() + at);
    }
  }
  return now == poison ? "" : "lse: an element of a row that is not to be written was written";
}

std::string check_scale_rows(const Case& c, const Actual& actual, const Expected& expected) {
  if (!c.output_block_scale) return {};
  std::vector<std::byte> now = actual.output_block_scale;
  const std::vector<std::byte>& poison = c.output_block_scale.buffer->bytes;
  const std::int64_t row_bytes = c.output_block_scale.strides[0] * 4;
  for (std::int64_t row = 0; row < expected.num_rows; ++row) {
    if (!expected.written[row]) continue;
    std::copy_n(poison.begin() + row * row_bytes, row_bytes, now.begin() + row * row_bytes);
  }
  return now == poison ? "" : "output_block_scale: a row that is not to be written was written";
}

}  // namespace

double tolerance_of(const CaseSpec& spec) {
  double tolerance = tolerance_of(spec.query_dtype());
  if (!is_float8(spec.out_dtype())) {
    tolerance = std::max(tolerance, tolerance_of(spec.out_dtype()));
  }
  return tolerance;
}

std::string compare(const Case& c, const Actual& actual, const Expected& expected,
                    double tolerance) {
  if (tolerance == 0) tolerance = tolerance_of(c.spec);
  std::string problem = OutputCheck(c, actual, expected, tolerance).run();
  if (problem.empty()) problem = check_lse(c, actual, expected, tolerance);
  if (problem.empty()) problem = check_scale_rows(c, actual, expected);
  return problem;
}

std::string compare_bytes(const std::vector<const Tensor*>& views,
                          const std::vector<std::byte>& now, const std::vector<std::byte>& wanted) {
  if (now == wanted) return {};
  std::vector<std::byte> forgiven = now;
  for (const Tensor* view : views) {
    if (!*view || !is_float(view->dtype)) continue;
    const std::int64_t size = size_of(view->dtype);
    view->for_each_element([&](std::int64_t offset) {
      if (std::isnan(decode(view->dtype, &forgiven[offset])) &&
          std::isnan(decode(view->dtype, &wanted[offset]))) {
        std::copy_n(wanted.begin() + offset, size, forgiven.begin() + offset);
      }
    });
  }
  if (forgiven == wanted) return {};
  const auto place =
      std::mismatch(forgiven.begin(), forgiven.end(), wanted.begin()).first - forgiven.begin();
  return format("byte %lld is 0x%02x, not 0x%02x", static_cast<long long>(place),
                static_cast<unsigned>(now[place]), static_cast<unsigned>(wanted[place]));
}

}  // namespace quire::conformance
