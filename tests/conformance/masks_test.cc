// Who sees what: step 3 of the score in semantics.md, one edge a test.
#include <gtest/gtest.h>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

class MaskTest : public ConformanceTest {
 protected:
  // Which keys row `row` sees, read off the outputs: V of key j is the unit vector j.
  std::vector<std::int64_t> seen_by(CaseSpec spec, std::int64_t row) {
    spec.config.head_size = spec.config.head_size_v = 64;
    spec.write = false;
    const Case c = build_case(spec);
    for (std::size_t s = 0; s < spec.sequences.size(); ++s) {
      for (std::int64_t j = 0; j < spec.sequences[s].seq_len; ++j) {
        const Sizes at = slot_of(c, static_cast<std::int64_t>(s), j);
        for (std::int64_t h = 0; h < spec.config.num_kv_heads; ++h) {
          for (std::int64_t d = 0; d < 64; ++d) {
            c.value_cache.set({at[0], at[1], h, d}, d == j ? 1 : 0);
          }
        }
      }
    }
    check(c);
    std::vector<std::int64_t> seen;
    for (std::int64_t d = 0; d < 64; ++d) {
      if (out(c, row, 0, d) > 0) seen.push_back(d);
    }
    return seen;
  }

  using Keys = std::vector<std::int64_t>;
};

TEST_P(MaskTest, CausalRowSeesItselfAndWhatIsBefore) {
  const CaseSpec spec = small_spec({{3, 6}});
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3}));
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_P(MaskTest, FullRowSeesAllKeysBelowSeqLen) {
  CaseSpec spec = small_spec({{3, 6}});
  spec.config.mask = Mask::full();
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_P(MaskTest, FlagOfASequenceSwitchesCausalityOffButNeverOn) {
  CaseSpec spec = small_spec({{2, 4}, {2, 4}});
  spec.causal_flags = true;
  spec.sequences[0].causal = false;
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3}));
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2}));
  spec.config.mask = Mask::full();
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3}));
  spec.config.type = AttentionType::kEncoderDecoder;
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3}));
  for (const AttentionType type : {AttentionType::kEncoder, AttentionType::kEncoderOnly}) {
    CaseSpec encoder = small_spec({{4, 4}, {3, 3}});
    encoder.config.type = type;
    encoder.causal_flags = true;
    check(encoder);
  }
}

TEST_P(MaskTest, LeftWindowIsOnBothSidesOfASequenceThatIsNotCausal) {
  CaseSpec spec = small_spec({{6, 9}, {6, 9}});
  spec.config.mask = Mask::sliding_window(3);
  spec.causal_flags = true;
  spec.sequences[0].causal = false;
  EXPECT_EQ(seen_by(spec, 1), (Keys{2, 3, 4, 5, 6}));
  EXPECT_EQ(seen_by(spec, 7), (Keys{2, 3, 4}));
}

TEST_P(MaskTest, LeftWindowCountsTheQueryItself) {
  CaseSpec spec = small_spec({{2, 9}});
  spec.config.mask = Mask::sliding_window(3);
  EXPECT_EQ(seen_by(spec, 0), (Keys{5, 6, 7}));
  spec.config.mask = Mask::sliding_window(1);
  EXPECT_EQ(seen_by(spec, 1), (Keys{8}));
  spec.config.mask = Mask::sliding_window(9);
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  spec.config.mask = Mask::sliding_window(8);
  EXPECT_EQ(seen_by(spec, 1), (Keys{1, 2, 3, 4, 5, 6, 7, 8}));
}

// As vLLM's kernel does (the golden cases noncausal_window).
TEST_P(MaskTest, LeftWindowOfALayerThatIsNotCausalIsOnBothSides) {
  CaseSpec spec = small_spec({{4, 8}});
  spec.config.mask = Mask::sliding_window(2);
  spec.config.mask.causal = false;
  EXPECT_EQ(seen_by(spec, 1), (Keys{4, 5, 6}));
}

TEST_P(MaskTest, WindowOnBothSides) {
  CaseSpec spec = small_spec({{8, 8}});
  spec.config.mask = Mask::sliding_window_both(3);
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2}));
  EXPECT_EQ(seen_by(spec, 4), (Keys{2, 3, 4, 5, 6}));
  EXPECT_EQ(seen_by(spec, 7), (Keys{5, 6, 7}));
  spec.config.mask.causal = true;
  EXPECT_EQ(seen_by(spec, 4), (Keys{2, 3, 4}));
}

TEST_P(MaskTest, ChunkEndsAtChunkBoundary) {
  CaseSpec spec = small_spec({{8, 16}});
  spec.config.mask = Mask::chunked(6);
  EXPECT_EQ(seen_by(spec, 0), (Keys{6, 7, 8}));  // p = 8, chunk 1
  EXPECT_EQ(seen_by(spec, 3), (Keys{6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(seen_by(spec, 4), (Keys{12}));  // first of chunk 2
}

TEST_P(MaskTest, ChunkWithLookbackSeesEarlierChunks) {
  CaseSpec spec = small_spec({{4, 16}});
  spec.config.mask = Mask::chunked(4, 1);
  EXPECT_EQ(seen_by(spec, 0), (Keys{8, 9, 10, 11, 12}));
  spec.config.mask = Mask::chunked(4, 100);
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
}

TEST_P(MaskTest, VisiblePrefixEscapesTheWindowButNotCausality) {
  CaseSpec spec = small_spec({{2, 12}});
  spec.config.mask = Mask::sliding_window(2);
  spec.visible_prefixes = true;
  spec.sequences[0].visible_prefix = 3;
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 9, 10}));
  spec.sequences[0].visible_prefix = 9;  // meets the window
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
  spec.sequences[0].visible_prefix = 1000;
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
  spec.sequences[0].visible_prefix = 0;
  EXPECT_EQ(seen_by(spec, 0), (Keys{9, 10}));
}

