// The table of attention kernels of a build with CUDA, and which of them a layer gets. What the
// rows claim is tested on a GPU, by the conformance suite; here the kernels are not launched.
#include "cuda/kernel_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "quire/quire.h"
#include "semantics/int4.h"

namespace quire::cuda {
namespace {

std::vector<AttentionKernel> all_rows() {
  std::vector<AttentionKernel> rows;
  for (const std::span<const AttentionKernel> architecture : kernel_table()) {
    rows.insert(rows.end(), architecture.begin(), architecture.end());
  }
  return rows;
}

// What verify --covering counts by: kernels over bytes that take both types of queries have two rows.
TEST(KernelTable, TwoRowsOfOneKernelSaySo) {
  std::size_t num_twins = 0;
  for (const KernelInfo& kernel : attention_backend("cuda").kernel_table()) {
    const bool is_twin = kernel.name.find("sm90::decode_bf16_kv8") == 0;
    num_twins += is_twin ? 1 : 0;
    std::string twin = is_twin ? kernel.name : "";
    if (is_twin) twin.replace(twin.find("bf16"), 4, "fp16");
    EXPECT_EQ(kernel.same_as, twin) << kernel.name;
  }
  EXPECT_GT(num_twins, 0U);
}

TEST(KernelTable, RowsCanBePlannedFor) {
  std::set<std::string> names;
  for (const AttentionKernel& kernel : all_rows()) {
    SCOPED_TRACE(kernel.name);
    EXPECT_TRUE(names.insert(kernel.name).second) << "twice";
    const TilePolicy& policy = kernel.policy;
    EXPECT_GT(policy.rows, 0);
    EXPECT_LE(policy.rows, kernel.key.max_rows);
    EXPECT_GT(policy.kv_tile, 0);
    EXPECT_GT(policy.v_columns, 0);
    EXPECT_GT(policy.min_range_cost, policy.item_overhead) << "a range without a kv tile";
    EXPECT_GT(policy.min_chunk, 0);
    EXPECT_TRUE(kernel.key.plain || kernel.key.score_mod) << "takes no call";
    EXPECT_NE(kernel.prepare, nullptr);
    EXPECT_NE(kernel.launch == nullptr, kernel.launch_beside == nullptr);
    EXPECT_EQ(kernel.beside == nullptr, kernel.launch_beside == nullptr);
  }
}

TEST(KernelTable, TheLastRowTakesEveryLayer) {
  ASSERT_FALSE(all_rows().empty());
  const KernelKey key = all_rows().back().key;
  EXPECT_EQ(key.compute, DType::kFloat32);
  EXPECT_LE(key.min_capability, 80);
  EXPECT_GE(key.max_capability, 120);
  EXPECT_EQ(key.max_head_size, 576);
  EXPECT_EQ(key.min_head_size_v, 0);
  EXPECT_EQ(key.max_rows, kAnyRows);
  EXPECT_TRUE(key.plain && key.score_mod);
}

bool fits(const LayerParams&, const DeviceInfo&, Launch* launch) {
  launch->ctas_per_sm = 2;
  return true;
}
bool does_not_fit(const LayerParams&, const DeviceInfo&, Launch*) { return false; }

// Of this build's table, on a device where everything fits.
TEST(KernelTable, EveryLayerHasKernelsForAllNumbersOfRows) {
  std::vector<std::vector<AttentionKernel>> copies;
  KernelTable table;
  for (const std::span<const AttentionKernel> architecture : kernel_table()) {
    copies.emplace_back(architecture.begin(), architecture.end());
  }
  for (std::vector<AttentionKernel>& rows : copies) {
    for (AttentionKernel& kernel : rows) kernel.prepare = fits;
    table.emplace_back(rows);
  }
  DeviceInfo device;
  device.sm_count = 132;
  device.major = 9;
  for (const DType dtype :
       {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3}) {
    for (const DType kv_dtype :
         {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3,
          DType::kFloat8E5M2, DType::kInt8, semantics::kInt4}) {
      for (const std::int32_t head_size : {8, 64, 65, 128, 200, 256, 257, 576}) {
        SCOPED_TRACE(std::string(to_string(dtype)) + " over " + to_string(kv_dtype) + ", " +
                     std::to_string(head_size));
        LayerParams layer;
        layer.dtype = dtype;
        layer.kv_dtype = kv_dtype;
        layer.head_size = layer.head_size_v = head_size;
        for (const Calls calls : {Calls::kSome, Calls::kAny}) {
          const std::vector<KernelFamily> families = choose_kernels(table, layer, device, calls);
          ASSERT_FALSE(families.empty());
          ASSERT_LE(families.size(), static_cast<std::size_t>(kMaxFamilies));
          EXPECT_EQ(families.back().first().key.max_rows, kAnyRows);
          if (kv_dtype == semantics::kInt4) {
            EXPECT_EQ(families.front().first().key.compute, DType::kFloat32);
          }
          for (std::size_t i = 1; i < families.size(); ++i) {
            EXPECT_LT(families[i - 1].first().key.max_rows, families[i].first().key.max_rows);
          }
          // The least head size of those that hold the layer.
          for (const KernelFamily& family : families) {
            for (const AttentionKernel& other : all_rows()) {
              const KernelKey& key = family.first().key;
              if (other.takes == nullptr && other.key.compute == key.compute &&
                  other.key.kv8 == key.kv8 && other.key.max_rows == key.max_rows &&
                  other.key.max_head_size >= head_size) {
                EXPECT_LE(key.max_head_size, other.key.max_head_size);
              }
            }
            EXPECT_TRUE(calls == Calls::kSome || family.is_complete());
          }
        }
      }
    }
  }
}

// The table with kernels that are never launched: kernels for every dtype, head sizes 64 and 128,
// and fp32; before them, where wanted, those of a newer architecture.
class Table {
 public:
  Table() {
    for (const std::int32_t head_size : {64, 128}) {
      for (const std::int32_t rows : {16, 32, kAnyRows}) add(&old_, "old", head_size, rows, 80);
    }
    add(&fp32_, "fp32", 576, kAnyRows, 80);
    for (AttentionKernel& kernel : fp32_) kernel.key.compute = DType::kFloat32;
  }

