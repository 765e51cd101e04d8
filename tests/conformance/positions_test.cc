// Positions apart from cache indices: kv_offset, kv_stride, q_offset; and what they are for, attention
// over parts of a cache merged by lse.
#include <gtest/gtest.h>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class PositionTest : public ConformanceTest {
 protected:
  // The keys first, first + step, ... of every sequence, at their places in the whole.
  static Case part_of(const Case& whole, std::int64_t first, std::int64_t step) {
    Case part = whole;
    const std::int64_t n = whole.num_seqs();
    part.spec.kv_offsets = part.spec.kv_strides = part.spec.q_offsets = true;
    for (Tensor* tensor : {&part.seq_lens, &part.kv_offset, &part.kv_stride, &part.q_offset}) {
      *tensor = make_tensor(DType::kInt32, {n});
    }
    for (Tensor* cache : {&part.key_cache, &part.value_cache}) {
      *cache = make_tensor(cache->dtype, cache->shape);  // poisoned
    }
    const std::int64_t block_size = whole.spec.config.block_size;
    for (std::int64_t s = 0; s < n; ++s) {
      const auto seq_len = static_cast<std::int64_t>(whole.seq_lens.get({s}));
      const std::int64_t query_len = whole.spec.sequences[s].query_len;
      const auto block_of = [&](std::int64_t key) {
        return static_cast<std::int64_t>(whole.block_table.get({s, key / block_size}));
      };
      std::int64_t count = 0;
      for (std::int64_t key = first; key < seq_len; key += step, ++count) {
        for (const bool is_key : {true, false}) {
          const Tensor& from = is_key ? whole.key_cache : whole.value_cache;
          const Tensor& to = is_key ? part.key_cache : part.value_cache;
          for (std::int64_t h = 0; h < from.shape[2]; ++h) {
            for (std::int64_t d = 0; d < from.shape[3]; ++d) {
              to.set({block_of(count), count % block_size, h, d},
                     from.get({block_of(key), key % block_size, h, d}));
            }
          }
        }
      }
      part.seq_lens.set({s}, static_cast<double>(count));
      part.kv_offset.set({s}, static_cast<double>(first));
      part.kv_stride.set({s}, static_cast<double>(step));
      part.q_offset.set({s}, static_cast<double>(seq_len - query_len));
    }
    return part;
  }

  // The first `count` keys of every sequence.
  static Case beginning_of(const Case& whole, std::int64_t count) {
    Case part = part_of(whole, 0, 1);
    for (std::int64_t s = 0; s < whole.num_seqs(); ++s) {
      part.seq_lens.set({s}, std::min(static_cast<double>(count), whole.seq_lens.get({s})));
    }
    return part;
  }

  // Runs both parts and merges them; the result is to be attention over the whole.
  void check_merged(const Case& whole, const Case& a, const Case& b) {
    DeviceMemory& memory = memory_of(backend().device_type());
    DeviceBuffers buffers(&memory);
    const auto run = [&](const Case& part, Tensor* output, Tensor* lse) {
      check(part);
      *output = make_tensor(part.output.dtype, part.output.shape);
      *lse = make_tensor(DType::kFloat32, part.lse.shape);
      for (std::int64_t head = 0; head < lse->shape[0]; ++head) {
        for (std::int64_t row = 0; row < lse->shape[1]; ++row) {
          lse->set({head, row}, this->lse(part, row, head));
          for (std::int64_t d = 0; d < output->shape[2]; ++d) {
            output->set({row, head, d}, out(part, row, head, d));
          }
        }
      }
    };
    Tensor o_a, lse_a, o_b, lse_b;
    run(a, &o_a, &lse_a);
    run(b, &o_b, &lse_b);
    merge_states(buffers.view(o_a), buffers.view(lse_a), buffers.view(o_b), buffers.view(lse_b),
                 buffers.view(o_a), buffers.view(lse_a));
    memory.synchronize();
    Actual merged;
    merged.output = buffers.download(o_a);
    Case plain = whole;  // with lse rows as they lie in lse_a
    plain.lse = {};
    EXPECT_EQ(compare(plain, merged, literal_attention(whole)), "") << describe(whole.spec);
  }

  static CaseSpec split_spec() {
    CaseSpec spec = small_spec({{5, 37}, {1, 30}, {20, 20}, {3, 4}});
    spec.write = false;
    spec.layout = CacheLayout::kSeparate;
    spec.output_3d = true;
    return spec;
  }

  void check_splits(const CaseSpec& spec) {
    const Case whole = build_case(spec);
    for (const std::int64_t at : {0, 3, 16, 29}) {
      check_merged(whole, beginning_of(whole, at), part_of(whole, at, 1));
    }
    check_merged(whole, part_of(whole, 0, 2), part_of(whole, 1, 2));
  }
};