TEST_P(MaskTest, VisiblePrefixEscapesChunks) {
  CaseSpec spec = small_spec({{2, 12}});
  spec.config.mask = Mask::chunked(4);
  spec.visible_prefixes = true;
  spec.sequences[0].visible_prefix = 2;
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1, 8, 9, 10, 11}));
}

TEST_P(MaskTest, BidirectionalRangeShowsLaterKeysToItsMembers) {
  CaseSpec spec = small_spec({{8, 8}});
  spec.ranges = true;
  spec.sequences[0].ranges = {{2, 5}};
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1}));
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(seen_by(spec, 5), (Keys{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(seen_by(spec, 6), (Keys{0, 1, 2, 3, 4, 5, 6}));
}

TEST_P(MaskTest, RangeReachesOutOfTheWindow) {
  CaseSpec spec = small_spec({{8, 8}});
  spec.config.mask = Mask::sliding_window(1);
  spec.ranges = true;
  spec.sequences[0].ranges = {{1, 6}};
  EXPECT_EQ(seen_by(spec, 4), (Keys{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(seen_by(spec, 7), (Keys{7}));
}

// Gemma 4: p = 4 sees its range as far as the window of 3 goes back.
TEST_P(MaskTest, ClampedRangeEndsAtTheWindow) {
  CaseSpec spec = small_spec({{10, 10}});
  spec.config.mask = Mask::sliding_window(3);
  spec.config.mask.clamp_ranges = true;
  spec.ranges = true;
  spec.sequences[0].ranges = {{1, 6}};
  EXPECT_EQ(seen_by(spec, 4), (Keys{2, 3, 4, 5, 6}));
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(seen_by(spec, 7), (Keys{5, 6, 7}));
  spec.config.mask.window = WindowKind::kBoth;
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3, 4}));
  spec.config.mask.window = WindowKind::kNone;
  EXPECT_EQ(seen_by(spec, 2), (Keys{0, 1, 2, 3, 4, 5, 6}));
}

TEST_P(MaskTest, ClampedRangeAndVisiblePrefix) {
  CaseSpec spec = small_spec({{12, 12}});
  spec.config.mask = Mask::sliding_window(2);
  spec.config.mask.clamp_ranges = true;
  spec.ranges = spec.visible_prefixes = true;
  spec.sequences[0].ranges = {{1, 9}};
  spec.sequences[0].visible_prefix = 4;
  EXPECT_EQ(seen_by(spec, 8), (Keys{0, 1, 2, 3, 7, 8, 9}));
  // The prefix escapes the window, and the range brings what lies ahead.
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(seen_by(spec, 11), (Keys{0, 1, 2, 3, 10, 11}));
}

TEST_P(MaskTest, EmptyRangesMeanNone) {
  CaseSpec spec = small_spec({{6, 6}});
  spec.ranges = true;
  spec.sequences[0].ranges = {{3, 3}, {4, 2}, {0, 0}};
  EXPECT_EQ(seen_by(spec, 3), (Keys{0, 1, 2, 3}));
}

TEST_P(MaskTest, OverlappingRangesAreSeparateSets) {
  CaseSpec spec = small_spec({{10, 10}});
  spec.ranges = true;
  spec.sequences[0].ranges = {{1, 4}, {3, 7}};
  EXPECT_EQ(seen_by(spec, 1), (Keys{0, 1, 2, 3, 4}));
  EXPECT_EQ(seen_by(spec, 3), (Keys{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(seen_by(spec, 6), (Keys{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST_P(MaskTest, RangeEndsAtSeqLen) {
  CaseSpec spec = small_spec({{3, 6}});
  spec.ranges = true;
  spec.sequences[0].ranges = {{2, 1000}};
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_P(MaskTest, RangesBelongToTheirSequence) {
  CaseSpec spec = small_spec({{4, 4}, {4, 4}});
  spec.ranges = true;
  spec.sequences[1].ranges = {{0, 3}};
  EXPECT_EQ(seen_by(spec, 0), (Keys{0}));
  EXPECT_EQ(seen_by(spec, 4), (Keys{0, 1, 2, 3}));
}

TEST_P(MaskTest, EncoderIsNeverCausal) {
  for (const AttentionType type : {AttentionType::kEncoder, AttentionType::kEncoderOnly}) {
    CaseSpec spec = small_spec({{6, 6}, {3, 3}});
    spec.config.type = type;
    spec.config.mask.causal = true;
    check(spec);
    spec.config.mask = Mask::sliding_window_both(2);
    check(spec);
  }
}

TEST_P(MaskTest, EncoderWithKeysOfItsOwn) {
  CaseSpec spec = small_spec({{6, 4}, {3, 9}, {2, 0}});
  spec.config.type = AttentionType::kEncoder;
  spec.kv_start_loc = true;
  check(spec);
}

TEST_P(MaskTest, CrossAttentionSeesAllKeysWhateverTheQueryLength) {
  CaseSpec spec = small_spec({{5, 3}, {2, 9}, {4, 0}});
  spec.config.type = AttentionType::kEncoderDecoder;
  spec.config.mask.causal = true;
  spec.write = false;
  EXPECT_EQ(seen_by(spec, 0), (Keys{0, 1, 2}));
  EXPECT_EQ(seen_by(spec, 5), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(seen_by(spec, 7), (Keys{}));
}

QUIRE_ON_EVERY_BACKEND(MaskTest);

}  // namespace
}  // namespace quire::conformance