  // A plain kernel and one for modified scores.
  void add(std::vector<AttentionKernel>* rows, const char* name, std::int32_t head_size,
           std::int32_t max_rows, int capability) {
    for (const bool score_mod : {false, true}) {
      AttentionKernel kernel;
      kernel.key.min_capability = capability;
      kernel.key.compute = DType::kBFloat16;
      kernel.key.max_head_size = head_size;
      kernel.key.max_rows = max_rows;
      kernel.key.plain = !score_mod;
      kernel.key.score_mod = score_mod;
      kernel.name = name;
      kernel.policy.rows = std::min(max_rows, 128);
      kernel.policy.v_columns = head_size;
      kernel.prepare = fits;
      rows->push_back(kernel);
    }
  }

  static LayerParams layer_of(std::int32_t head_size, DType dtype) {
    LayerParams layer;
    layer.dtype = layer.kv_dtype = dtype;
    layer.head_size = layer.head_size_v = head_size;
    return layer;
  }
  static DeviceInfo device_of(int capability) {
    DeviceInfo device;
    device.sm_count = 10;
    device.major = capability / 10;
    device.minor = capability % 10;
    return device;
  }

  // "name/rows/head size" of the families of a bf16 layer.
  std::vector<std::string> chosen(std::int32_t head_size, int capability = 80,
                                  DType dtype = DType::kBFloat16, Calls calls = Calls::kAny,
                                  float soft_cap = 0.0F) const {
    LayerParams layer = layer_of(head_size, dtype);
    layer.soft_cap = soft_cap;
    const DeviceInfo device = device_of(capability);
    std::vector<std::string> names;
    for (const KernelFamily& family : choose_kernels({new_, old_, fp32_}, layer, device, calls)) {
      EXPECT_EQ(family.grid, 20);
      const KernelKey& key = family.first().key;
      names.push_back(family.first().name + std::string("/") +
                      (key.max_rows == kAnyRows ? "any" : std::to_string(key.max_rows)) + "/" +
                      std::to_string(key.max_head_size));
    }
    return names;
  }

