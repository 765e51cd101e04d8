// A cache of more than 2^31 elements in real memory: what lies at its far end is written and read
// as it would be at its start.
#include <cstring>
#include <vector>

#include "tests/conformance/cuda_fixture.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kFarBlocks = 70'000;
constexpr std::int64_t kBlockElements = std::int64_t{2} * 16 * 8 * 128;
constexpr std::int64_t kAliasBlocks = (std::int64_t{1} << 31) / kBlockElements;
static_assert(kFarBlocks > kAliasBlocks + 1000 && kAliasBlocks * kBlockElements == 1LL << 31);

// Where block `block` of the small cache lies: near the start, or at the far end.
std::int64_t place_of(std::int64_t block) {
  return block % 3 == 0 ? block : kFarBlocks - 1 - block;
}

CaseSpec far_spec(KvCacheDType cache) {
  CaseSpec spec;
  spec.seed = 31;
  spec.model_dtype = spec.config.dtype = DType::kBFloat16;
  spec.config.num_heads = 16;
  spec.config.num_kv_heads = 8;
  spec.config.head_size = 128;
  spec.config.block_size = 16;
  spec.config.kv_cache_dtype = cache;
  spec.sequences = {{1, 100}, {37, 200}, {1, 1500}};
  return spec;
}

// The case's cache, its blocks moved to their places in a large one.
class FarCache {
 public:
  explicit FarCache(const Case& c) : case_(c), page_bytes_(kBlockElements * element_bytes()) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(kFarBlocks * page_bytes_)));
    check(cudaMemset(data_, 0xFF, static_cast<std::size_t>(kFarBlocks * page_bytes_)));
  }
  ~FarCache() { cudaFree(data_); }
  FarCache(const FarCache&) = delete;
  FarCache& operator=(const FarCache&) = delete;

  TensorView view() const {
    return TensorView(data_, case_.combined.dtype, {kFarBlocks, 2, 16, 8, 128},
                      Device{DeviceType::kCuda, 0});
  }
  std::int64_t num_blocks() const { return case_.combined.shape[0]; }

  void fill(const std::vector<std::byte>& small) {
    for (std::int64_t b = 0; b < num_blocks(); ++b) {
      check(cudaMemcpy(at(place_of(b)), &small[static_cast<std::size_t>(b * page_bytes_)],
                       static_cast<std::size_t>(page_bytes_), cudaMemcpyHostToDevice));
    }
  }
  std::vector<std::byte> block(std::int64_t place) const {
    std::vector<std::byte> bytes(static_cast<std::size_t>(page_bytes_));
    check(cudaMemcpy(bytes.data(), at(place), bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  // All blocks of the small cache, from their places.
  std::vector<std::byte> gather() const {
    std::vector<std::byte> small;
    for (std::int64_t b = 0; b < num_blocks(); ++b) {
      const std::vector<std::byte> page = block(place_of(b));
      small.insert(small.end(), page.begin(), page.end());
    }
    return small;
  }

 private:
  std::int64_t element_bytes() const { return size_of(case_.combined.dtype); }
  char* at(std::int64_t place) const { return static_cast<char*>(data_) + place * page_bytes_; }

  const Case& case_;
  std::int64_t page_bytes_;
  void* data_ = nullptr;
};

// The index tensors of the case, for the far cache.
Tensor far_table(const Case& c) {
  const Tensor table = make_tensor(DType::kInt32, c.block_table.shape);
  for (std::int64_t s = 0; s < table.shape[0]; ++s) {
    for (std::int64_t i = 0; i < table.shape[1]; ++i) {
      const auto block = static_cast<std::int64_t>(c.block_table.get({s, i}));
      const bool real = block >= 0 && block < c.combined.shape[0];
      table.set({s, i}, static_cast<double>(real ? place_of(block) : block));
    }
  }
  return table;
}

Tensor far_slots(const Case& c) {
  const Tensor slots = make_tensor(DType::kInt64, c.slot_mapping.shape);
  for (std::int64_t i = 0; i < slots.shape[0]; ++i) {
    std::int64_t slot = 0;
    std::memcpy(&slot, c.slot_mapping.at({i}), sizeof slot);
    slots.set_int64(i, slot < 0 ? slot : place_of(slot / 16) * 16 + slot % 16);
  }
  return slots;
}

class CudaLargeCacheTest : public CudaTest, public testing::WithParamInterface<KvCacheDType> {};

TEST_P(CudaLargeCacheTest, FarBlocksAreWrittenAndRead) {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < std::size_t{6} << 30) GTEST_SKIP() << "less than 6 GiB of GPU memory are free";
  const Case c = build_case(far_spec(GetParam()));
  ASSERT_EQ(c.combined.strides[0], kBlockElements);
  DeviceCase on_device(c, backend());
  DeviceBuffers& buffers = on_device.buffers();
  FarCache far(c);
  ASSERT_EQ(c.before.size(), 1U);
  far.fill(c.before.front().second.bytes);

  const Tensor table = far_table(c);
  const Tensor slots = far_slots(c);
  CommonAttentionMetadata batch = on_device.batch();
  batch.block_table = buffers.view(table);
  AttentionArgs args = on_device.args();
  const PagedKvCache small = args.kv_cache;
  args.kv_cache = PagedKvCache::from_combined(far.view(), GetParam());
  args.kv_cache.k_scale = small.k_scale;
  args.kv_cache.v_scale = small.v_scale;

  write_kv_cache(buffers.view(c.key), buffers.view(c.value), args.kv_cache, buffers.view(slots));
  EXPECT_EQ(compare_bytes({&c.key_cache, &c.value_cache}, far.gather(), c.combined.buffer->bytes),
            "");
  // Where an offset cut to 31 bits would have led.
  const std::vector<std::byte> untouched(
      static_cast<std::size_t>(kBlockElements * size_of(c.combined.dtype)), std::byte{0xFF});
  for (std::int64_t b = 0; b < far.num_blocks(); ++b) {
    if (place_of(b) < kAliasBlocks) continue;
    EXPECT_TRUE(far.block(place_of(b) - kAliasBlocks) == untouched) << b;
  }

  Plan plan(on_device.config());
  plan.update(batch);
  attention(plan, args);
  check(cudaDeviceSynchronize());
  const Actual actual{buffers.download(c.output), buffers.download(c.lse), {}};
  EXPECT_EQ(compare(c, actual, literal_attention(c)), "");
  EXPECT_EQ(on_device.damage(), "");
}

INSTANTIATE_TEST_SUITE_P(Caches, CudaLargeCacheTest,
                         testing::Values(KvCacheDType::kAuto, KvCacheDType::kFp8E4M3),
                         [](const testing::TestParamInfo<KvCacheDType>& cache) {
                           return std::string(to_string(cache.param));
                         });

}  // namespace
}  // namespace quire::conformance
