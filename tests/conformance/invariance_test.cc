// What must not change a result: neighbours, place, padding, threads, cascade.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class InvarianceTest : public ConformanceTest {
 protected:
  // Bytes of the output and lse rows [row, row + count) of a contiguous 2-D output.
  struct Rows {
    std::vector<std::byte> output;
    std::vector<float> lse;
    bool operator==(const Rows&) const = default;
  };

  Rows rows_of(const Case& c, const Actual& actual, std::int64_t row, std::int64_t count) const {
    Rows rows;
    const std::int64_t bytes = c.output.strides[0] * size_of(c.output.dtype);
    rows.output.assign(actual.output.begin() + row * bytes,
                       actual.output.begin() + (row + count) * bytes);
    for (std::int64_t h = 0; h < c.spec.config.num_heads; ++h) {
      for (std::int64_t r = row; r < row + count; ++r) {
        float value = 0;
        std::memcpy(&value, &actual.lse[(h * c.lse.strides[0] + r) * 4], sizeof value);
        rows.lse.push_back(value);
      }
    }
    return rows;
  }

  // Puts the query, K and V of sequence 0 of `from` in place of those of sequence `s` of `to`.
  static void transplant(const Case& from, const Case& to, std::int64_t s) {
    const SequenceSpec& sequence = from.spec.sequences[0];
    const auto row = static_cast<std::int64_t>(to.query_start_loc.get({s}));
    const AttentionConfig& config = from.spec.config;
    for (std::int64_t i = 0; i < sequence.query_len; ++i) {
      std::memcpy(to.query.at({row + i, 0, 0}), from.query.at({i, 0, 0}),
                  config.num_heads * config.head_size * size_of(config.dtype));
    }
    for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
      const std::int64_t block_size = config.block_size;
      const auto source = static_cast<std::int64_t>(from.block_table.get({0, j / block_size}));
      const auto target = static_cast<std::int64_t>(to.block_table.get({s, j / block_size}));
      for (std::int64_t h = 0; h < config.num_kv_heads; ++h) {
        for (const auto& [a, b] : {std::pair{&from.key_cache, &to.key_cache},
                                   std::pair{&from.value_cache, &to.value_cache}}) {
          std::memcpy(b->at({target, j % block_size, h, 0}), a->at({source, j % block_size, h, 0}),
                      config.head_size * size_of(a->dtype));
        }
      }
    }
  }

  CaseSpec invariant_spec(DType dtype, std::vector<SequenceSpec> sequences, std::uint64_t seed) {
    CaseSpec spec = small_spec(std::move(sequences));
    spec.seed = seed;
    spec.model_dtype = spec.config.dtype = dtype;
    spec.config.block_size = 16;
    spec.config.batch_invariant = true;
    spec.write = false;
    return spec;
  }
};

TEST_P(InvarianceTest, OutputBitsDependOnTheSequenceAlone) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const auto& [query_len, seq_len] :
         {std::pair{1, 2600}, {5, 2111}, {40, 2300}, {120, 120}, {1, 17}}) {
      const Case alone = build_case(invariant_spec(dtype, {{query_len, seq_len}}, 1));
      const Rows wanted = rows_of(alone, DeviceCase(alone, backend()).attend(), 0, query_len);
      int seed = 2;
      for (const std::vector<SequenceSpec>& neighbours : {std::vector<SequenceSpec>{{1, 3000}},
                                                          {{1, 5}, {1, 6}, {1, 7}, {200, 700}},
                                                          {{64, 64}, {1, 4000}, {0, 9}}}) {
        for (const bool first : {false, true}) {
          std::vector<SequenceSpec> batch = neighbours;
          const auto place = first ? 0 : static_cast<std::int64_t>(batch.size());
          batch.insert(batch.begin() + place, {query_len, seq_len});
          CaseSpec spec = invariant_spec(dtype, batch, seed++);
          spec.padded_rows = seed % 5;
          spec.padded_sequences = seed % 3;
          spec.extra_table_width = seed % 7;
          spec.threads = seed % 4;
          const Case c = build_case(spec);
          transplant(alone, c, place);
          const auto row = static_cast<std::int64_t>(c.query_start_loc.get({place}));
          const Rows got = rows_of(c, DeviceCase(c, backend()).attend(), row, query_len);
          EXPECT_TRUE(got == wanted) << query_len << "/" << seq_len << " in " << describe(spec);
        }
      }
    }
  }
}