  std::vector<AttentionKernel> new_, old_, fp32_;
};

using Names = std::vector<std::string>;

TEST(ChooseKernels, TheLeastHeadSizeThatHoldsTheLayer) {
  const Table table;
  EXPECT_EQ(table.chosen(40), (Names{"old/16/64", "old/32/64", "old/any/64"}));
  EXPECT_EQ(table.chosen(65), (Names{"old/16/128", "old/32/128", "old/any/128"}));
}

TEST(ChooseKernels, Fp32TakesWhatIsLeft) {
  const Table table;
  EXPECT_EQ(table.chosen(129), Names{"fp32/any/576"});
  EXPECT_EQ(table.chosen(64, 80, DType::kFloat32), Names{"fp32/any/576"});
  EXPECT_EQ(table.chosen(64, 75), Names{});
}

TEST(ChooseKernels, AKernelThatDoesNotFitTheDeviceLeavesItsRowsToOthers) {
  Table table;
  for (AttentionKernel& kernel : table.old_) {
    if (kernel.key.max_rows == kAnyRows) kernel.prepare = does_not_fit;
  }
  EXPECT_EQ(table.chosen(128), (Names{"old/16/128", "old/32/128", "fp32/any/576"}));
}

TEST(ChooseKernels, WithoutTheFormForModifiedScoresAFamilyIsNotUsed) {
  Table table;
  std::erase_if(table.old_, [](const AttentionKernel& kernel) {
    return kernel.key.max_rows == 32 && kernel.key.score_mod;
  });
  EXPECT_EQ(table.chosen(64), (Names{"old/16/64", "old/any/64"}));
}

TEST(ChooseKernels, CachesWithTokensScalesLeaveOutKernelsThatDoNotTakeThem) {
  Table table;
  table.add(&table.new_, "new", 128, kAnyRows, 90);
  for (AttentionKernel& kernel : table.new_) kernel.key.token_scales = false;
  LayerParams layer = Table::layer_of(128, DType::kBFloat16);
  const DeviceInfo hopper = Table::device_of(90);
  const auto last = [&] {
    const KernelTable kernels = {table.new_, table.old_, table.fp32_};
    return std::string(choose_kernels(kernels, layer, hopper, Calls::kSome).back().first().name);
  };
  EXPECT_EQ(last(), "new");
  layer.token_scales = true;
  EXPECT_EQ(last(), "old");
}

// For the calls that it takes it is; if the layer's own scores are not among them, it is not.
TEST(ChooseKernels, AFamilyForSomeCalls) {
  Table table;
  table.add(&table.new_, "new", 128, kAnyRows, 90);
  for (AttentionKernel& kernel : table.new_) {
    kernel.takes = [](const KernelParams& params) { return params.k_simple; };
  }
  table.new_.pop_back();  // the form for modified scores
  const Names old = {"old/16/128", "old/32/128", "old/any/128"};
  const Names some = {"old/16/128", "old/32/128", "new/any/128"};
  EXPECT_EQ(table.chosen(128, 90, DType::kBFloat16, Calls::kSome), some);
  EXPECT_EQ(table.chosen(128, 90, DType::kBFloat16, Calls::kAny), old);
  EXPECT_EQ(table.chosen(128, 90, DType::kBFloat16, Calls::kSome, 30.0F), old);
  const std::vector<KernelFamily> families =
      choose_kernels({table.new_, table.old_}, Table::layer_of(128, DType::kBFloat16),
                     Table::device_of(90), Calls::kSome);
  KernelParams params{};
  EXPECT_FALSE(families.back().is_complete());
  EXPECT_EQ(families.back().member_for(params), nullptr);
  params.k_simple = true;
  EXPECT_EQ(families.back().member_for(params)->kernel, &table.new_[0]);
  params.layer.soft_cap = 30.0F;
  EXPECT_EQ(families.back().member_for(params), nullptr);
}

// A head size between those of exact kernels is no concern of theirs.
TEST(ChooseKernels, ExactHeadSizes) {
  Table table;
  table.add(&table.new_, "new", 128, kAnyRows, 90);
  for (AttentionKernel& kernel : table.new_) kernel.key.exact_head_size = true;
  EXPECT_EQ(table.chosen(128, 90), (Names{"old/16/128", "old/32/128", "new/any/128"}));
  EXPECT_EQ(table.chosen(120, 90), (Names{"old/16/128", "old/32/128", "old/any/128"}));
}

// Its decode kernel takes the rows of both older ones, whatever its number of rows is.
TEST(ChooseKernels, ANewerArchitectureComesFirst) {
  Table table;
  table.add(&table.new_, "new", 128, 40, 90);
  EXPECT_EQ(table.chosen(128, 90), (Names{"new/40/128", "old/any/128"}));
  EXPECT_EQ(table.chosen(128, 89), (Names{"old/16/128", "old/32/128", "old/any/128"}));
  table.add(&table.new_, "new", 128, kAnyRows, 90);
  EXPECT_EQ(table.chosen(128, 90), (Names{"new/40/128", "new/any/128"}));
}

TEST(ChooseKernels, NoMoreFamiliesThanThePlanHasRulesFor) {
  Table table;
  table.add(&table.old_, "old", 64, 48, 80);
  table.add(&table.old_, "old", 64, 64, 80);
  EXPECT_EQ(table.chosen(64), (Names{"old/32/64", "old/48/64", "old/64/64", "old/any/64"}));
}

// Strides that a kernel does not take go to the other member; modified scores to theirs.
TEST(ChooseKernels, CallsGoToTheFirstMemberThatTakesThem) {
  Table table;
  table.add(&table.new_, "strided", 64, kAnyRows, 80);
  table.add(&table.new_, "any", 64, kAnyRows, 80);
  for (int i = 0; i < 2; ++i) {
    table.new_[static_cast<std::size_t>(i)].takes = [](const KernelParams& params) {
      return params.query_token_stride == 64;
    };
  }
  LayerParams layer;
  layer.dtype = layer.kv_dtype = DType::kBFloat16;
  layer.head_size = layer.head_size_v = 64;
  DeviceInfo device;
  device.sm_count = 1;
  device.major = 8;
  const std::vector<KernelFamily> families =
      choose_kernels({table.new_}, layer, device, Calls::kAny);
  ASSERT_EQ(families.size(), 1U);
  KernelParams params{};
  const auto taker = [&] { return families[0].member_for(params)->kernel; };
  EXPECT_EQ(taker(), &table.new_[2]);
  params.query_token_stride = 64;
  EXPECT_EQ(taker(), &table.new_[0]);
  params.layer.soft_cap = 30.0F;
  EXPECT_EQ(taker(), &table.new_[1]);
  params.query_token_stride = 128;
  EXPECT_EQ(taker(), &table.new_[3]);
}

}  // namespace
}  // namespace quire::cuda
