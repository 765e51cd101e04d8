// Workload files: the stored costs, errors, scaling.
#include "bench/workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace quire::bench {
namespace {

const char kCases[] = QUIRE_SOURCE_DIR "/bench/cases/workloads.json";

// The definition, counted pair by pair.
std::int64_t count_pairs(const Sequence& s, std::int64_t window) {
  std::int64_t pairs = 0;
  for (std::int64_t p = s.seq_len - s.query_len; p < s.seq_len; ++p) {
    for (std::int64_t j = 0; j <= p; ++j) pairs += window == 0 || p - j < window ? 1 : 0;
  }
  return pairs;
}

TEST(Workload, PairsAndKeysFollowTheDefinition) {
  for (std::int64_t seq_len = 1; seq_len <= 12; ++seq_len) {
    for (std::int64_t query_len = 1; query_len <= seq_len; ++query_len) {
      for (std::int64_t window = 0; window <= 14; ++window) {
        const Sequence s{query_len, seq_len};
        EXPECT_EQ(visible_pairs(s, window), count_pairs(s, window))
            << query_len << " of " << seq_len << ", window " << window;
        const std::int64_t first_row = seq_len - query_len;
        const std::int64_t first_key =
            window == 0 ? 0 : std::max<std::int64_t>(0, first_row - window + 1);
        EXPECT_EQ(needed_keys(s, window), seq_len - first_key);
      }
    }
  }
}

// load_workloads() compares each workload's stored flops and bytes with the formulas.
TEST(Workload, FormulasReproduceTheStoredCosts) {
  const std::vector<Workload> workloads = load_workloads(kCases);
  EXPECT_EQ(workloads.size(), 20U);
  EXPECT_EQ(workloads[0].name, "dec_b1_8k");
  EXPECT_EQ(flops(workloads[0]), 134217728);
  EXPECT_EQ(bytes(workloads[0]), 33570816);
}

TEST(Workload, SharedPrefixesCountOnce) {
  const std::vector<Workload> workloads =
      load_workloads(QUIRE_SOURCE_DIR "/bench/cases/shared_prefix.json");
  for (const Workload& workload : workloads) {
    EXPECT_GT(workload.shared_prefix, 0) << workload.name;
    Workload plain = workload;
    plain.shared_prefix = 0;
    EXPECT_GT(bytes(plain), bytes(workload)) << workload.name;
    const Workload small = scaled(workload, 0.1);
    for (const Sequence& s : small.batch) {
      EXPECT_LE(small.shared_prefix, s.seq_len - s.query_len) << workload.name;
    }
  }
}

TEST(Workload, CacheWritesHaveThousandsOfTokens) {
  const std::vector<Workload> workloads =
      load_workloads(QUIRE_SOURCE_DIR "/bench/cases/cache_write.json");
  std::set<std::int64_t> tokens;
  for (const Workload& workload : workloads) tokens.insert(workload.num_tokens());
  EXPECT_EQ(tokens.count(4096), 1U);
  EXPECT_EQ(tokens.count(16384), 1U);
}

TEST(Workload, ElementSizesCount) {
  Workload workload;
  workload.model = {.name = "m", .num_heads = 4, .num_kv_heads = 2, .head_size = 8};
  workload.batch = {{1, 10}};
  EXPECT_EQ(bytes(workload), 2 * 10 * 2 * 8 * 2 + 2 * 4 * 8 * 2);
  EXPECT_EQ(bytes(workload, {.query = 4, .kv_bits = 8, .kv_scale = 4}),
            2 * 10 * 2 * (8 + 4) + 2 * 4 * 8 * 4);
  EXPECT_EQ(bytes(workload, {.query = 4, .kv_bits = 4, .kv_scale = 4}),
            2 * 10 * 2 * (4 + 4) + 2 * 4 * 8 * 4);
  EXPECT_EQ(write_bytes(workload), 2 * 2 * 8 * (2 + 2));
  EXPECT_EQ(write_bytes(workload, {.query = 4, .kv_bits = 8, .kv_scale = 4}), 2 * 2 * (8 * 5 + 4));
}

TEST(Workload, ScalingKeepsShapeAndHitsTheCost) {
  for (const Workload& workload : load_workloads(kCases)) {
    EXPECT_EQ(scaled(workload, 1.0).batch, workload.batch);
    for (const double scale : {0.5, 0.25, 0.1, 0.03}) {
      const Workload small = scaled(workload, scale);
      SCOPED_TRACE(workload.name + " at " + std::to_string(scale));
      EXPECT_EQ(small.scale, scale);
      EXPECT_LE(small.batch.size(), workload.batch.size());
      EXPECT_LE(small.max_seq_len(), workload.max_seq_len());
      const auto is_decode = [](const Sequence& s) { return s.query_len <= 16; };
      EXPECT_EQ(std::any_of(small.batch.begin(), small.batch.end(), is_decode),
                std::any_of(workload.batch.begin(), workload.batch.end(), is_decode));
      EXPECT_EQ(std::all_of(small.batch.begin(), small.batch.end(), is_decode),
                std::all_of(workload.batch.begin(), workload.batch.end(), is_decode));
      for (const Sequence& s : small.batch) {
        EXPECT_GE(s.query_len, 1);
        EXPECT_GE(s.seq_len, s.query_len);
      }
      // A windowed decode batch bottoms out at one sequence of two windows.
      const bool at_bottom = workload.model.sliding_window > 0 && small.batch.size() == 1;
      const double ratio = static_cast<double>(flops(small)) / static_cast<double>(flops(workload));
      if (!at_bottom) {
        EXPECT_GT(ratio, 0.5 * scale);  // one of few unequal sequences can be far from the mean
        EXPECT_LT(ratio, 1.2 * scale);
      }
    }
  }
}

TEST(Workload, ScaleIsChecked) {
  const Workload workload = load_workloads(kCases).front();
  EXPECT_THROW(scaled(workload, 0.0), std::runtime_error);
  EXPECT_THROW(scaled(workload, 1.5), std::runtime_error);
  EXPECT_THROW(scaled(workload, -1.0), std::runtime_error);
}

class WorkloadFile : public testing::Test {
 protected:
  ~WorkloadFile() override { std::filesystem::remove(path_); }

