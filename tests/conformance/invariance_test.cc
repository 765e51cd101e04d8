// What must not change a result: neighbours, place, padding, threads, cascade.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
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

  // Puts the query from row `skip` on, K and V of sequence `r` of `from` in place of those of
  // sequence `s` of `to`.
  static void transplant(const Case& from, std::int64_t r, const Case& to, std::int64_t s,
                         std::int64_t skip = 0) {
    const SequenceSpec& sequence = to.spec.sequences[static_cast<std::size_t>(s)];
    const auto first = static_cast<std::int64_t>(from.query_start_loc.get({r})) + skip;
    const auto row = static_cast<std::int64_t>(to.query_start_loc.get({s}));
    const AttentionConfig& config = from.spec.config;
    for (std::int64_t i = 0; i < sequence.query_len; ++i) {
      std::memcpy(to.query.at({row + i, 0, 0}), from.query.at({first + i, 0, 0}),
                  config.num_heads * config.head_size * size_of(config.dtype));
    }
    for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
      const std::int64_t block_size = config.block_size;
      const auto source = static_cast<std::int64_t>(from.block_table.get({r, j / block_size}));
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
          transplant(alone, 0, c, place);
          const auto row = static_cast<std::int64_t>(c.query_start_loc.get({place}));
          const Rows got = rows_of(c, DeviceCase(c, backend()).attend(), row, query_len);
          EXPECT_TRUE(got == wanted) << query_len << "/" << seq_len << " in " << describe(spec);
        }
      }
    }
  }
}

// Padding inside num_actual_tokens makes batches of several lengths look like batches of one.
TEST_P(InvarianceTest, CountedPaddingAndTheLongestQueryChangeNoBits) {
  for (const std::int64_t max_query_len : {5, 20, 90}) {
    CaseSpec spec = invariant_spec(DType::kBFloat16, {{1, 2600}, {5, 2111}, {3, 700}}, 7);
    const Case plain = build_case(spec);
    const Rows wanted = rows_of(plain, DeviceCase(plain, backend()).attend(), 0, 9);
    spec.max_query_len = max_query_len;
    spec.padded_sequences = 1;
    spec.counted_rows = 4 * max_query_len - spec.num_rows();
    spec.padded_rows = spec.counted_rows + 2;
    const Case padded = build_case(spec);
    for (std::int64_t s = 0; s < 3; ++s) transplant(plain, s, padded, s);
    const Rows got = rows_of(padded, DeviceCase(padded, backend()).attend(), 0, 9);
    EXPECT_TRUE(got == wanted) << describe(spec);
    check(padded);
  }
}

// Documented for the CPU: a prompt has the same bits in one step and in chunks, if each chunk has
// more than 64 query rows.
TEST_P(InvarianceTest, ChunksOfAPromptChangeNoBitsOnTheCpu) {
  if (backend().device_type() != DeviceType::kCpu) return;
  constexpr std::int64_t kTokens = 700;
  for (const Mask& mask : {Mask{}, Mask::sliding_window(90), Mask::chunked(128, 1)}) {
    CaseSpec spec = invariant_spec(DType::kBFloat16, {{kTokens, kTokens}}, 8);
    spec.config.mask = mask;
    const Case whole = build_case(spec);
    const Actual at_once = DeviceCase(whole, backend()).attend();
    const std::int64_t least = 64 * spec.config.num_kv_heads / spec.config.num_heads + 1;
    for (const std::int64_t chunk : {least, least + 13, std::int64_t{300}}) {
      for (std::int64_t begin = 0; kTokens - begin >= least; begin += chunk) {
        const std::int64_t count = std::min(chunk, kTokens - begin);
        spec.sequences = {{count, begin + count}};
        const Case part = build_case(spec);
        transplant(whole, 0, part, 0, begin);
        EXPECT_TRUE(rows_of(part, DeviceCase(part, backend()).attend(), 0, count) ==
                    rows_of(whole, at_once, begin, count))
            << begin << "+" << count << " of " << describe(spec);
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

QUIRE_ON_EVERY_BACKEND(InvarianceTest);

}  // namespace
}  // namespace quire::conformance
