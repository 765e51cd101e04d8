#include "conformance/compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "conformance/number_format.h"

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

// What a row may lose where blocks that are not there, read as zeros, outweigh all its keys:
// weights below 2^-110 (CPU) or 2^-126 (CUDA) of the row's largest count as 0.
constexpr double kVanished = 0x1p-106;

// Where NaN is due only NaN will do; where an infinity is, it or NaN: 0 * Inf may have come on the
// way.
bool is_as_bad(double got, double wanted) {
  return std::isnan(got) || (std::isinf(wanted) && got == wanted);
}

// Reads the written elements of an output, checks them, and remembers which bytes they are.
class OutputCheck {
 public:
  OutputCheck(const Case& c, const Actual& actual, double tolerance)
      : c_(c),
        actual_(actual),
        head_size_v_(c.spec.config.value_head_size()),
        tolerance_(tolerance) {}

  std::string run(const Expected& expected) {
    for (std::int64_t row = 0; row < expected.num_rows; ++row) {
      if (!expected.written[row]) continue;
      const std::string problem = check_row(row, 0, expected.num_heads, expected.out(row, 0));
      if (!problem.empty()) return problem;
    }
    const bool is_fp8 = is_float8(c_.output.dtype);
    const double relative = std::sqrt(error_ / std::max(norm_, 1e-60));
    const double limit = is_fp8 ? std::max(tolerance_, 5e-2) : tolerance_;
    if (error_ > 0 && relative > limit) {
      return format("output: relative Frobenius error %.3g, allowed %.3g", relative, limit);
    }
    return check_untouched(expected.written);
  }

  // Heads [first_head, first_head + count) of a row; `wanted` is [count, head_size_v].
  std::string check_row(std::int64_t row, std::int64_t first_head, std::int64_t count,
                        const double* wanted) {
    std::string problem;
    if (c_.output_block_scale) problem = check_block_scales(row, first_head, count, wanted);
    for (std::int64_t i = 0; i < count && problem.empty(); ++i) {
      const double* values = wanted + i * head_size_v_;
      problem = is_float8(c_.output.dtype) ? check_fp8(row, first_head + i, values)
                                           : check_float(row, first_head + i, values);
    }
    return problem;
  }

  // Everything that no written element covers still holds the poison.
  std::string check_untouched(const std::vector<bool>& written) const {
    std::vector<std::byte> now = actual_.output;
    const std::vector<std::byte>& poison = c_.output.buffer->bytes;
    const std::int64_t size = size_of(c_.output.dtype);
    for (std::size_t row = 0; row < written.size(); ++row) {
      if (!written[row]) continue;
      for (std::int64_t head = 0; head < c_.spec.config.num_heads; ++head) {
        const std::int64_t begin = offset_of(static_cast<std::int64_t>(row), head, 0);
        std::memcpy(&now[begin], &poison[begin], head_size_v_ * size);
      }
    }
    if (same_bytes(now, poison)) return {};
    const auto place = std::mismatch(now.begin(), now.end(), poison.begin()).first - now.begin();
    return format(
        "output: byte %lld of the buffer belongs to no row to be written, and was written",
        static_cast<long long>(place));
  }

  std::int64_t offset_of(std::int64_t row, std::int64_t head, std::int64_t d) const {
    return output_offset(c_, row, head) + d * size_of(c_.output.dtype);
  }

 private:
  void account(double error, double wanted) {
    error_ += error * error;
    norm_ += wanted * wanted;
  }

  std::string check_float(std::int64_t row, std::int64_t head, const double* wanted) {
    const std::int64_t size = head_size_v_;
    const double row_scale = root_mean_square(wanted, size);
    const double step = smallest_step(c_.output.dtype) + kVanished;
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
  std::string check_fp8(std::int64_t row, std::int64_t head, const double* wanted) {
    const std::int64_t size = head_size_v_;
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
      // What the code costs beyond the best one: of two that are equally near neither is wrong, and
      // outputs that are one e5m2 value each lie between two in a quarter of their elements.
      account(std::max(std::fabs(got - wanted[d]) - std::fabs(nearest - wanted[d]), 0.0), nearest);
    }
    return {};
  }

  double scale_of(std::int64_t row, std::int64_t element) const {
    if (!c_.output_block_scale) return c_.spec.output_scale;
    const Tensor& scales = c_.output_block_scale;
    const std::int64_t position = row * scales.strides[0] + element / 128 * scales.strides[1];
    return decode(DType::kFloat32, &actual_.output_block_scale[scales.offset + position * 4]);
  }

  // Of the groups that lie in these heads.
  std::string check_block_scales(std::int64_t row, std::int64_t first_head, std::int64_t count,
                                 const double* wanted) const {
    const std::int64_t elements = c_.spec.config.num_heads * head_size_v_;
    const std::int64_t first = first_head * head_size_v_;
    const std::int64_t last = first + count * head_size_v_;
    for (std::int64_t begin = (first + 127) / 128 * 128; begin < last; begin += 128) {
      const std::int64_t end = std::min(begin + 128, elements);
      if (end > last) break;
      double absmax = 0;
      double row_scale = 0;
      for (std::int64_t e = begin; e < end; ++e) {
        absmax = std::max(absmax, std::fabs(wanted[e - first]));
      }
      for (std::int64_t e = begin; e < end; e = (e / head_size_v_ + 1) * head_size_v_) {
        const double* head = wanted + (e - first) / head_size_v_ * head_size_v_;
        row_scale = std::max(row_scale, root_mean_square(head, head_size_v_));
      }
      const double got = scale_of(row, begin);
      const double right = absmax / 448;
      // A group of zeros has a tiny scale of the backend's choice. The error is that of the largest
      // element, which in a last group of few elements may be a small one.
      const double bound = element_bound(tolerance_, row_scale, absmax) / 448;
      const bool ok = right == 0 ? got > 0 && got < 1e-6 : std::fabs(got - right) <= bound;
      if (!ok) {
        return format("output_block_scale[%lld][%lld] is %.9g, not %.9g",
                      static_cast<long long>(row), static_cast<long long>(begin / 128), got, right);
      }
    }
    return {};
  }