TEST_P(InvarianceTest, SharingAndAnnouncementsChangeNoBitsInBatchInvariantMode) {
  for (const std::int64_t announced : {0, 1024}) {
    CaseSpec spec = invariant_spec(DType::kFloat32, {{1, 1100}, {1, 1030}, {1, 2100}}, 3);
    spec.shared_prefix_len = 1024;
    spec.announced_prefix_len = announced;
    const Case together = build_case(spec);
    const Actual actual = DeviceCase(together, backend()).attend();
    for (std::int64_t s = 0; s < 3; ++s) {
      const Case alone = build_case(
          invariant_spec(DType::kFloat32, {spec.sequences[static_cast<std::size_t>(s)]}, 100));
      // The other way round: the shared batch's sequence into a batch of its own.
      const AttentionConfig& config = spec.config;
      std::memcpy(alone.query.at({0, 0, 0}), together.query.at({s, 0, 0}),
                  config.num_heads * config.head_size * 4);
      for (std::int64_t j = 0; j < spec.sequences[static_cast<std::size_t>(s)].seq_len; ++j) {
        const auto a = static_cast<std::int64_t>(together.block_table.get({s, j / 16}));
        const auto b = static_cast<std::int64_t>(alone.block_table.get({0, j / 16}));
        for (std::int64_t h = 0; h < config.num_kv_heads; ++h) {
          std::memcpy(alone.key_cache.at({b, j % 16, h, 0}),
                      together.key_cache.at({a, j % 16, h, 0}), config.head_size * 4);
          std::memcpy(alone.value_cache.at({b, j % 16, h, 0}),
                      together.value_cache.at({a, j % 16, h, 0}), config.head_size * 4);
        }
      }
      const Rows wanted = rows_of(alone, DeviceCase(alone, backend()).attend(), 0, 1);
      EXPECT_TRUE(rows_of(together, actual, s, 1) == wanted) << s << ", announced " << announced;
    }
  }
}

TEST_P(InvarianceTest, ThreadsChangeNoBits) {
  for (const bool invariant : {false, true}) {
    CaseSpec spec = invariant_spec(DType::kFloat32, {{1, 5000}, {90, 300}, {3, 40}, {1, 700}}, 5);
    spec.config.batch_invariant = invariant;
    spec.threads = 1;
    const Case c = build_case(spec);
    const Actual one = DeviceCase(c, backend()).attend();
    for (const int threads : {2, 3, 5, 16}) {
      Case again = c;
      again.spec.threads = threads;
      const Actual actual = DeviceCase(again, backend()).attend();
      EXPECT_TRUE(actual.output == one.output && actual.lse == one.lse) << threads << " threads";
    }
  }
}

TEST_P(InvarianceTest, CascadeEqualsPlainAttention) {
  CaseSpec spec = invariant_spec(DType::kFloat32, {{1, 700}, {1, 650}, {4, 660}, {1, 900}}, 6);
  spec.config.batch_invariant = false;
  spec.shared_prefix_len = 640;
  spec.sinks = true;
  for (const std::int64_t announced : {0, 640}) {
    for (const bool automatic : {false, true}) {
      spec.announced_prefix_len = announced;
      spec.config.auto_cascade = automatic;
      check(spec);
    }
  }
}

// --- merge_states ---------------------------------------------------------------------------

struct Parts {
  Tensor o_a, lse_a, o_b, lse_b, output, lse;
};

Parts make_parts(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t size) {
  Rng rng(42);
  Layout padded;
  padded.padding = {0, 1, 3};
  Parts parts{make_tensor(dtype, {tokens, heads, size}, padded),
              make_tensor(DType::kFloat32, {heads, tokens}),
              make_tensor(dtype, {tokens, heads, size}),
              make_tensor(DType::kFloat32, {heads, tokens}),
              make_tensor(dtype, {tokens, heads, size}, padded),
              make_tensor(DType::kFloat32, {heads, tokens})};
  for (const Tensor* tensor : {&parts.o_a, &parts.lse_a, &parts.o_b, &parts.lse_b}) {
    fill_normal(*tensor, &rng);
  }
  return parts;
}