  std::string error_of(const std::string& text) {
    std::ofstream(path_) << text;
    try {
      load_workloads(path_);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "no error";
  }

  // A file with one workload whose batch and costs are given.
  static std::string file_with(const std::string& batch, const std::string& costs) {
    return R"({"models": {"m": {"num_heads": 4, "num_kv_heads": 2, "head_size": 8,
                "sliding_window": null, "soft_cap": 0.0, "sinks": false}},
               "workloads": [{"name": "w", "model": "m", )" +
           costs + R"(, "batch": )" + batch + "}]}";
  }

  const std::string path_ =
      (std::filesystem::temp_directory_path() /
       ("quire_workload_test_" +
        std::string(testing::UnitTest::GetInstance()->current_test_info()->name()) + ".json"))
          .string();
};

TEST_F(WorkloadFile, ErrorsNameFileWorkloadAndMember) {
  using testing::AllOf;
  using testing::HasSubstr;
  const std::string costs = R"("flops": 1280, "bytes": 768)";
  EXPECT_EQ(error_of(file_with("[[1, 10]]", costs)), "no error");
  EXPECT_THAT(error_of(file_with("[[1, 10]]", R"("flops": 1, "bytes": 768)")),
              AllOf(HasSubstr(path_), HasSubstr("w.flops: expected 1280"), HasSubstr("got 1")));
  EXPECT_THAT(error_of(file_with("[[1, 10]]", R"("flops": 1280, "bytes": 7)")),
              HasSubstr("w.bytes: expected 768"));
  EXPECT_THAT(error_of(file_with("[]", costs)), HasSubstr("w.batch: expected a list"));
  EXPECT_THAT(error_of(file_with("[[1]]", costs)), HasSubstr("w.batch[0]: expected [query_len"));
  EXPECT_THAT(error_of(file_with("[[11, 10]]", costs)), HasSubstr("w.batch[0][0]: expected 1 to"));
  EXPECT_THAT(error_of(file_with("[[1, -3]]", costs)), HasSubstr("w.batch[0][1]"));
  EXPECT_THAT(error_of(file_with("[[1, 18446744073709551615]]", costs)), HasSubstr("got 184467"));
  EXPECT_THAT(error_of(file_with("[[1, 1.5]]", costs)), HasSubstr("expected an integer"));
}

TEST_F(WorkloadFile, FilesThatAreNone) {
  using testing::HasSubstr;
  EXPECT_THAT(error_of("{"), HasSubstr("parse error"));
  EXPECT_THAT(error_of("[]"), HasSubstr("expected an object"));
  EXPECT_THAT(error_of("{}"), HasSubstr("\"models\" is missing"));
  EXPECT_THAT(error_of(R"({"models": {}, "workloads": []})"), HasSubstr("workloads: expected"));
  EXPECT_THAT(error_of(R"({"models": {}, "workloads": [{"name": "w", "model": "m"}]})"),
              HasSubstr("no model has the name \"m\""));
  EXPECT_THAT(error_of(R"({"models": {"m": {"num_heads": 3, "num_kv_heads": 2, "head_size": 8}},
                           "workloads": []})"),
              HasSubstr("models.m.num_kv_heads: expected a divisor"));
  std::filesystem::remove(path_);
  try {
    load_workloads(path_);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("cannot be opened"));
  }
}

}  // namespace
}  // namespace quire::bench