  const Case& c_;
  const Actual& actual_;
  std::int64_t head_size_v_;
  double tolerance_;
  double error_ = 0;
  double norm_ = 0;
};

std::string check_lse(const Case& c, const Actual& actual, std::int64_t row, std::int64_t head,
                      double wanted, double tolerance) {
  if (!c.lse) return {};
  const double got = decode(DType::kFloat32, &actual.lse[lse_offset(c, row, head)]);
  const bool ok = !std::isfinite(wanted)
                      ? got == wanted || (std::isnan(wanted) && std::isnan(got))
                      : std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted));
  if (ok) return {};
  return format("lse[%lld][%lld] is %.9g, not %.9g", static_cast<long long>(head),
                static_cast<long long>(row), got, wanted);
}

std::string check_all_lse(const Case& c, const Actual& actual, const Expected& expected,
                          double tolerance) {
  for (std::int64_t head = 0; head < expected.num_heads; ++head) {
    for (std::int64_t row = 0; row < expected.num_rows; ++row) {
      if (!expected.written[row]) continue;
      const double wanted = expected.lse[head * expected.num_rows + row];
      const std::string problem = check_lse(c, actual, row, head, wanted, tolerance);
      if (!problem.empty()) return problem;
    }
  }
  return {};
}

std::string check_untouched_lse(const Case& c, const Actual& actual,
                                const std::vector<bool>& written) {
  if (!c.lse) return {};
  std::vector<std::byte> now = actual.lse;
  const std::vector<std::byte>& poison = c.lse.buffer->bytes;
  for (std::int64_t head = 0; head < c.lse.shape[0]; ++head) {
    for (std::int64_t row = 0; row < c.lse.shape[1]; ++row) {
      if (!written[row]) continue;
      const std::int64_t at = lse_offset(c, row, head);
      std::copy_n(poison.begin() + at, 4, now.begin() + at);
    }
  }
  return same_bytes(now, poison) ? ""
                                 : "lse: an element of a row that is not to be written was written";
}

std::string check_untouched_scales(const Case& c, const Actual& actual,
                                   const std::vector<bool>& written) {
  if (!c.output_block_scale) return {};
  std::vector<std::byte> now = actual.output_block_scale;
  const std::vector<std::byte>& poison = c.output_block_scale.buffer->bytes;
  const std::int64_t row_bytes = c.output_block_scale.strides[0] * 4;
  for (std::size_t row = 0; row < written.size(); ++row) {
    if (!written[row]) continue;
    const auto at = static_cast<std::int64_t>(row) * row_bytes;
    std::copy_n(poison.begin() + at, row_bytes, now.begin() + at);
  }
  return same_bytes(now, poison)
             ? ""
             : "output_block_scale: a row that is not to be written was written";
}

}  // namespace

std::int64_t output_offset(const Case& c, std::int64_t row, std::int64_t head) {
  const Tensor& output = c.output;
  const std::int64_t head_stride =
      output.shape.size() == 3 ? output.strides[1] : c.spec.config.value_head_size();
  return output.offset + (row * output.strides[0] + head * head_stride) * size_of(output.dtype);
}

std::int64_t lse_offset(const Case& c, std::int64_t row, std::int64_t head) {
  return c.lse.offset + (head * c.lse.strides[0] + row * c.lse.strides[1]) * 4;
}

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
  std::string problem = OutputCheck(c, actual, tolerance).run(expected);
  if (problem.empty() && c.lse) problem = check_all_lse(c, actual, expected, tolerance);
  if (problem.empty()) problem = check_untouched_lse(c, actual, expected.written);
  if (problem.empty()) problem = check_untouched_scales(c, actual, expected.written);
  return problem;
}

std::string compare_row(const Case& c, const Actual& actual, const RowPlace& place,
                        const RowOfHeads& wanted) {
  const double tolerance = tolerance_of(c.spec);
  const std::int64_t row = static_cast<std::int64_t>(c.query_start_loc.get({place.s})) + place.i;
  std::string problem = OutputCheck(c, actual, tolerance)
                            .check_row(row, place.first_head, place.count, wanted.output.data());
  for (std::int64_t i = 0; i < place.count && problem.empty(); ++i) {
    problem = check_lse(c, actual, row, place.first_head + i, wanted.lse[i], tolerance);
  }
  return problem;
}

std::string compare_untouched(const Case& c, const Actual& actual,
                              const std::vector<bool>& written) {
  std::string problem = OutputCheck(c, actual, tolerance_of(c.spec)).check_untouched(written);
  if (problem.empty()) problem = check_untouched_lse(c, actual, written);
  if (problem.empty()) problem = check_untouched_scales(c, actual, written);
  return problem;
}

std::string compare_bytes(const std::vector<const Tensor*>& views,
                          const std::vector<std::byte>& now, const std::vector<std::byte>& wanted) {
  if (same_bytes(now, wanted)) return {};
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