// The formula, for one (token, head).
void expect_merged(const Parts& before, const Tensor& output, const std::vector<std::byte>& bytes,
                   const std::vector<std::byte>* lse_bytes, std::int64_t t, std::int64_t h) {
  const double a = before.lse_a.get({h, t});
  const double b = before.lse_b.get({h, t});
  const double highest = std::max(a, b);
  const bool none = std::isinf(highest);
  const double lse =
      none ? highest : highest + std::log(std::exp(a - highest) + std::exp(b - highest));
  const double tolerance = tolerance_of(output.dtype);
  for (std::int64_t d = 0; d < output.shape[2]; ++d) {
    double wanted = 0;
    if (!std::isinf(a)) wanted += before.o_a.get({t, h, d}) * std::exp(a - lse);
    if (!std::isinf(b)) wanted += before.o_b.get({t, h, d}) * std::exp(b - lse);
    const std::int64_t at = output.at({t, h, d}) - output.buffer->bytes.data();
    EXPECT_NEAR(decode(output.dtype, &bytes[at]), wanted, tolerance * (1 + std::fabs(wanted)))
        << t << " " << h << " " << d;
  }
  if (lse_bytes == nullptr) return;
  const double got = decode(DType::kFloat32, &(*lse_bytes)[(h * before.lse_a.strides[0] + t) * 4]);
  if (none) {
    EXPECT_EQ(got, lse);
  } else {
    EXPECT_NEAR(got, lse, 1e-5 * (1 + std::fabs(lse)));
  }
}

TEST(MergeStates, FollowsTheFormula) {
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Parts parts = make_parts(dtype, 7, 3, 20);
    // Parts that contribute nothing, whatever they hold.
    parts.lse_a.set({0, 0}, kMinusInfinity);
    parts.lse_b.set({1, 1}, kMinusInfinity);
    parts.lse_a.set({2, 2}, kMinusInfinity);
    parts.lse_b.set({2, 2}, kMinusInfinity);
    for (std::int64_t d = 0; d < 20; ++d) {
      parts.o_a.set({0, 0, d}, std::nan(""));
      parts.o_b.set({1, 1, d}, std::numeric_limits<double>::infinity());
      parts.o_b.set({2, 2, d}, std::nan(""));
    }
    parts.lse_a.set({0, 3}, 1e30);  // dwarfs the other
    parts.lse_b.set({0, 4}, 5000.0);
    DeviceBuffers buffers(&memory_of(DeviceType::kCpu));
    merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
                 buffers.view(parts.lse_b), buffers.view(parts.output), buffers.view(parts.lse));
    EXPECT_EQ(buffers.damage({&parts.output, &parts.lse}), "");
    const auto output = buffers.download(parts.output);
    const auto lse = buffers.download(parts.lse);
    for (std::int64_t t = 0; t < 7; ++t) {
      for (std::int64_t h = 0; h < 3; ++h) {
        expect_merged(parts, parts.output, output, &lse, t, h);
      }
    }
  }
}

TEST(MergeStates, MayWriteOverEitherPart) {
  for (const bool over_a : {true, false}) {
    for (const bool with_lse : {true, false}) {
      const Parts parts = make_parts(DType::kFloat32, 9, 4, 33);
      const Tensor& target = over_a ? parts.o_a : parts.o_b;
      const Tensor& target_lse = over_a ? parts.lse_a : parts.lse_b;
      DeviceBuffers buffers(&memory_of(DeviceType::kCpu));
      merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
                   buffers.view(parts.lse_b), buffers.view(target),
                   with_lse ? buffers.view(target_lse) : TensorView{});
      const auto output = buffers.download(target);
      const auto lse = buffers.download(target_lse);
      for (std::int64_t t = 0; t < 9; ++t) {
        for (std::int64_t h = 0; h < 4; ++h) {
          expect_merged(parts, target, output, with_lse ? &lse : nullptr, t, h);
        }
      }
    }
  }
}

TEST(MergeStates, NothingToMerge) {
  const Parts parts = make_parts(DType::kFloat32, 0, 4, 8);
  DeviceBuffers buffers(&memory_of(DeviceType::kCpu));
  merge_states(buffers.view(parts.o_a), buffers.view(parts.lse_a), buffers.view(parts.o_b),
               buffers.view(parts.lse_b), buffers.view(parts.output));
  EXPECT_EQ(buffers.damage({}), "");
}

QUIRE_ON_EVERY_BACKEND(InvarianceTest);

}  // namespace
}  // namespace quire::conformance