TEST_P(PositionTest, PartsMergeToTheWhole) { check_splits(split_spec()); }

TEST_P(PositionTest, PartsMergeToTheWholeInsideAWindow) {
  for (const std::int64_t size : {1, 2, 9, 30}) {
    CaseSpec spec = split_spec();
    spec.config.mask = Mask::sliding_window(size);
    check_splits(spec);
    spec.config.mask.causal = false;
    check_splits(spec);
  }
}

TEST_P(PositionTest, PartsMergeToTheWholeInChunks) {
  for (const std::int64_t lookback : {0, 1}) {
    CaseSpec spec = split_spec();
    spec.config.mask = Mask::chunked(7, lookback);
    check_splits(spec);
  }
}

TEST_P(PositionTest, PartsMergeToTheWholeWithAlibi) {
  for (const bool square_root : {false, true}) {
    CaseSpec spec = split_spec();
    spec.alibi = true;
    spec.config.score.alibi_sqrt = square_root;
    check_splits(spec);
  }
}

TEST_P(PositionTest, PartsMergeToTheWholeWithRangesAndPrefixes) {
  for (const bool clamp : {false, true}) {
    CaseSpec spec = split_spec();
    spec.config.mask = Mask::sliding_window(4);
    spec.config.mask.clamp_ranges = clamp;
    spec.ranges = spec.visible_prefixes = true;
    spec.sequences[0].ranges = {{30, 35}};
    spec.sequences[2].ranges = {{2, 9}, {11, 18}};
    spec.sequences[0].visible_prefix = 5;
    spec.sequences[1].visible_prefix = 20;
    check_splits(spec);
  }
}

// Sequences long enough that their keys are split among threads, in 16 bits too.
TEST_P(PositionTest, LongPartsMergeToTheWhole) {
  CaseSpec spec = small_spec({{1, 1500}, {70, 900}});
  spec.write = false;
  spec.layout = CacheLayout::kSeparate;
  spec.output_3d = true;
  spec.config.block_size = 16;
  spec.alibi = true;
  spec.alibi_max = 0.01;
  spec.config.mask = Mask::sliding_window(500);
  const Case whole = build_case(spec);
  check_merged(whole, beginning_of(whole, 700), part_of(whole, 700, 1));
  check_merged(whole, part_of(whole, 0, 2), part_of(whole, 1, 2));
}

// The bias goes by the keys' indices, whatever their positions.
TEST_P(PositionTest, QueryQueryBiasGoesByIndices) {
  CaseSpec spec = small_spec({{4, 12}, {3, 9}});
  spec.qq_bias_size = 4;
  spec.kv_offsets = spec.q_offsets = true;
  for (SequenceSpec& s : spec.sequences) {
    s.kv_offset = 1000;
    s.q_offset = 1000 + static_cast<std::int32_t>(s.seq_len - s.query_len);
  }
  check(spec);
}

TEST_P(PositionTest, SequencesThatShareBlocksAtOtherPositions) {
  CaseSpec spec = small_spec({{1, 3000}, {1, 3000}, {1, 3000}});
  spec.config.block_size = 16;
  spec.write = false;
  spec.shared_prefix_len = spec.announced_prefix_len = 2976;
  spec.kv_offsets = spec.q_offsets = true;
  spec.alibi = true;
  spec.alibi_max = 0.01;
  for (std::int64_t s = 0; s < 3; ++s) {
    spec.sequences[s].kv_offset = static_cast<std::int32_t>(500 * s);
    spec.sequences[s].q_offset = 2000;
  }
  check(spec);
}

TEST_P(PositionTest, EncoderKeysMayLieElsewhereToo) {
  CaseSpec spec = small_spec({{6, 6}, {3, 3}});
  spec.config.type = AttentionType::kEncoder;
  spec.config.mask = Mask::sliding_window_both(2);
  spec.alibi = true;
  spec.kv_offsets = spec.kv_strides = spec.q_offsets = true;
  spec.sequences[0].kv_offset = 10;
  spec.sequences[0].kv_stride = 3;
  spec.sequences[0].q_offset = 9;
  check(spec);
}

// No key of cross attention, or of an encoder with keys of its own, is this step's own token.
TEST_P(PositionTest, NoQueryQueryBiasOnOtherTokensKeys) {
  CaseSpec spec = small_spec({{4, 12}, {3, 9}});
  spec.config.type = AttentionType::kEncoderDecoder;
  spec.write = false;
  spec.qq_bias_size = 4;
  check(spec);
  spec.config.type = AttentionType::kEncoder;
  spec.kv_start_loc = true;
  check(spec);
  spec.kv_start_loc = false;
  spec.sequences = {{4, 4}, {3, 3}};
  check(spec);
}

QUIRE_ON_EVERY_BACKEND(PositionTest);

}  // namespace
}  // namespace quire::conformance
